"""A number as features of which any piecewise linear function is a weighted sum.

Shapes: N tokens; `...` any others.
"""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

KNOTS = torch.tensor([0, 1, *(n << k for k in range(13) for n in (2, 3))]).float()  # 0, 1, 2, 3, 4, 6, 8, 12, ...
LAST = float(KNOTS[-1])


def piecewise_linear(x: Tensor) -> Tensor:
    """x [...] >= 0 -> [..., len(KNOTS)]: how near it is to the knots on both sides, which add up to 1.

    A weighted sum of them is piecewise linear between the knots (hat functions, the basis of linear splines).  The
    knots grow in steps of a half or a third; all beyond the last one is one.  The host waits for no device.
    """
    near = nearest_knots(x)
    empty = torch.zeros(*x.shape, len(KNOTS), device=x.device)
    return empty.scatter_(-1, near.knots, near.shares)


class Near(NamedTuple):
    """The two knots beside a number, and how near it is to each."""

    knots: Tensor  # [..., 2] int64
    shares: Tensor  # [..., 2] float32, which add up to 1


def nearest_knots(x: Tensor) -> Near:
    """The knots below and above each x [...] >= 0, of any float or integer dtype."""
    knots = _knots_on(x.device)
    x = x.float().clamp(max=LAST).contiguous()
    after = torch.searchsorted(knots, x).clamp_min(1)
    low, high = knots[after - 1], knots[after]
    above = (x - low) / (high - low)
    return Near(torch.stack([after - 1, after], dim=-1), torch.stack([1 - above, above], dim=-1))


def known_or_not(x: Tensor) -> Tensor:
    """x [N], negative where there is no number -> [N, 1 + len(KNOTS)]: whether there is none, and else the number."""
    missing = (x < 0).float()[:, None]
    return torch.cat([missing, piecewise_linear(x.clamp_min(0)) * (1 - missing)], dim=1)


@cache
def _knots_on(device: torch.device) -> Tensor:
    """The knots on a device, brought there once: that copy the host waits for."""
    return KNOTS.to(device)
