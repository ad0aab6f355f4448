"""What a probe reads, and where a probe stands among the others of a run."""

from collections.abc import Iterable
from typing import NamedTuple


class Site(NamedTuple):
    """What a probe reads at each token: the output of a decoder block, or the features of a control."""

    name: str
    layer: int | None = None  # the number of the block, from 0; None for what is in none
    is_control: bool = False  # whether it is read for comparison: what is known without the hidden state

    @property
    def title(self) -> str:
        """What it is called in a sentence."""
        return f"control {self.name}" if self.is_control else f"layer {self.layer}"

    def __str__(self) -> str:
        return self.name


def layer_sites(layers: Iterable[int]) -> list[Site]:
    """The sites of these decoder blocks."""
    return [Site(f"layer{layer:02d}", layer) for layer in layers]


def control_sites(names: Iterable[str]) -> list[Site]:
    """The sites of these controls."""
    return [Site(name, is_control=True) for name in names]
