"""Sorting many probes' scores at once.

Shapes: P probes, N tokens.
"""

import numpy as np
import torch
from torch import Tensor

MOST_CARRIED = 2**29  # numbers that can be told apart by the bits of a float64 that a float32 leaves at 0


def sort_rising(values: Tensor) -> Tensor:
    """The values [P, N] of each row, rising, NaN last.

    On a CPU numpy sorts, which uses its vector units: that takes a twentieth of the time of torch.
    """
    if values.device.type == "cpu":
        return torch.from_numpy(np.sort(values.numpy(), axis=-1))
    return values.sort(dim=-1).values


def sort_carrying(scores: Tensor, carried: Tensor) -> tuple[Tensor, Tensor]:
    """The scores [P, N] (float32, finite) of each row, rising, and what each had with it; carried [N] int64
    in 0 .. MOST_CARRIED - 1.

    Those of equal scores come in any order.  A score and what it carries are sorted as one number, a float64 with a
    float32 in its upper bits: half the time of sorting indices and reading both by them.
    """
    assert scores.dtype == torch.float32, "only a float32 leaves room"
    mask = MOST_CARRIED - 1
    joined = sort_rising((scores.double().view(torch.int64) | carried).view(torch.float64)).view(torch.int64)
    return (joined & ~mask).view(torch.float64).float(), joined & mask
