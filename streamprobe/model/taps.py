"""How the places that are read lie in a loaded model."""

from collections.abc import Iterable
from typing import NamedTuple

from torch import nn

from streamprobe.model.blocks import decoder_layers
from streamprobe.model.points import Place


class Hook(NamedTuple):
    """How a place is read: at which module, and times what."""

    module: nn.Module
    before: bool = False  # what is given to the module, and not what it returns
    factor: float = 1.0  # by which a block multiplies what is read before it adds it to the residual stream
    is_block: bool = False  # whether it is what a block returns, which nothing changes any more


class Taps(NamedTuple):
    """The places that are read in a model, how each is, and the block behind which nothing is."""

    hooks: dict[Place, Hook]
    last: nn.Module


def taps_of_layers(model: nn.Module, layers: Iterable[int]) -> Taps:
    """The outputs of these blocks."""
    blocks, numbers = decoder_layers(model), list(layers)
    return Taps({Place(i): Hook(blocks[i], is_block=True) for i in numbers}, blocks[max(numbers)])
