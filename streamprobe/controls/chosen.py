"""The controls of one run, by how they are made.

Shapes: T tokens in a chain, N tokens of any chains, C labels, A labels whose sections are known, p numbers that are
stored of a token, P features.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from streamprobe.controls.table import CONTROLS
from streamprobe.data.tokenize import Chain


class ChosenControls:
    """The controls of a run, in the order of the table, by how they are made."""

    def __init__(self, names: Sequence[str], n_labels: int, n_sections: int):
        """`names` of CONTROLS, or `none`.

        C = `n_labels` labels of the data come first among a chain's codes, and it has A = `n_sections` `sections`.
        """
        chosen = {name: control for name, control in CONTROLS.items() if name in names}
        own = {name: control.embedded for name, control in chosen.items() if control.embedded}
        given = {name: layer for control in chosen.values() for name, layer in control.layers.items()}
        self.with_layers = list(own)  # the controls that are layers made of embeddings
        self.embedded = own | {name: layer for name, layer in given.items() if name not in own}  # and what others read
        self.relabelled = {name: control.relabel for name, control in chosen.items() if control.relabel}
        featured = [name for name, control in chosen.items() if control.features]
        self.n_labels = n_labels
        self._made = _functions(featured)
        self.places = _places(featured, self._widths(n_sections))  # what is stored for each control, of p numbers
        self.width = max((place.stop for place in self.places.values()), default=0)  # p
        nothing = torch.zeros(1, self.width)
        self.widths = {name: self.expand(name, nothing).shape[1] for name in featured}  # P of each control

    def features(self, chain: Chain) -> Tensor:
        """[T, p] float32: what the chain alone tells of each of its tokens, control beside control (see `places`)."""
        made = [features(chain, self.n_labels) for features in self._made.values()]
        return torch.cat([torch.empty(len(chain.ids), 0), *made], dim=1)

    def expand(self, name: str, stored: Tensor) -> Tensor:
        """The features [N, P] of the control `name` from what is stored of all of them [N, p], on the same device."""
        own, expand = stored[:, self.places[name]], CONTROLS[name].expand
        return expand(own) if expand else own

    def layers_given(self, name: str) -> list[int]:
        """Which of the layers `embedded` stand before the features of the control `name`."""
        return [list(self.embedded).index(layer) for layer in CONTROLS[name].layers]

    def _widths(self, n_sections: int) -> dict[str, int]:
        """How many numbers each function makes of a token."""
        codes, sections = (torch.zeros(1, n, dtype=torch.int8) for n in (self.n_labels, n_sections))
        token = Chain("", torch.zeros(1), codes, torch.ones(1, dtype=torch.bool), sections=sections)
        return {name: features(token, self.n_labels).shape[1] for name, features in self._made.items()}


def _functions(featured: Sequence[str]) -> dict[str, Callable[[Chain, int], Tensor]]:
    """What makes the numbers that are stored, once for controls that share them."""
    names = dict.fromkeys(part for name in featured for part in (CONTROLS[name].extends, name) if part)
    return {name: made for name in names if (made := CONTROLS[name].features)}


def _places(featured: Sequence[str], widths: dict[str, int]) -> dict[str, slice]:
    """Where what is stored for each control lies, with that of the one that it extends before its own."""
    ends = dict(zip(widths, accumulate(widths.values()), strict=True))
    starts = {name: end - widths[name] for name, end in ends.items()}
    for name in featured:
        before = CONTROLS[name].extends
        assert not before or ends[before] == starts[name], f"{name} does not come right behind {before} in the table"
    return {name: slice(starts[CONTROLS[name].extends or name], ends[name]) for name in featured}
