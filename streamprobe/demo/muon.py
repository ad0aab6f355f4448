"""Muon (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon): a step along the nearest orthogonal matrix.

Like `torch.optim.Muon`, but in float32: that one computes in bfloat16, which many CPUs only emulate.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def orthogonalise(matrices: Tensor) -> Tensor:
    """About the nearest orthogonal matrix to each of the [n, A, B]: Newton-Schulz, the quintic of the source above."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """For weight matrices; an update is as large as one of AdamW at the same learning rate (Liu et al., 2025)."""

    def __init__(self, matrices: Iterable[Tensor], lr: float = 2e-3, momentum: float = 0.95, decay: float = 0.1):
        super().__init__(matrices, {"lr": lr, "momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step for every matrix; those of the same shape are orthogonalised together.  Takes no closure."""
        assert closure is None
        for group in self.param_groups:
            for shape in sorted({tuple(p.shape) for p in group["params"]}):
                same = [p for p in group["params"] if tuple(p.shape) == shape]
                updates = []
                for p in same:
                    mean = self.state[p].setdefault("mean", torch.zeros_like(p))
                    mean.lerp_(p.grad, 1 - group["momentum"])
                    updates.append(p.grad.lerp(mean, group["momentum"]))
                for p, update in zip(same, orthogonalise(torch.stack(updates)), strict=True):
                    p.mul_(1 - group["lr"] * group["decay"])
                    p.add_(update, alpha=-group["lr"] * 0.2 * max(shape) ** 0.5)
