"""The kinds of residual that read one token at a time, as they are trained.

Shapes: L sites, K columns, D features.
"""

from collections.abc import Sequence
from functools import partial

from torch import Tensor

from streamprobe.probes import network, quadratic
from streamprobe.solvers.pointwise import PointwiseKind, PointwiseTokens
from streamprobe.solvers.squares import leading_directions, whitener


def network_kind(n_features: int, width: int, seed: int = 0) -> PointwiseKind:
    """Networks of one layer of so many rectified units."""
    shapes = {"inner": (width, n_features), "inner_bias": (width,), "outer": (width,)}
    return PointwiseKind(partial(_network_start, width=width, seed=seed), network.residual, shapes)


def quadratic_kind(training: PointwiseTokens, rank: int) -> PointwiseKind:
    """Quadratic forms of so many squares, which begin along the directions that the loss on these tokens asks for."""
    shapes = {"inner": (rank, training.mean.shape[1]), "inner_bias": (rank,), "outer": (rank,), "bias": ()}
    whiteners = [whitener(training, site) for site in range(len(training.base))]
    return PointwiseKind(partial(_quadratic_start, rank=rank, whiteners=whiteners), quadratic.residual, shapes)


def _network_start(tokens: PointwiseTokens, columns: Sequence[int], *, width: int, seed: int) -> dict[str, Tensor]:
    n_sites, n_features = tokens.mean.shape
    parts = network.start(n_sites, columns, n_features, width=width, seed=seed, dtype=tokens.dtype)
    return {name: part.to(tokens.base.device) for name, part in parts.items()}


def _quadratic_start(
    tokens: PointwiseTokens, columns: Sequence[int], *, rank: int, whiteners: Sequence[Tensor]
) -> dict[str, Tensor]:
    return quadratic.start(leading_directions(tokens, columns, rank, whiteners=whiteners))
