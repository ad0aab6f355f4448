"""Control `position`: the token's place in the response.

Shapes: T tokens in a chain, P features.
"""

import torch
from torch import Tensor

from streamprobe.controls.piecewise_linear import piecewise_linear
from streamprobe.data.tokenize import Chain


def position_features(chain: Chain, n_labels: int = 0) -> Tensor:
    """[T, P] of a chain: whether t is before the response, and else its place in that."""
    place = torch.arange(len(chain.ids))
    problem = (place < chain.start).float()[:, None]
    return torch.cat([problem, piecewise_linear((place - chain.start).clamp_min(0)) * (1 - problem)], dim=1)
