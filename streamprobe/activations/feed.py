"""What of a batch a solver is fed.

Shapes: N tokens, L sites, K columns, D features.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from streamprobe.activations.batch import TokenBatch
from streamprobe.probes.sites import Site


class Feed(NamedTuple):
    """The sites whose probes one solver fits, all with the same number of features, and the columns that are asked."""

    name: str
    sites: list[Site]
    n_features: int  # D
    features: Callable[[TokenBatch], Any]  # -> [N, L, D], or what else the probes of these sites read
    columns: Tensor  # [k] which of the batch's K columns
    n_hand_made: int = 0  # so many features, the last ones, are made by hand: their size means something, as it is

    def of(self, batch: TokenBatch) -> tuple[Any, Tensor, Tensor]:
        """Features, targets [N, k] and valid [N, k]."""
        return self.features(batch), batch.targets.T[self.columns].T, batch.valid.T[self.columns].T
