"""The only thing that crosses from the model to the probes.

Shapes: N tokens, L layers, K columns, D hidden size, p numbers on the side.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from streamprobe.system.hardware import send


class Extras(NamedTuple):
    """What sums over tokens may go by, beside features and labels."""

    fold: Tensor  # [N] int64
    chance: Tensor  # [N]


class TokenBatch(NamedTuple):
    """The only thing that crosses from the model to the probes."""

    acts: Tensor  # [N, L, D] in the backbone's dtype; behind the probed layers those of controls that are like them
    side: Tensor  # [N, p] float32: what features of controls are made of, known without a model
    targets: Tensor  # [N, K] bool
    valid: Tensor  # [N, K] bool
    chain: Tensor  # [N] int64: which chain of the stream
    token: Tensor  # [N] int64: which of its tokens
    fold: Tensor  # [N] int64: of its chain, see `splits.FoldPlace`; 0 in a run of one
    chance: Tensor  # [N] float32, uniform in 0 .. 1 and always the same: by which some tokens of a pass are drawn

    def rows(self, index: Tensor | slice) -> "TokenBatch":
        """The tokens at `index`."""
        return TokenBatch(*(x[index] for x in self))

    def to(self, device: torch.device) -> "TokenBatch":
        """The batch on `device`."""
        return TokenBatch(*(send(x, device) for x in self))
