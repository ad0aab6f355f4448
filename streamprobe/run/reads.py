"""What controls that are made by hand read of a batch.

Shapes: N tokens, P features, E width of an embedding.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from streamprobe.activations.batch import TokenBatch
from streamprobe.controls.chosen import ChosenControls
from streamprobe.controls.table import CONTROLS

Reads = Callable[[TokenBatch], Tensor]  # -> [N, 1, P] float32


def make_reads(controls: ChosenControls, n_layers: int, embedding_size: int) -> dict[str, Reads]:
    """For each control how its features are made, of batches in which layers of embeddings follow `n_layers` others.

    A control that another one extends reads the first of the features of that one, which are made once.
    """
    made: dict[str, Reads] = {}
    for name in controls.widths:
        given = [n_layers + layer for layer in controls.layers_given(name)]
        whole = made[name] = Remembered(controls, name, given, embedding_size)
        before = CONTROLS[name].extends
        if before in made:
            made[before] = _first(whole, len(given) * embedding_size + controls.widths[before])
    return made


def _first(whole: Reads, n: int) -> Reads:
    """The first n features of those that `whole` makes."""
    return lambda batch: whole(batch)[..., :n]


class Remembered:
    """Makes the features of a control, and remembers those of the last batch for the next that asks for them."""

    def __init__(self, controls: ChosenControls, name: str, layers: Sequence[int], width: int):
        """`layers`: which of the batch's stand in front; `width` E: their numbers but for zeros that fill them up."""
        self.controls, self.name, self.layers, self.width = controls, name, layers, width
        self.last: tuple[TokenBatch, Tensor] | None = None

    def __call__(self, batch: TokenBatch) -> Tensor:
        """[N, 1, P]: the layers, and behind them what is made by hand."""
        if self.last is None or self.last[0] is not batch:
            self.last = batch, self._make(batch)
        _, features = self.last
        return features[:, None]

    def _make(self, batch: TokenBatch) -> Tensor:
        by_hand = self.controls.expand(self.name, batch.side)
        if not self.layers:
            return by_hand
        start = len(self.layers) * self.width
        features = torch.empty(len(by_hand), start + by_hand.shape[1], device=by_hand.device)
        for number, layer in enumerate(self.layers):
            features[:, number * self.width : (number + 1) * self.width].copy_(batch.acts[:, layer, : self.width])
        features[:, start:].copy_(by_hand)
        return features
