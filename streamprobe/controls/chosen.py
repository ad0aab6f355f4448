"""The controls of one run, by how they are made.

Shapes: T tokens in a chain, C labels, P features.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from streamprobe.controls.table import CONTROLS
from streamprobe.data.tokenize import Chain


class ChosenControls:
    """The controls of a run, in the order of the table, by how they are made."""

    def __init__(self, names: Sequence[str], n_labels: int):
        """`names` of CONTROLS, or `none`; C = `n_labels` labels of the data come first among a chain's codes."""
        chosen = {name: control for name, control in CONTROLS.items() if name in names}
        self.embedded = {name: control.embedded for name, control in chosen.items() if control.embedded}
        self.relabelled = {name: control.relabel for name, control in chosen.items() if control.relabel}
        self.featured = {name: control.features for name, control in chosen.items() if control.features}
        self.n_labels = n_labels
        token = Chain("", torch.zeros(1), torch.zeros(1, n_labels, dtype=torch.int8), torch.ones(1, dtype=torch.bool))
        widths = [part.shape[1] for part in self._parts(token)]
        ends = np.cumsum([0, *widths]).tolist()
        self.places = {name: slice(a, b) for name, a, b in zip(self.featured, ends, ends[1:], strict=False)}
        self.width = ends[-1]  # P

    def features(self, chain: Chain) -> Tensor:
        """[T, P] float32: what the chain alone tells of each of its tokens, control beside control (see `places`)."""
        return torch.cat([torch.empty(len(chain.ids), 0), *self._parts(chain)], dim=1)

    def _parts(self, chain: Chain) -> list[Tensor]:
        return [features(chain, self.n_labels) for features in self.featured.values()]
