"""Linear probes that read a few features alone, found by dropping from a converged probe what it needs least.

At each round the feature j with the smallest w_j^2 / (2 [H^-1]_jj) goes: by so much the loss rises, to second order,
where the others are fitted anew (Optimal Brain Surgeon: Hassibi & Stork 1993).  H are the second derivatives of J by
the weights of the features that are left.  Half of them go in a round, and no asked number is passed by.

While more than EXACT features are left, J is taken for the quadratic that it is near the converged probe, and H for one
matrix per site and fold, the mean over columns of theirs: rounds cost O(S^3) a probe and no trip over tokens.  From
there on every round fits the probe anew on the drawn tokens, to convergence, and H is its own.  At 70 probes of 4,096
features the first rounds take about 10^12 operations, as much as the rest.

Shapes: U drawn tokens, n of a column, L sites, K columns, D features, S those that are left.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from streamprobe.probes.linear import to_raw
from streamprobe.solvers.pointwise import PointwiseTokens
from streamprobe.solvers.refit import Asked, Regression, refit
from streamprobe.system.distributed import is_own, owner, share
from streamprobe.system.hardware import exact_float32

EXACT = 128  # features from which on a probe is fitted anew in every round
CHUNK = 2_048  # tokens whose features are laid out at once


class Linear(NamedTuple):
    """Linear probes, the weights of all features that they do not read being 0."""

    weight: Tensor  # [L, K, D] float64
    bias: Tensor  # [L, K] float64


class Quadratic(NamedTuple):
    """J near converged probes of one site, for all columns, but for a constant and its size."""

    second: Tensor  # [D, D] float64, with the penalty
    pull: Tensor  # [K, D]: second times the converged weights


def sparse_probes(
    tokens: PointwiseTokens, converged: Linear, sizes: Sequence[int], *, n_valid: Tensor, l2: float, n_folds: int = 1
) -> Mapping[int, Linear]:
    """Probes of at most so many features for each of the `sizes`, all on one path from the converged ones.

    `converged` probes are of standardised features, and those of `tokens.base`; what comes back reads raw ones.
    `n_valid` [K] tokens of each column, which the sum over its drawn ones stands for.  A probe of a size is the minimum
    of Newton's J on the drawn tokens among all probes of its features.  Columns of several folds stand fold by fold,
    and no fold learns of its own tokens from another.
    """
    n_sites, n_columns, n_features = converged.weight.shape
    left = _first_rounds(tokens, converged, sizes, _folds(n_columns, n_folds), n_valid=n_valid, l2=l2)
    room = torch.zeros(n_columns, n_sites, n_features + 1, dtype=torch.float64, device=tokens.base.device)
    found = {size: room.clone() for size in sizes}
    for k in range(n_columns):
        if is_own(k):
            for size, point in _last_rounds(tokens, k, left[:, k], sizes, n_valid=n_valid, l2=l2):
                found[size][k] = point
    for k in range(n_columns):  # once all are done, so that ranks work at once
        for points in found.values():
            share(points[k], owner(k))
    mean, scale = tokens.mean.double(), tokens.scale.double()
    by_site = {size: points.transpose(0, 1) for size, points in found.items()}
    return {size: Linear(*to_raw(point[..., :-1], point[..., -1], mean, scale)) for size, point in by_site.items()}


def next_size(n: int, sizes: Sequence[int]) -> int:
    """How many of n features a round leaves: half of them, but no fewer than the next asked number."""
    return max([(n + 1) // 2, *(size for size in sizes if size < n)])


def _folds(n_columns: int, n_folds: int) -> list[list[int]]:
    """The columns of each fold."""
    return [own.tolist() for own in torch.arange(n_columns).chunk(n_folds)]


def _first_rounds(
    tokens: PointwiseTokens,
    converged: Linear,
    sizes: Sequence[int],
    folds: Sequence[list[int]],
    *,
    n_valid: Tensor,
    l2: float,
) -> Tensor:
    """The features [L, K, S] that the quadratic rounds leave, in their order."""
    n_sites, n_columns, n_features = converged.weight.shape
    rounds = _quadratic_rounds(n_features, sizes)
    n_left = rounds[-1] if rounds else n_features
    left = torch.arange(n_left, device=tokens.base.device).expand(n_sites, n_columns, -1).contiguous()
    if rounds:
        for site in range(n_sites):
            if is_own(site):
                for own in folds:
                    weight = converged.weight[site, own]
                    quadratic = _quadratic(tokens, site, weight, own, n_valid=n_valid, l2=l2)
                    left[site, own] = _eliminate(quadratic, rounds)
        for site in range(n_sites):
            share(left[site], owner(site))
    return left


def _quadratic_rounds(n: int, sizes: Sequence[int]) -> list[int]:
    """How many of n features each quadratic round leaves: to EXACT, or the largest asked number if that is more."""
    found = [n]
    while found[-1] > max(EXACT, *sizes):
        found.append(next_size(found[-1], sizes))
    return found[1:]


def _eliminate(quadratic: Quadratic, rounds: Sequence[int]) -> Tensor:
    """The features [K, S] that these rounds leave of all."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(quadratic.second))
    left = torch.arange(len(inverse), device=inverse.device).expand(len(quadratic.pull), -1)
    for number, size in enumerate(rounds):
        kept = []
        for own, pull in zip(left, quadratic.pull, strict=True):
            if number:
                inverse = torch.cholesky_inverse(torch.linalg.cholesky(quadratic.second[own][:, own]))
            kept.append(own[_most_salient(inverse @ pull[own], inverse, size)])
        left = torch.stack(kept)
    return left


def _most_salient(weight: Tensor, inverse: Tensor, size: int) -> Tensor:
    """Which features [..., size] would raise the loss most, of weights [..., S] and H^-1 [..., S, S], in order."""
    saliency = weight.square() / (2 * inverse.diagonal(dim1=-2, dim2=-1))
    return saliency.argsort(dim=-1, descending=True, stable=True)[..., :size].sort(dim=-1).values


def _quadratic(
    tokens: PointwiseTokens, site: int, weight: Tensor, columns: list[int], *, n_valid: Tensor, l2: float
) -> Quadratic:
    """J near the probes of a site at these k columns, with weights [k, D].

    The curvature of each token is the mean over columns, each of them in units of its sum; so is the penalty.
    """
    curvature = torch.zeros(len(tokens.sample.acts), dtype=torch.float64, device=tokens.base.device)
    ridge = 0.0
    for k in columns:
        column = tokens.sample.columns[k]
        probability = tokens.base[site, k, column.rows].double().sigmoid()
        own = column.weight * probability * (1 - probability)
        curvature[column.rows] += own / own.sum() / len(weight)
        ridge += float(2 * l2 * n_valid[k] / own.sum()) / len(weight)
    second = _covariance(
        tokens, site, curvature, tokens.scale[site].expand(len(tokens.sample.columns), -1)[columns].mean(0)
    )
    second.diagonal().add_(ridge + 1e-6)
    return Quadratic(second, weight.double() @ second)


@exact_float32()
def _covariance(tokens: PointwiseTokens, site: int, counts: Tensor, scale: Tensor) -> Tensor:
    """The covariance [D, D] float64 of a site's features over scale [D], of tokens that count so much [U]: in all 1."""
    n_features = tokens.mean.shape[1]
    second = torch.zeros(n_features, n_features, dtype=torch.float64, device=counts.device)
    first = torch.zeros_like(second[0])
    for acts, own in zip(tokens.sample.acts[:, site].split(CHUNK), counts.to(tokens.dtype).split(CHUNK), strict=True):
        x = (acts.to(tokens.dtype) - tokens.mean[site]).div_(scale)
        first += (own @ x).double()
        second += (x.mul_(own.sqrt()[:, None]).mT @ x).double()
    return second - torch.outer(first, first)


def _last_rounds(
    tokens: PointwiseTokens, k: int, left: Tensor, sizes: Sequence[int], *, n_valid: Tensor, l2: float
) -> list[tuple[int, Tensor]]:
    """The probes [L, D + 1] of column k for each of the sizes, from features [L, S] that are left."""
    column, n_features = tokens.sample.columns[k], tokens.mean.shape[1]
    asked = Asked(column.targets, column.weight.double() / float(n_valid[k]))
    x = _features_of(tokens, k, left)
    point = torch.zeros(len(left), left.shape[1] + 1, dtype=torch.float64, device=left.device)
    found: list[tuple[int, Tensor]] = []
    while True:
        solved = refit(x, asked, l2, point)
        n = left.shape[1]
        whole = torch.zeros(len(left), n_features + 1, dtype=torch.float64, device=left.device)
        whole.scatter_(1, left, solved.point[:, :-1])[:, -1] = solved.point[:, -1]
        found += [(size, whole) for size in sizes if size == n or (size > n and not found)]
        if n <= min(sizes):
            return found
        kept = _kept(solved, next_size(n, sizes))
        left, x = left.gather(1, kept), x.gather(2, kept[:, None].expand(-1, x.shape[1], -1))
        point = torch.cat([solved.point.gather(1, kept), solved.point[:, -1:]], 1)


def _kept(solved: Regression, size: int) -> Tensor:
    """Which features [L, size] of regressions stay."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(solved.second))[:, :-1, :-1]
    return _most_salient(solved.point[:, :-1], inverse, size)


def _features_of(tokens: PointwiseTokens, k: int, left: Tensor) -> Tensor:
    """Standardised features [L, n, S] float64 of a column's tokens, those that are left [L, S] at each site."""
    rows, at = tokens.sample.columns[k].rows, k if tokens.scale.shape[1] > 1 else 0
    found = []
    for site, own in enumerate(left):
        x = tokens.sample.acts[:, site][rows[:, None], own].double()
        found.append(x.sub_(tokens.mean[site, own].double()).div_(tokens.scale[site, at, own].double()))
    return torch.stack(found)
