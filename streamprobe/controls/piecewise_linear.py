"""A number as features of which any piecewise linear function is a weighted sum.

Shapes: N tokens.
"""

import torch
from torch import Tensor

KNOTS = torch.tensor([0, 1, *(n << k for k in range(13) for n in (2, 3))]).float()  # 0, 1, 2, 3, 4, 6, 8, 12, ...


def piecewise_linear(x: Tensor) -> Tensor:
    """x [N] >= 0 -> [N, len(KNOTS)]: how near it is to the knots on both sides, which add up to 1.

    A weighted sum of them is piecewise linear between the knots (hat functions, the basis of linear splines).  The
    knots grow in steps of a half or a third; all beyond the last one is one.
    """
    x = x.float().clamp(max=float(KNOTS[-1]))
    after = torch.searchsorted(KNOTS, x).clamp_min(1)
    low, high = KNOTS[after - 1], KNOTS[after]
    above = ((x - low) / (high - low))[:, None]
    empty = torch.zeros(len(x), len(KNOTS))
    return empty.scatter(1, after[:, None], above).scatter(1, after[:, None] - 1, 1 - above)
