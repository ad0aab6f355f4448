"""How many tokens a trip over some chains yields, known without the model.

Shapes: K columns, C label arrays.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from streamprobe.data.tokenize import Chain
from streamprobe.lags import Column, LagBuffer


class Census(NamedTuple):
    """What a trip over a split yields, known without the model."""

    tokens: int  # that are valid for some column
    valid: Tensor  # [K] int64 tokens that are valid for each column
    positive: Tensor  # [K] int64 positives among them

    def of(self, columns: Sequence[int]) -> "Census":
        """The same for some of the columns."""
        return self._replace(valid=self.valid[columns], positive=self.positive[columns])

    def less(self, other: "Census") -> "Census":
        """The same without the tokens that another one has counted."""
        return Census(self.tokens - other.tokens, self.valid - other.valid, self.positive - other.positive)


def count_tokens(chains: Sequence[Chain], columns: Sequence[Column], labels: Sequence[str]) -> Census:
    """What a trip over the chains will yield, without the model; `labels` names their C label arrays."""
    buffer = LagBuffer(columns, labels)
    tokens = 0
    valid, positive = torch.zeros(2, len(columns), dtype=torch.int64)
    for c in chains:
        pairs = buffer.push(c.ids, c.codes, c.support, last=True)
        tokens += int(pairs.valid.any(1).sum())
        valid += pairs.valid.sum(0)
        positive += pairs.targets.sum(0)
    return Census(tokens, valid, positive)
