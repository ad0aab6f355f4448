"""A file that a long command writes piece by piece: killed at any moment, it goes on behind the last whole piece."""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import Timeout

from streamprobe.errors import InputError
from streamprobe.system.files import check_output, lock, reason, unwritable, write_atomic


class GrowingFile:
    """What is there of the file `path` until it is whole: its pieces in `part`, and in `log` how far they are good.

    `state` is what was given with the last piece, in JSON's types; None before the first.
    """

    def __init__(self, path: Path, facts: Mapping[str, Any]):
        """`facts`, in JSON's types, define the content: only a beginning of the same facts is gone on with."""
        self.path, self.facts = path, dict(facts)
        self.part, self.log = (path.with_name(path.name + ending) for ending in (".part", ".part.json"))
        self.size, self.state = 0, None

    def take_up(self) -> None:
        """Goes on with the beginning that is there, if one is.  Raises InputError for that of another command."""
        if not os.path.lexists(self.part):
            return
        fix = f"give what was given then, or remove {self.part} to begin anew"
        try:
            known = json.loads(self.log.read_text(encoding="utf-8"))
            size, state, facts = int(known["size"]), known["state"], dict(known["facts"])
            if self.part.stat().st_size < size:
                raise ValueError("shorter than it was")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{self.part}, which cannot be gone on with ({type(error).__name__}: {error})",
                f"it and {self.log.name} as they were left",
                f"remove {self.part} to begin anew",
            ) from error
        other = [name for name in sorted(facts.keys() | self.facts.keys()) if facts.get(name) != self.facts.get(name)]
        if other:
            got, expected = (str(each.get(other[0]))[:60] for each in (self.facts, facts))
            raise InputError(f"--resume with {other[0]} {got}", f"{expected}, as in {self.part}", fix)
        self.size, self.state = size, state

    def add(self, content: bytes, state: Any) -> None:
        """Writes a piece, and then that it is there; raises InputError where that fails."""
        try:
            if self.state is None:
                self._note()
            with open(self.part, "r+b" if self.size else "wb") as f:
                f.seek(self.size)
                f.truncate()
                f.write(content)
                f.flush()
                os.fsync(f.fileno())
        except OSError as error:
            raise unwritable(self.part, error) from error
        self.size, self.state = self.size + len(content), state
        self._note()

    def _note(self) -> None:
        known = {"size": self.size, "state": self.state, "facts": self.facts}
        write_atomic(self.log, json.dumps(known).encode())

    def finish(self, convert: Callable[[Path, Path], None] | None = None) -> None:
        """Puts the whole file in its place, made by `convert` (pieces, file) if they are not it already.

        Raises InputError where that fails.
        """
        whole = self.part
        try:
            if convert:
                whole = self.path.with_name(self.path.name + ".whole")
                convert(self.part, whole)
            os.replace(whole, self.path)
            for path in (self.part, self.log):
                path.unlink(missing_ok=True)
        except OSError as error:
            raise unwritable(self.path, error) from error


@contextmanager
def grow(path: Path, name: str, facts: Mapping[str, Any], resume: bool) -> Iterator[GrowingFile]:
    """The file `path`, which --`name` gave, for this process alone; with `resume` what is there of it is gone on with.

    Raises InputError for a file that is there already, one whose beginning is there without `resume` or is of other
    `facts`, and one that cannot be written.
    """
    check_output(path, name)
    file, held = GrowingFile(path, facts), None
    lock_path = path.with_name(path.name + ".lock")
    try:
        held = lock(lock_path)
    except Timeout:
        raise InputError(
            f"{name} {path}, which another command is writing", "a file of its own", f"wait, or give another --{name}"
        ) from None
    except OSError as error:
        got = f"{name} {path}, beside which no file can be made ({reason(error)})"
        raise InputError(got, "a folder to write to", f"give another --{name}") from error
    try:
        if os.path.lexists(path):
            what = "is whole" if resume else "exists"
            raise InputError(f"{name} {path}, which {what}", "a new file", f"remove it, or give another --{name}")
        if os.path.lexists(file.part) and not resume:
            raise InputError(
                f"{file.part}, the beginning of a file that was interrupted",
                "--resume, which goes on with it",
                f"give --resume, or remove {file.part}",
            )
        file.take_up()
        yield file
    finally:
        with suppress(OSError):
            lock_path.unlink(missing_ok=True)
        if held:
            held.release()
