"""What of a batch a solver is fed.

Shapes: N tokens, L sites, K columns, D features.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from streamprobe.activations.batch import Extras, TokenBatch
from streamprobe.probes.sites import Site

PROBED = "layers"  # the feed of the probes themselves, the first; of places of another width the first word of it


class Feed(NamedTuple):
    """The sites whose probes one solver fits, all with the same number of features, and the columns that are asked."""

    name: str
    sites: list[Site]
    n_features: int  # D
    features: Callable[[Any], Any]  # -> [N, L, D], or what else the probes of these sites read
    columns: Tensor  # [k] which of the batch's K columns
    n_hand_made: int = 0  # so many features, the last ones, are made by hand: their size means something, as it is
    folds: Tensor | None = None  # [k] of each column, fold by fold; None in a run of one, where no fold is left out
    reads: Sequence[str] = ()  # names of feeds whose probes' logits are read, by name, instead of a batch

    def of(self, batch: TokenBatch) -> tuple[Any, Tensor, Tensor, Extras]:
        """Features, targets [N, k] and valid [N, k], and what else is known of the tokens.

        Valid are tokens that train a column or choose among its probes: none of its own fold.
        """
        targets, valid = batch.targets.T[self.columns].T, self.valid(batch.valid, batch.fold)
        return self.features(batch), targets, valid, Extras(batch.fold, batch.chance)

    def valid(self, asked: Tensor, fold: Tensor) -> Tensor:
        """Which of N tokens, asked [N, K] of the batch's columns, are for each column of the feed: [N, k]."""
        valid = asked.T[self.columns]
        return (valid if self.folds is None else valid & (fold != self.folds[:, None])).T

    def to(self, device: torch.device) -> "Feed":
        """The same for batches on `device`."""
        folds = None if self.folds is None else self.folds.to(device)
        return self._replace(columns=self.columns.to(device), folds=folds)

    @property
    def is_probed(self) -> bool:
        """Whether it is of places of the model, as they are read."""
        return self.name.split("/")[0] == PROBED

    def first_fold(self) -> "Feed":
        """The same, asked once for what is asked for each fold, of all tokens."""
        return self._replace(columns=self.columns[: len(self.columns) // self.n_folds], folds=None)

    @property
    def n_folds(self) -> int:
        """How many folds its columns stand for."""
        return 1 if self.folds is None else int(self.folds[-1]) + 1
