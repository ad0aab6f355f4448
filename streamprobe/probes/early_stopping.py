"""The best snapshot of every probe, and when it is final.

Shapes: L layers, K columns.
"""

import math

import torch
from torch import Tensor

from streamprobe.probes.base import Probes
from streamprobe.probes.storage import restore


class BestProbes:
    """The best snapshot of every probe so far, each probe judged alone.

    A probe whose validation score has not risen for `patience` passes is stopped: its snapshot is final, whatever
    its live weights do later.  Without patience the newest weights are the best, whatever they score, until the solver
    says that they have converged.
    """

    def __init__(self, bank: Probes, patience: int | None):
        shape = bank.bias.shape
        self.bank, self.patience = bank.clone(), patience
        self.looked_at = 0  # the last pass whose scores were given
        self.score = torch.full(shape, -1.0, dtype=torch.float64)  # [L, K]
        self.best_pass = torch.zeros(shape, dtype=torch.int64)
        self.misses = torch.zeros(shape, dtype=torch.int64)
        self.stopped = torch.zeros(shape, dtype=torch.bool)  # [L, K]: which probes are final

    def update(self, number: int, bank: Probes, converged: Tensor, score: Tensor | None = None) -> None:
        """Takes the probes of `bank` whose score [L, K] is the best yet, as of pass `number`; NaN counts as 0.

        `converged` [L, K] bool: which of them the solver calls final.  With patience there must be a score.
        """
        assert score is not None or self.patience is None, "patience goes by a score"
        self.looked_at = self.looked_at if score is None else number
        score = self.score if score is None else score.nan_to_num(0.0)
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
        return self.bank.tensors() | ours
