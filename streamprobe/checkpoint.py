"""What must survive a crash or an overfit."""

import json
import math
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from streamprobe.probes import ProbeBank

STATE = "checkpoint/state.safetensors"


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
        return {name: tensor.clone() for name, tensor in self._live().items()}

    def load(self, state: dict[str, Tensor]) -> None:
        """Takes up where the one that gave `state` stood."""
        for name, tensor in self._live().items():
            tensor.copy_(state[name])

    def _live(self) -> dict[str, Tensor]:
        """The tensors themselves, by name."""
        ours = {name: getattr(self, name) for name in ("score", "best_pass", "misses", "stopped")}
        return {"weight": self.bank.weight, "bias": self.bank.bias, **ours}


def write_atomic(path: Path, content: bytes) -> None:
    """Writes a file that is either the old one or the whole new one, at every moment, also after a power cut."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with open(part, "wb") as f:
        f.write(content)
        f.flush()
        os.fsync(f.fileno())
    os.replace(part, path)


def save_tensors(path: Path, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
    """A safetensors file, written atomically and byte-identical for equal input; `about` is its JSON metadata."""
    ready = {name: t.detach().cpu().contiguous() for name, t in sorted(tensors.items())}
    write_atomic(path, save(ready, {"streamprobe": json.dumps(about, sort_keys=True)}))


def save_run(folder: Path, parts: dict[str, dict[str, Tensor]], about: dict[str, Any]) -> None:
    """The checkpoint of a run: the tensors of each part (solver or best probes), and numbers about where it stands."""
    flat = {f"{part}.{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}
    save_tensors(folder / STATE, flat, about)


def load_run(folder: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]] | None:
    """What `save_run` wrote last, or None where there is no checkpoint."""
    if not (folder / STATE).exists():
        return None
    parts: dict[str, dict[str, Tensor]] = {}
    with safe_open(folder / STATE, framework="pt") as f:
        for key in f.keys():
            part, name = key.split(".", 1)
            parts.setdefault(part, {})[name] = f.get_tensor(key)
        return parts, json.loads(f.metadata()["streamprobe"])
