"""Weighted logistic regressions of a few features each, to convergence.

Shapes: P regressions of the same n tokens, S features, E = S + 1: features with a one behind them.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad, softplus

TOLERANCE = 1e-8  # of every number of a gradient
MOST_STEPS = 100
HALVINGS = 30  # of a step at most
STALE = 0.2  # a gradient that one step has not made as small as this part of it asks for new second derivatives
FLAT = 1e-10  # added to second derivatives where there is no penalty


class Asked(NamedTuple):
    """What n tokens are asked."""

    targets: Tensor  # [n] bool
    weight: Tensor  # [n] float64: what each counts in a loss


class Regression(NamedTuple):
    """P regressions where they are solved."""

    point: Tensor  # [P, E] float64, the bias last
    second: Tensor  # [P, E, E] second derivatives there


class _Slope(NamedTuple):
    """Objectives and their first derivatives."""

    loss: Tensor  # [P]
    gradient: Tensor  # [P, E]
    curvature: Tensor  # [P, n] of each token


def refit(x: Tensor, asked: Asked, l2: float, start: Tensor) -> Regression:
    """The minima of sum(weight (y softplus(-z) + (1 - y) softplus(z))) + l2 |w|^2, z = w . x + b.

    x [P, n, S] float64, start [P, E].  Newton's method, whose second derivatives are kept while they serve; a step
    that raises the objective is halved.  The bias has no penalty.
    """
    x = pad(x, (0, 1), value=1.0)
    penalty = torch.full_like(start[0], 2 * l2)
    penalty[-1] = 0
    best, factor, norm = start, None, torch.inf
    at_best = _slope(x, asked, penalty, best)
    for _ in range(MOST_STEPS):
        reached = float(at_best.gradient.abs().max())
        if reached <= TOLERANCE:
            break
        if factor is None or reached > STALE * norm:
            factor = torch.linalg.cholesky(_second(x, at_best.curvature, penalty))
        norm = reached
        step = -torch.cholesky_solve(at_best.gradient[..., None], factor)[..., 0]
        point = best + step
        here = _slope(x, asked, penalty, point)
        for _ in range(HALVINGS):
            rises = here.loss > at_best.loss + 1e-13 * at_best.loss.abs()
            if not rises.any():
                break
            step = step.where(~rises[:, None], step / 2)
            point = best + step
            here = _slope(x, asked, penalty, point)
        best, at_best = point, here
    return Regression(best, _second(x, at_best.curvature, penalty))


def _slope(x: Tensor, asked: Asked, penalty: Tensor, point: Tensor) -> _Slope:
    """At points [P, E], of x [P, n, E]."""
    sign = torch.where(asked.targets, -1.0, 1.0).to(x.dtype)
    margin = (x @ point[..., None])[..., 0] * sign
    wrong = margin.sigmoid()
    slope = asked.weight * wrong
    loss = (asked.weight * softplus(margin)).sum(1) + point.square() @ penalty / 2
    gradient = ((slope * sign)[:, None] @ x)[:, 0] + penalty * point
    return _Slope(loss, gradient, slope * (1 - wrong))


def _second(x: Tensor, curvature: Tensor, penalty: Tensor) -> Tensor:
    """Second derivatives [P, E, E]: one regression after the other, in room that is used again."""
    room = torch.empty_like(x[0])
    found = torch.stack([torch.mul(own, c[:, None], out=room).mT @ own for own, c in zip(x, curvature, strict=True)])
    found.diagonal(dim1=1, dim2=2).add_(penalty + FLAT)
    return found
