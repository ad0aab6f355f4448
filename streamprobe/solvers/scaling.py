"""The scaling of features, and what an affine map of them makes of sums over tokens.

Shapes: N tokens, L layers, D hidden size, E = D + 1: features with a one behind them.
"""

import torch
from torch import Tensor


def first_scaling(acts: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [L, D] of acts [N, L, D] in float32; 1 where a feature is constant."""
    x = acts.cpu() if acts.device.type == "mps" else acts  # which has no float64
    parts = [torch.std_mean(own.double(), 0, correction=0) for own in x.unbind(1)]
    std, mean = (torch.stack(own) for own in zip(*parts, strict=True))
    return mean.float().to(acts.device), torch.where(std > 0, std, 1.0).float().to(acts.device)


def mapped_vector(vector: Tensor, d: Tensor, c: Tensor) -> Tensor:
    """A sum of r [x, 1] over tokens -> the sum of r [d x + c, 1]: vector [..., E], d and c [..., D]."""
    return torch.cat([d * vector[..., :-1] + c * vector[..., -1:], vector[..., -1:]], dim=-1)


def mapped(gram: Tensor, d: Tensor, c: Tensor) -> Tensor:
    """The same of a sum of r [x, 1] [x, 1]^T: gram [..., E, E], d and c [..., D]."""
    for _ in range(2):  # columns, then rows
        gram = mapped_vector(gram, d[..., None, :], c[..., None, :]).mT
    return gram
