"""Control `position`: the token's place in the response.

Shapes: T tokens in a chain, N tokens of any chains, P features.
"""

import torch
from torch import Tensor

from streamprobe.controls.piecewise_linear import known_or_not
from streamprobe.data.tokenize import Chain


def position_features(chain: Chain, n_labels: int = 0) -> Tensor:
    """[T, 1] of a chain: the token's place in the response, negative before that."""
    return (torch.arange(len(chain.ids)) - chain.start).float()[:, None]


def expand_position(stored: Tensor) -> Tensor:
    """[N, 1] -> [N, P]: whether a token is before the response, and else its place in that."""
    return known_or_not(stored[:, 0])
