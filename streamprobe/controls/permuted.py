"""Control `permuted`: the probed layers, for labels shifted within each chain.

Shapes: T tokens in a chain, C labels.
"""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from streamprobe.lags import UNKNOWN, Column


def permute_labels(codes: Tensor, support: Tensor, random: np.random.Generator) -> Tensor:
    """Label codes [T, C] of a chain, shifted around the circle of its labelled samples by a random number of them.

    All C labels move together.  Base rate and lengths of runs stay (a run may part at the ends), and so does where
    labels are unknown.  Each shift is as likely as any other, so what a token's place or text says of its label is
    gone: only what the whole chain says is left.
    """
    labelled = ((codes != UNKNOWN).any(1) & support).nonzero()[:, 0]
    moved = codes.clone()
    if len(labelled):
        moved[labelled] = codes[labelled].roll(int(random.integers(len(labelled))), dims=0)
    return moved


def with_permuted(columns: Sequence[Column], seeds: int) -> list[Column]:
    """The columns and, for each seed, their permuted twins."""
    return [*columns, *(c._replace(control="permuted", seed=seed) for seed in range(seeds) for c in columns)]
