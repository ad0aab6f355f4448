"""Control `position`: the token's place in the response.

Shapes: T tokens in a chain, P features.
"""

import torch
from torch import Tensor

from streamprobe.controls.piecewise_linear import hats


def position_features(n_tokens: int, start: int) -> Tensor:
    """[T, P] of a chain whose response begins at token `start`: whether t is before it, and else its place."""
    place = torch.arange(n_tokens)
    problem = (place < start).float()[:, None]
    return torch.cat([problem, hats((place - start).clamp_min(0)) * (1 - problem)], dim=1)
