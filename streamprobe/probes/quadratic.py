"""What a few squares add to a linear logit: a quadratic form of a site's features that has a low rank.

    residual = sum over squares r of outer[r] ((inner[r] . x + inner_bias[r])^2 - 1) + bias

With the linear logit before it, it is a polynomial of degree 2 whose quadratic part is cut to a few terms (Oldfield et
al. 2025, "Beyond Linear Probes: Dynamic Safety Monitoring for Language Models").  Where it begins, inner . x has about
unit variance, so that what is less 1 has a mean of about 0; what is left of that goes into the bias.  The parts are
those of a network (see network.py) with such units, and a bias [L, K].

Shapes: n tokens, L sites, K columns, F folds, R squares, D features.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from streamprobe.probes import network


def start(directions: Tensor) -> dict[str, Tensor]:
    """Squares along directions [L, K, R, D] of x, at first without any effect."""
    outer = torch.zeros_like(directions[..., 0])
    bias = torch.zeros_like(outer[..., 0])
    return {"inner": directions, "inner_bias": torch.zeros_like(outer), "outer": outer, "bias": bias}


def residual(parts: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """What squares add to logits [L, K, n], of each column's own tokens x [L, K, n, D] or shared ones [L, n, D]."""
    return network.weigh(parts, network.units(parts, x).square() - 1) + parts["bias"][..., None]


def to_raw(parts: Mapping[str, Tensor], mean: Tensor, scale: Tensor) -> dict[str, Tensor]:
    """The parts that read raw features as these read (x - mean) / scale: mean [L, D], scale [L, K or 1, D]."""
    return network.to_raw(parts, mean, scale)


def mean_of_folds(parts: Mapping[str, Tensor], n_folds: int) -> dict[str, Tensor]:
    """The parts [L, K, ...] whose residual is the mean of that of F folds, [L, F K, ...]: they have F R squares."""
    return network.mean_of_folds(parts, n_folds)


def _above_one(read: Tensor) -> Tensor:
    """What squares say."""
    return read.square() - 1


def quadratics(rank: int) -> network.Units:
    """Quadratic forms of so many squares."""
    return network.Units("quad", rank, _above_one)
