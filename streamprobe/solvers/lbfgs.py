"""L-BFGS for many problems at once: Newton's step, from a matrix of before and the last steps.

Shapes: L layers, K columns, E weights of a probe.  Pairs [2, PAIRS, L, K, E] are the last steps and the changes of the
gradient over them, newest first; zeros where there is none.
"""

from collections.abc import Callable

import torch
from torch import Tensor

PAIRS = 5  # that are remembered


def vector_bytes(n_layers: int, n_columns: int, hidden_size: int) -> int:
    """What a NewtonSolver takes beside the matrices."""
    return n_layers * n_columns * (hidden_size + 1) * 8 * (4 + 2 * PAIRS)


def remember(pairs: Tensor, step: Tensor, change: Tensor, *, where: Tensor) -> Tensor:
    """The pairs with a new one of step and change [L, K, E], `where` [L, K] asks for it and the objective bends up."""
    where = where & ((step * change).sum(-1) > 0)
    new = torch.cat([torch.stack([step, change])[:, None], pairs[:, :-1]], dim=1)
    return new.where(where[..., None], pairs)


def newton_step(pairs: Tensor, gradient: Tensor, solve: Callable[[Tensor], Tensor]) -> Tensor:
    """What comes near the Newton step H^-1 g for gradient g [L, K, E]; `solve` where there are no pairs.

    `solve` gives M^-1 g for a matrix M like H (Nocedal & Wright 2006, algorithm 7.4).
    """
    steps, changes = pairs
    bend = (steps * changes).sum(-1)  # [PAIRS, L, K]
    rho = torch.where(bend > 0, 1 / bend, 0.0)[..., None]
    q, alphas = gradient, []
    for s, y, r in zip(steps, changes, rho, strict=True):
        alphas.append(r * (s * q).sum(-1, keepdim=True))
        q = q - alphas[-1] * y
    q = solve(q)
    for s, y, r, alpha in reversed(list(zip(steps, changes, rho, alphas, strict=True))):
        q = q + s * (alpha - r * (y * q).sum(-1, keepdim=True))
    return q


def step_back(step: Tensor, gradient: Tensor, risen: Tensor) -> Tensor:
    """A part of steps [L, K, E] by which J [L, K] has risen from points with these gradients.

    It ends in the minimum of the parabola through both values of J and the slope at the point: a tenth to a half.
    """
    slope = (step * gradient).sum(-1)
    fraction = -slope / (2 * (risen - slope))
    return fraction.nan_to_num(0.5).clamp(0.1, 0.5)[..., None] * step
