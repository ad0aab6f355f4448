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


def shifted(gram: Tensor, c: Tensor) -> Tensor:
    """A sum of r [x, 1] [x, 1]^T over tokens -> the sum of r [x + c, 1] [x + c, 1]^T: gram [E, E], c [D]."""
    by = torch.cat([c, torch.zeros_like(c[:1])])
    sums = gram[:, -1] + by * (gram[-1, -1] / 2)
    return torch.addmm(gram, torch.stack([by, sums], 1), torch.stack([sums, by]))
