"""What a probe reads, and where a probe stands among the others of a run: also those kinds that are no choice."""

from collections.abc import Iterable
from typing import Any, NamedTuple

RESID_POST = "resid_post"  # the output of a block: what is probed unless something else is asked for
LINEAR = "linear"  # the kind of probe that every run trains
MIXED = "mixed"  # the kind of those that say what another one adds to the joint control


class Site(NamedTuple):
    """What a probe reads at each token: the output of a decoder block, or the features of a control."""

    name: str
    layer: int | None = None  # the number of the block, from 0; None for what is in none, or in several
    is_control: bool = False  # whether it is read for comparison: what is known without the hidden state
    point: str = RESID_POST  # where in the block

    @property
    def title(self) -> str:
        """What it is called in a sentence."""
        if self.is_control:
            return f"control {self.name}"
        if self.layer is None:
            return "all layers"
        return f"layer {self.layer}" if self.point == RESID_POST else f"{self.point} of layer {self.layer}"

    def __str__(self) -> str:
        return self.name


ALL_LAYERS = Site("layers")  # of a probe that reads every layer of its run


def layer_sites(layers: Iterable[int]) -> list[Site]:
    """The sites of these decoder blocks."""
    return [Site(f"layer{layer:02d}", layer) for layer in layers]


def mean_sites(layers: Iterable[Site], half_life: int) -> list[Site]:
    """The running means of these layers, as they are called while a run trains on them."""
    return [site._replace(name=f"ema{half_life} {site.name}") for site in layers]


def checked_site(*given: Any) -> Site:
    """A site as a file holds it.  Raises TypeError for what is none."""
    site = Site(*given)
    words = isinstance(site.name, str) and isinstance(site.point, str)
    if not (words and isinstance(site.is_control, bool) and isinstance(site.layer, int | None)):
        raise TypeError(f"site {given}")
    return site


def control_sites(names: Iterable[str]) -> list[Site]:
    """The sites of these controls."""
    return [Site(name, is_control=True) for name in names]
