"""Where squares of features would help linear probes most.

Shapes: n tokens of a column, L sites, K columns, R squares, D features.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from streamprobe.solvers.pointwise import PointwiseTokens
from streamprobe.solvers.residual import Batch
from streamprobe.system.hardware import coarse_float32

SPARE = 8  # directions that are looked for beside those that are wanted
ROUNDS = 3  # of products with a matrix before its eigenvectors are read off
RIDGE = 0.03  # of a feature's own variance, added to it before features are whitened
TOKENS = 8_192  # of each column that are looked at
COVARIANCE_TOKENS = 16  # that a covariance is taken of, in units of D


class Slopes(NamedTuple):
    """A probe's tokens, and how its loss changes with the logit of each."""

    x: Tensor  # [n, D] standardised features
    slope: Tensor  # [n], adding up to 0


def leading_directions(
    tokens: PointwiseTokens, columns: Sequence[int], rank: int, *, whiteners: Sequence[Tensor]
) -> Tensor:
    """Directions [L, k, R, D] of standardised features whose squares lower the loss fastest, for each probe.

    Let z be the features, whitened, and M the matrix of a form z' M z that is added to the frozen logits.  The gradient
    of the loss by M is the sum over tokens of slope z z', less what a bias would do; its eigenvectors of the largest
    |eigenvalue| are the unit vectors along which a square changes the loss most.  Without whitening those of much
    variance would lead, whatever the targets: `whiteners` are those of the sites.  A direction is scaled so that its
    product with x has about unit variance.  Found by randomised subspace iteration (Halko, Martinsson & Tropp 2011,
    algorithm 4.4), which costs O(n D R) a round: the matrix [D, D] is never made.  Where D < R, zeros fill up.
    """
    n_features = tokens.mean.shape[1]
    found = torch.zeros(len(tokens.base), len(columns), rank, n_features, dtype=tokens.dtype, device=tokens.base.device)
    steps = [-(-len(tokens.sample.columns[k].rows) // TOKENS) for k in columns]  # of n tokens every so manyth
    places = [torch.arange(0, len(tokens.sample.columns[k].rows), step) for k, step in zip(columns, steps, strict=True)]
    room = tokens.room(columns[:1], max(map(len, places)))
    for number, (k, place) in enumerate(zip(columns, places, strict=True)):
        tokens.put(room, 0, k, place.to(found.device))
        for site, factor in enumerate(whiteners):
            best = _eigenvectors(_slopes(room, site), factor, rank)
            found[site, number, : best.shape[1]] = best.mT
    return found


def whitener(tokens: PointwiseTokens, site: int) -> Tensor:
    """The Cholesky factor [D, D] of the covariance of a site's standardised features, with a ridge."""
    n_features, acts = tokens.mean.shape[1], tokens.sample.acts
    step = max(1, len(acts) // (COVARIANCE_TOKENS * n_features))
    x = acts[::step, site].to(tokens.dtype) - tokens.mean[site].to(tokens.dtype)
    x.div_(tokens.scale[site].mean(0).to(tokens.dtype))
    covariance = (x.mT @ x / max(1, len(x))).double()
    covariance.diagonal().mul_(1 + RIDGE).add_(1e-6)
    return torch.linalg.cholesky(covariance).to(tokens.dtype)


def _slopes(room: Batch, number: int) -> Slopes:
    """The tokens of the probe of a site, of the one column that a batch is of."""
    weight, targets = room.weight[0, 0], room.targets[0, 0]
    slope = weight * (room.base[number, 0].sigmoid() - targets.to(weight.dtype))
    return Slopes(room.x[number, 0], slope - weight * (slope.sum() / weight.sum()))


def _eigenvectors(slopes: Slopes, factor: Tensor, rank: int) -> Tensor:
    """The leading eigenvectors of the sum of slope z z', as directions of x: [D, R] or [D, D]."""

    def product(v: Tensor) -> Tensor:
        """That matrix times v [D, r], of whitened features z = factor^-1 x."""
        along = torch.linalg.solve_triangular(factor.mT, v, upper=True)
        summed = slopes.x.mT @ (slopes.slope[:, None] * (slopes.x @ along))
        return torch.linalg.solve_triangular(factor, summed, upper=False)

    d = len(factor)
    random = torch.Generator().manual_seed(0)
    v = torch.randn(d, min(d, rank + SPARE), generator=random).to(factor)
    with coarse_float32():  # which a subspace of noise and a few that lead does not notice
        for _ in range(ROUNDS):
            v = torch.linalg.qr(product(v)).Q
    values, turned = torch.linalg.eigh(v.mT @ product(v))
    leading = values.abs().argsort(descending=True, stable=True)[:rank]
    return torch.linalg.solve_triangular(factor.mT, v @ turned[:, leading], upper=True)
