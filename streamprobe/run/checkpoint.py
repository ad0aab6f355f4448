"""What must survive a crash or an overfit."""

import hashlib
import json
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor

from streamprobe.errors import InputError
from streamprobe.probes.storage import pack_tensors, raw_bytes
from streamprobe.run.memory_plan import Kept
from streamprobe.system.distributed import before_dying, is_main
from streamprobe.system.files import write_atomic

STATE = "checkpoint/state.safetensors"
FORMAT = 6  # of the checkpoint; raised whenever what is in it changes
SECONDS = 60.0  # between the beginnings of two of them


class Checkpoint(NamedTuple):
    """Where a run stands after a pass."""

    states: dict[str, dict[str, Tensor]]  # the state of each solver, and of its best probes
    facts: dict[str, Any]  # what defines the run
    passes: int
    tokens: int  # seen in them
    kept: Kept  # of the activations, which decides the order of the tokens


class Unwritten:
    """What stands where no checkpoint is wanted: those of a part of a run, which a resumed run does again."""

    def offer(self, checkpoint: Checkpoint) -> None:
        """Nothing is written."""

    def write(self, checkpoint: Checkpoint) -> None:
        """Nothing is written."""

    def wait(self) -> None:
        """Nothing is under way."""


class Checkpoints:
    """Writes the checkpoints of a run while it trains: now and then, each in a thread, whole or not at all.

    As a context manager it ends when the last write has: no thread outlives it.  Where something goes wrong, what was
    offered last is written first, if that can be.  Of several ranks, rank 0 writes.
    """

    def __init__(self, folder: Path, seconds: float = SECONDS):
        """At most one in so many `seconds`, from now on."""
        self.folder, self.seconds = folder, seconds
        self.begun = time.monotonic()
        self.thread = ThreadPoolExecutor(1)
        self.writing: Future[None] | None = None
        self.offered: Checkpoint | None = None
        self.last: Checkpoint | None = None  # that was written, or is about to be

    def __enter__(self) -> "Checkpoints":
        before_dying(self.write_offered)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is not None:
                self.write_offered()
        finally:
            before_dying(lambda: None)
            self.thread.shutdown()

    def write_offered(self) -> None:
        """Writes what was offered last, if that can be, whatever else went wrong: that is what is reported."""
        if self.offered is not None:
            with suppress(InputError):
                self.write(self.offered)
                self.wait()

    def offer(self, checkpoint: Checkpoint) -> None:
        """Writes a checkpoint, which nothing changes any more, if it is time for that.

        Raises what was in the way of the last write.
        """
        self.offered = checkpoint
        if self.writing and self.writing.done():
            self.wait()
        if not self.writing and time.monotonic() - self.begun >= self.seconds:
            self.write(checkpoint)

    def write(self, checkpoint: Checkpoint) -> None:
        """Begins to write a checkpoint once the last one is written, unless it is that."""
        self.wait()
        if checkpoint is not self.last and is_main():
            self.begun, self.last, self.offered = time.monotonic(), checkpoint, checkpoint
            self.writing = self.thread.submit(save_run, self.folder, checkpoint)

    def wait(self) -> None:
        """Waits until the last write has ended.  Raises what was in its way."""
        writing, self.writing = self.writing, None
        if writing:
            writing.result()


def save_run(folder: Path, checkpoint: Checkpoint) -> None:
    """Writes the checkpoint of a run, with a checksum of all that is in it."""
    states = checkpoint.states
    flat = {f"{part}.{name}": tensor.detach().cpu() for part, own in states.items() for name, tensor in own.items()}
    keys = {"format": FORMAT, "facts": checkpoint.facts, "pass": checkpoint.passes, "tokens": checkpoint.tokens}
    about = json.dumps(keys | {"plan": checkpoint.kept}, sort_keys=True)
    write_atomic(folder / STATE, pack_tensors(flat, f"{_checksum(flat, about)} {about}"))


def load_run(folder: Path) -> Checkpoint | None:
    """What `save_run` wrote last, or None where there is no checkpoint.

    Raises InputError for one that is not, to the byte, what `save_run` wrote.
    """
    path = folder / STATE
    if not path.exists():
        return None
    try:
        if not path.is_file():
            raise ValueError("not a file")
        with safe_open(path, framework="pt") as f:
            checksum, _, about = f.metadata()["streamprobe"].partition(" ")
            flat = {name: f.get_tensor(name) for name in f.keys()}
        if checksum != _checksum(flat, about):
            raise ValueError("its checksum is not that of its content")
        return _unpack(flat, json.loads(about))
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise InputError(
            f"{path}, which cannot be read ({type(error).__name__}: {error})",
            f"a whole checkpoint, format {FORMAT}, as a run wrote it",
            "put back a copy of it, or start a new run without --resume in another folder",
        ) from error


def _unpack(flat: dict[str, Tensor], about: dict[str, Any]) -> Checkpoint:
    if about["format"] != FORMAT:
        raise ValueError(f"format {about['format']}")
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in flat.items():
        part, name = key.split(".", 1)
        parts.setdefault(part, {})[name] = tensor
    facts, passes, tokens, plan = (about[name] for name in ("facts", "pass", "tokens", "plan"))
    if not (isinstance(facts, dict) and isinstance(facts["config"], dict)):
        raise ValueError("no facts of a run")
    if [type(each) for each in plan] != [int, bool, bool, bool] or plan[0] < 1:
        raise ValueError(f"plan {plan!r}")
    if not all(type(n) is int and 0 <= n < 2**63 for n in (passes, tokens)):
        raise ValueError(f"pass {passes!r} and {tokens!r} tokens")
    return Checkpoint(parts, facts, passes, tokens, Kept(*plan))


def _checksum(tensors: dict[str, Tensor], about: str) -> str:
    """SHA-256 over what is said about the tensors, and over the name, dtype, shape and bytes of each."""
    digest = hashlib.sha256(about.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(raw_bytes(tensor))
    return digest.hexdigest()
