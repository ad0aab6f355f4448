"""The folder of a run: which one it is, that nobody else writes to it, and that it can hold what a run writes."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import count, takewhile
from pathlib import Path

from filelock import FileLock, Timeout

from streamprobe.errors import InputError
from streamprobe.reporting.files import FILES
from streamprobe.run.checkpoint import STATE
from streamprobe.system import files
from streamprobe.system.console import say
from streamprobe.system.distributed import is_main, share_bytes

LOCK = ".lock"
TRIES = 10  # to make a folder that a refused run is just taking away


def file_names() -> list[str]:
    """All that a run writes but for the events of TensorBoard."""
    return ["config.yaml", STATE, *FILES]


def holds_run(folder: Path) -> bool:
    """Whether a run has begun to write there."""
    return any(os.path.lexists(folder / name) for name in file_names())


def holds_results(folder: Path) -> bool:
    """Whether a run has got as far as its results."""
    return any(os.path.lexists(folder / name) for name in FILES)


@contextmanager
def claim_folder(
    output_dir: str | None, name: str, resume: bool, *, beside: Path = Path("runs"), option: str = "output_dir"
) -> Iterator[Path]:
    """The folder of this run, which no other process can claim until the context ends or this process dies.

    `output_dir` is what --`option` gave.  Without it, the first of `beside`/<name>, `beside`/<name>-2, ... that holds
    no run and is nobody's, or to resume the last one that does hold one.  Raises InputError rather than write over
    another run, or where a file of a run could not be written.  A folder that was made for a run which then wrote
    nothing is taken away again.
    """
    claim = _claim_given(Path(output_dir), resume, option) if output_dir else _claim_default(beside / name, resume)
    try:
        check_files(claim.folder, option)
        if claim.lock is None:
            say(f"lock      {claim.folder} is on a file system without locks: start no second run there")
        yield claim.folder
    finally:
        claim.release()


@contextmanager
def claim_shared_folder(output_dir: str | None, name: str, resume: bool) -> Iterator[Path]:
    """The folder of a run, claimed as `claim_folder` does by rank 0, which alone writes there; all are told which."""
    if not is_main():
        yield Path(os.fsdecode(share_bytes(b"")))
        return
    with claim_folder(output_dir, name, resume) as folder:
        share_bytes(os.fsencode(folder))
        yield folder


@dataclass
class Claim:
    """A folder, the lock that keeps others out (None where the file system has none), and the folders made for it."""

    folder: Path
    lock: FileLock | None
    made: list[Path]  # the deepest first

    def release(self) -> None:
        """Lets others in.  Takes away the lock's file and, where nothing was written, the folders."""
        with suppress(OSError):
            (self.folder / LOCK).unlink(missing_ok=True)
        if not holds_run(self.folder):
            _take_away(self.made)
        if self.lock:
            self.lock.release()


def _claim_given(folder: Path, resume: bool, option: str = "output_dir") -> Claim:
    if resume or not holds_run(folder):
        claim = _claim(folder, option)
        if claim is None:
            raise InputError(
                f"{'--resume in' if resume else option} {folder}, where a run is under way",
                "a folder that no other process writes to",
                "wait for its end" if resume else "choose another",
            )
        if resume or not holds_run(folder):
            return claim
        claim.release()  # another process has been there meanwhile
    found = next((name for name in file_names() if os.path.lexists(folder / name)), "")
    go_on = ", or go on with that run by --resume" * (option == "output_dir")
    raise InputError(
        f"{option} {folder}, which holds a run ({found})",
        "an empty or new folder",
        f"choose another --{option}{go_on}",
    )


def _claim_default(first: Path, resume: bool) -> Claim:
    folders = (first.with_name(f"{first.name}-{number}") if number > 1 else first for number in count(1))
    if resume:
        return _claim_given(next(reversed(list(takewhile(holds_run, folders))), first), resume)
    for folder in folders:
        claim = None if holds_run(folder) else _claim(folder)
        if claim and not holds_run(folder):
            return claim
        if claim:
            claim.release()
    raise AssertionError("numbers do not end")


def _claim(folder: Path, option: str = "output_dir") -> Claim | None:
    """The folder, made if it was not there, and locked; None where another process has it.

    Raises InputError where that cannot be.
    """
    for attempt in range(TRIES):
        made: list[Path] = []
        try:
            _make(folder, made)
            return Claim(folder, files.lock(folder / LOCK), made)
        except Timeout:
            return None
        except (OSError, ValueError) as error:
            _take_away(made)
            gone = isinstance(error, FileNotFoundError | FileExistsError)  # the latter if just before it was there
            if not gone or attempt == TRIES - 1:
                raise _refusal(folder, error, option) from error
    raise AssertionError("the last attempt returns or raises")


def _make(folder: Path, made: list[Path]) -> None:
    """Makes the folder and those above it, and puts those that were not there at the front of `made`."""
    missing = [folder]
    while not os.path.lexists(missing[-1]) and missing[-1] != missing[-1].parent:
        missing.append(missing[-1].parent)
    for path in reversed(missing):
        if path.is_dir():
            continue
        try:
            path.mkdir()
        except FileExistsError:
            if not path.is_dir():
                raise NotADirectoryError(0, f"{path} is no folder") from None
        else:
            made.insert(0, path)


def _take_away(made: list[Path]) -> None:
    """Removes the folders that are empty."""
    with suppress(OSError):
        for path in made:
            path.rmdir()


def _refusal(folder: Path, error: Exception, option: str) -> InputError:
    why = "is a file" if os.path.isfile(folder) else f"cannot be made or written to ({files.reason(error)})"
    return InputError(f"{option} {folder}, which {why}", "a folder to write to", f"choose another --{option}")


def check_files(folder: Path, option: str) -> None:
    """Raises InputError where one of the files that a run writes into `folder` could not be written."""
    events = f"events.out.tfevents.{0:010d}.{socket.gethostname()}.{0:07d}.0"
    state = (folder / STATE).parent
    path = state
    try:
        if os.path.lexists(state) and not state.is_dir():
            raise NotADirectoryError(0, "it is not a folder")
        for name in (*file_names(), events):
            path = folder / name
            files.probe(path)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{option} {folder}, where {path.relative_to(folder)} cannot be written ({files.reason(error)})",
            "a folder that can hold the files of a run",
            f"make room for it, or choose another --{option}",
        ) from error
