"""One slope and one offset a probe, with which its logits mean what they say on other chains than those of training.

Two probes whose log-losses are compared are both recalibrated first, so that neither loses for being too sure.

Shapes: N tokens, L sites, K columns, n valid tokens of a column.
"""

import torch
from torch import Tensor
from torch.nn.functional import softplus

MOST_STEPS, MOST_HALVINGS = 100, 40
SMALL = 1e-10  # a step below which a fit has converged, in standard deviations of the scores
ROUNDING = 1e-14  # of a loss


def recalibrate(scores: Tensor, targets: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """The slope and the offset [L, K] (float64) of each probe: slope x score + offset is its recalibrated logit.

    scores [N, L, K], targets and valid [N, K] bool.  They are the maximum-likelihood logistic regression of the targets
    on the scores of the valid tokens (Cox 1958; Platt 1999), by Newton's method, with a slope of at least 0: where less
    would be better it is 0, and the offset the log-odds of the targets.  So it is where all scores are the same.  There
    is no such regression where a class is absent or the scores part the classes without an error: slope 1, offset 0.
    """
    columns = []
    for k in range(targets.shape[1]):
        asked = valid[:, k].nonzero()[:, 0]
        own = scores[:, :, k].T.index_select(1, asked)  # [L, n]
        columns.append(_fit(own.double(), targets[asked, k]))
    slope, offset = (torch.stack(each, 1) for each in zip(*columns, strict=True))
    return slope, offset


def _fit(x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Slopes and offsets [L] of scores x [L, n] float64, targets [n] bool."""
    slope, offset = x.new_ones(len(x)), x.new_zeros(len(x))
    if targets.all() or not targets.any():
        return slope, offset
    y, positive, negative = targets.double(), x[:, targets], x[:, ~targets]
    wrong = positive.amax(1) <= negative.amin(1)  # or all the same
    parted = (positive.amin(1) >= negative.amax(1)) & ~wrong
    usual = ~(wrong | parted)
    mean, deviation = x.mean(1), x.std(1, correction=0).where(usual, 1)
    found = _minimise((x - mean[:, None]).where(usual[:, None], 0) / deviation[:, None], y)
    slope = found[:, 1].clamp_min(0) / deviation
    offset = torch.where(slope > 0, found[:, 0] - slope * mean, y.mean().logit())
    return slope.where(~parted, 1), offset.where(~parted, 0)


def _minimise(x: Tensor, y: Tensor) -> Tensor:
    """The offset and slope [L, 2] of logistic regressions of y [n] on each x [L, n], by Newton steps that are halved
    until the loss does not rise.
    """
    found = torch.stack([y.mean().logit().expand(len(x)), x.new_zeros(len(x))], 1)
    loss = _loss(found, x, y)
    for _ in range(MOST_STEPS):
        said = (found[:, :1] + found[:, 1:] * x).sigmoid()
        error, spread = said - y, said * (1 - said)
        a, b, c = spread.sum(1), (spread * x).sum(1), (spread * x * x).sum(1)
        g, h = error.sum(1), (error * x).sum(1)
        determinant = (a * c - b * b).clamp_min(1e-300)
        step = torch.stack([c * g - b * h, a * h - b * g], 1) / determinant[:, None]
        found, loss, step = _halve(found, loss, step, x=x, y=y)
        if (step.abs() < SMALL).all():
            break
    return found


def _halve(found: Tensor, loss: Tensor, step: Tensor, *, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`found` less a step [L, 2] that is halved until the loss [L] does not rise; the new loss, and that step."""
    for _ in range(MOST_HALVINGS):
        after = _loss(found - step, x, y)
        falls = after <= loss * (1 + ROUNDING)
        if falls.all():
            return found - step, after, step
        step = torch.where(falls[:, None], step, step / 2)
    step = step.where(falls[:, None], 0)
    return found - step, after.where(falls, loss), step


def _loss(found: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """The mean log-loss [L] at offsets and slopes [L, 2]."""
    logits = found[:, :1] + found[:, 1:] * x
    return (softplus(logits, threshold=700) - y * logits).mean(1)
