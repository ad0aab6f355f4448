"""What a stream that nobody stores is summed to: the mean activation of each class, at every site and for every column.

Shapes: N tokens, L sites, K columns, D features.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from streamprobe.activations.batch import Extras
from streamprobe.lags import Column
from streamprobe.probes.sites import Site
from streamprobe.system.distributed import add, share


class ClassMeans:
    """Sums over the tokens of a stream, fed like a solver, exactly and in any number of passes.

    Of a logistic regression whose weights are all 0 the gradient is the difference of the class means, but for a
    factor: see `NewtonSolver.anchor`.
    """

    name = "class means"
    shuffles = False

    def __init__(
        self, sites: Sequence[Site], columns: Sequence[Column], n_features: int, device: torch.device | str = "cpu"
    ):
        self.sites, self.columns = list(sites), list(columns)
        shape = (2, len(sites), len(columns), n_features)  # of negatives and of positives
        self.sums_ = torch.zeros(shape, dtype=torch.float64, device=device)
        self.n = torch.zeros(2, len(columns), dtype=torch.float64, device=device)
        self.centre = torch.zeros(len(sites), n_features, device=device)  # near the mean, which keeps sums precise
        self.begun = torch.zeros((), dtype=torch.bool)

    @torch.no_grad()
    def begin(self, acts: Tensor | None, source: int) -> None:
        """The first tokens of all, acts [N, L, D] on the rank `source`, give the centre."""
        if not self.begun:
            self.begun.fill_(True)
            self.centre = share(self.centre if acts is None else acts.float().mean(0), source)

    @torch.no_grad()
    def step(self, acts: Tensor, targets: Tensor, valid: Tensor, extras: Extras | None = None) -> None:
        """Adds acts [N, L, D] with targets [N, K] and valid [N, K]."""
        of_class = torch.stack([valid & ~targets, valid & targets])  # [2, N, K]
        self.n += of_class.sum(1)
        for i, centre in enumerate(self.centre):
            x = acts[:, i].float() - centre
            self.sums_[:, i] += (of_class.mT.float() @ x).double()

    def end_part(self) -> None:
        """Nothing: no token waits."""

    def end_pass(self) -> None:
        """Nothing: sums go on."""

    def loss(self) -> Tensor:
        """Nothing is fitted: NaN, [L, K]."""
        return self.sums_.new_full(self.sums_.shape[1:3], torch.nan)

    def difference(self) -> Tensor:
        """The mean of positives less that of negatives over the tokens of all ranks, [L, K, D] float64.

        NaN for a column without one of the classes.
        """
        sums_, n = self.sums_.clone(), self.n.clone()
        add(sums_, n)
        negative, positive = sums_ / n[:, None, :, None]
        return positive - negative

    def state(self) -> dict[str, Tensor]:
        """The sums of all ranks: what `load` needs."""
        sums_, n = self.sums_.clone(), self.n.clone()
        add(sums_, n)
        return {"sums": sums_.cpu(), "n": n.cpu(), "centre": self.centre.cpu().clone(), "begun": self.begun.clone()}

    def load(self, state: dict[str, Tensor], *, is_first: bool = True) -> None:
        """Goes on from the sums of all ranks, which only one of them is to take up: the one that `is_first`."""
        self.begun.copy_(state["begun"])
        self.centre.copy_(state["centre"])
        self.sums_.copy_(state["sums"] * is_first)
        self.n.copy_(state["n"] * is_first)
