"""Weighted sums of logits that say best what is true on chains that trained none of them.

Shapes: P sums, M logits in each, n tokens.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

MOST_STEPS, MOST_HALVINGS = 50, 30
SMALL = 1e-9  # a step below which a fit has converged
RIDGE = 1.0  # on the squared distance of weights from what they are near, as much as one token can lose


class Mix(NamedTuple):
    """Weighted sums: weight . logits + offset."""

    weight: Tensor  # [P, M] float64
    offset: Tensor  # [P]
    loss: Tensor  # [P] mean log-loss of the tokens they were fitted to


def mix(logits: Tensor, targets: Tensor, *, near: Sequence[float]) -> Mix:
    """The logistic regression of targets [n] bool on logits [P, M, n], by Newton's method (stacking: Wolpert 1992).

    A penalty keeps the weights near those [M]: they are what little data, or a logit that is constant, leave.  So they
    are where a class is absent.
    """
    x, y = logits.double(), targets.double()
    before = torch.tensor(near, dtype=torch.float64, device=x.device)
    if targets.all() or not targets.any():
        weight, offset = before.expand(len(x), -1).clone(), x.new_zeros(len(x))
    else:
        found = _minimise(torch.cat([x - x.mean(2, keepdim=True), torch.ones_like(x[:, :1])], 1), y, before)
        weight = found[:, :-1]
        offset = found[:, -1] - (weight * x.mean(2)).sum(1)
    return Mix(weight, offset, mean_loss(torch.einsum("pm,pmn->pn", weight, x) + offset[:, None], targets))


def mean_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean log-loss [P] of logits [P, n], targets [n] bool."""
    return softplus(torch.where(targets, -logits, logits)).mean(-1)


def _minimise(x: Tensor, y: Tensor, near: Tensor) -> Tensor:
    """Weights [P, M + 1] of x [P, M + 1, n], of which the last is 1: Newton steps, halved until the loss falls."""
    ridge = torch.full((x.shape[1],), RIDGE, dtype=x.dtype, device=x.device)
    ridge[-1] = 0
    centre = torch.cat([near, y.mean().logit()[None]])
    found = centre.expand(len(x), -1).clone()
    loss = _loss(found, x, y, ridge=ridge, centre=centre)
    for _ in range(MOST_STEPS):
        said = torch.einsum("pm,pmn->pn", found, x).sigmoid()
        gradient = torch.einsum("pmn,pn->pm", x, said - y) + 2 * ridge * (found - centre)
        second = (x * (said * (1 - said))[:, None]) @ x.mT
        second.diagonal(dim1=1, dim2=2).add_(2 * ridge + 1e-9)
        step = torch.linalg.solve(second, gradient)
        for _ in range(MOST_HALVINGS):
            after = _loss(found - step, x, y, ridge=ridge, centre=centre)
            falls = after <= loss
            if falls.all():
                break
            step = torch.where(falls[:, None], step, step / 2)
        step = step.where(falls[:, None], 0)
        found, loss = found - step, after.where(falls, loss)
        if (step.abs() < SMALL).all():
            break
    return found


def _loss(weight: Tensor, x: Tensor, y: Tensor, *, ridge: Tensor, centre: Tensor) -> Tensor:
    """The penalised log-loss [P] of weights [P, M + 1]."""
    logits = torch.einsum("pm,pmn->pn", weight, x)
    return (softplus(logits) - y * logits).sum(1) + (ridge * (weight - centre).square()).sum(1)
