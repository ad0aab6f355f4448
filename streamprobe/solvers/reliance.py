"""How far what all tokens say at zero bears on where a probe ends: the factor of a control variate.

Shapes: N tokens, L sites, K columns.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from streamprobe.activations.feed import Feed
from streamprobe.activations.store import Part
from streamprobe.probes.linear import ProbeBank
from streamprobe.system.distributed import add


class Asked(NamedTuple):
    """Probes whose factor is asked."""

    bank: ProbeBank
    feed: Feed
    positive_weight: Tensor  # [K]


def reliance(probes: Sequence[Asked], parts: Iterable[Part]) -> list[Tensor]:
    """The factors [L, K] of `NewtonSolver.anchor` that leave least variance, from one trip over this rank's tokens.

    A token of weight w adds w (s - y) x to the gradient at a probe, where s is the probability that it gives, and
    w (1/2 - y) x at zero.  The best factor of a control variate is their covariance over the variance of the second
    (Owen 2013, section 8.9): about the sum of w^2 |s - y| over that of w^2 / 2.  It is 1 for a probe that knows
    nothing, whose gradient is that at zero, and 0 for one that is always right.
    """
    sums_ = [torch.stack([torch.zeros_like(each.bank.bias, dtype=torch.float64)] * 2) for each in probes]
    for part in parts:
        for batch in part.chunks:
            for each, own_ in zip(probes, sums_, strict=True):
                features, targets, valid, _ = each.feed.of(batch)
                logits = each.bank.scores(features)  # [N, L, K]
                wrong = torch.where(targets[:, None], -logits, logits).sigmoid()
                squared = valid * torch.where(targets, each.positive_weight.to(valid.device).square(), 1.0)
                own_[0] += (squared[:, None] * wrong).sum(0)
                own_[1] += squared.sum(0)
    add(*sums_)
    return [(2 * wrong_ / all_).nan_to_num().clamp(max=1) for wrong_, all_ in sums_]
