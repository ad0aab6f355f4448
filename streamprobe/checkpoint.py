"""What must survive a crash or an overfit."""

import hashlib
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from streamprobe.errors import InputError
from streamprobe.probes import ProbeBank, restore
from streamprobe.system.files import write_atomic

STATE = "checkpoint/state.safetensors"
FORMAT = 1  # of the checkpoint; raised whenever what is in it changes


class BestProbes:
    """The best snapshot of every probe so far, each probe judged alone.

    A probe whose validation score has not risen for `patience` passes is stopped: its snapshot is final, whatever
    its live weights do later.  Without patience the newest weights are the best, until the solver says that they
    have converged.
    """

    def __init__(self, bank: ProbeBank, patience: int | None):
        shape = bank.bias.shape
        self.bank, self.patience = bank.clone(), patience
        self.score = torch.full(shape, -1.0, dtype=torch.float64)  # [L, K]
        self.best_pass = torch.zeros(shape, dtype=torch.int64)
        self.misses = torch.zeros(shape, dtype=torch.int64)
        self.stopped = torch.zeros(shape, dtype=torch.bool)  # [L, K]: which probes are final

    def update(self, score: Tensor, number: int, bank: ProbeBank, converged: Tensor) -> None:
        """Takes the probes of `bank` whose score [L, K] is the best yet, as of pass `number`; NaN counts as 0.

        `converged` [L, K] bool: which of them the solver calls final.
        """
        score = score.nan_to_num(0.0)
        better = ~self.stopped & (True if self.patience is None else score > self.score)
        self.misses = torch.where(better, 0, self.misses + (~self.stopped).long())
        self.stopped = self.stopped | converged.cpu() | (self.misses >= (self.patience or math.inf))
        self.score, self.best_pass = torch.where(better, score, self.score), self.best_pass.masked_fill(better, number)
        self.bank.take(better.to(bank.bias.device), bank)

    def state(self) -> dict[str, Tensor]:
        """Everything that `load` needs, sharing no memory with these."""
        return {name: tensor.to("cpu", copy=True) for name, tensor in self._live().items()}

    def load(self, state: dict[str, Tensor]) -> None:
        """Takes up where the one that gave `state` stood.  Raises InputError for the state of other probes."""
        restore(self._live(), state)

    def _live(self) -> dict[str, Tensor]:
        """The tensors themselves, by name."""
        ours = {name: getattr(self, name) for name in ("score", "best_pass", "misses", "stopped")}
        return {"weight": self.bank.weight, "bias": self.bank.bias, **ours}


def save_tensors(path: Path, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
    """A safetensors file, written atomically and byte-identical for equal input; `about` is its JSON metadata."""
    _save(path, tensors, json.dumps(about, sort_keys=True))


def _save(path: Path, tensors: dict[str, Tensor], about: str) -> None:
    ready = {name: t.detach().cpu().contiguous() for name, t in sorted(tensors.items())}
    write_atomic(path, save(ready, {"streamprobe": about}))  # of two entries the order would be any


class Checkpoint(NamedTuple):
    """Where a run stands after a pass."""

    parts: dict[str, dict[str, Tensor]]  # the state of each solver, and of its best probes
    facts: dict[str, Any]  # what defines the run
    passes: int
    tokens: int  # seen in them
    plan: list[Any]  # where the activations lie, which decides the order of the tokens


def save_run(folder: Path, checkpoint: Checkpoint) -> None:
    """Writes the checkpoint of a run, with a checksum of all that is in it."""
    parts, facts, passes, tokens, plan = checkpoint
    flat = {f"{part}.{name}": tensor.detach().cpu() for part, own in parts.items() for name, tensor in own.items()}
    keys = {"format": FORMAT, "facts": facts, "pass": passes, "tokens": tokens, "plan": plan}
    about = json.dumps(keys, sort_keys=True)
    _save(folder / STATE, flat, f"{_checksum(flat, about)} {about}")


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
    if not all(type(n) is int and 0 < n < 2**63 for n in (passes, tokens)):
        raise ValueError(f"pass {passes!r} and {tokens!r} tokens")
    return Checkpoint(parts, facts, passes, tokens, plan)


def _checksum(tensors: dict[str, Tensor], about: str) -> str:
    """SHA-256 over what is said about the tensors, and over the name, dtype, shape and bytes of each."""
    digest = hashlib.sha256(about.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(raw_bytes(tensor))
    return digest.hexdigest()


def raw_bytes(tensor: Tensor) -> bytes:
    """The numbers of a tensor as they lie in memory, in its order and whatever its strides."""
    whole = tensor.detach().cpu().contiguous()  # of a single row the strides may still be any
    flat = whole.as_strided((whole.numel(),), (1,))  # no copy, which would make 1 of any other true bool
    return flat.view(torch.uint8).numpy().tobytes()
