"""A bounded sample of a pass's tokens for every column, the same on every rank and for every number of ranks.

What is trained by many trips over few tokens, after the passes over all of them, is trained on these.

Shapes: N tokens of a chunk, U drawn tokens, L sites, K columns, n drawn tokens of a column, D features.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from streamprobe.activations.feed import Feed
from streamprobe.activations.store import Part
from streamprobe.system.distributed import each, gather

PER_CLASS = 8_192  # tokens of each class that are drawn for a column, about
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Counts(NamedTuple):
    """How many tokens of all ranks each column has, [K] each."""

    valid: Tensor
    positive: Tensor

    def rates(self, per_class: int = PER_CLASS) -> Tensor:
        """The part of a column's negatives and of its positives that is drawn, [2, K] float32: about `per_class` each.

        1 where a class has no more.
        """
        of_class = torch.stack([self.valid - self.positive, self.positive]).clamp_min(1)
        return (per_class / of_class).clamp_max(1).float()


class ColumnSample(NamedTuple):
    """The drawn tokens of one column."""

    rows: Tensor  # [n] int64: which of the U tokens
    targets: Tensor  # [n] bool
    weight: Tensor  # [n] float32: what each counts, so that sums over them stand for sums over all tokens


class SampledTokens(NamedTuple):
    """Tokens that were drawn for some column, and which are those of each."""

    acts: Tensor  # [U, L, D] in the dtype they came in; each site's lie side by side in memory
    columns: list[ColumnSample]  # [K]

    @property
    def most(self) -> int:
        """Tokens of the column that has the most."""
        return max(len(column.rows) for column in self.columns)


class _Found(NamedTuple):
    """What was drawn from chunks, token by token."""

    acts: Tensor  # [U, L, D]
    drawn: Tensor  # [U, K] bool: for which columns
    targets: Tensor  # [U, K] bool
    part: Tensor  # [U] int64: the number of its part of the pass


def sample_tokens(
    parts: Iterable[Part], feed: Feed, rates: Tensor, *, positive_weight: Tensor, shift: float = 0.0
) -> SampledTokens:
    """Draws tokens from one trip over this rank's parts, and shares them: every rank has those of all, in their order.

    A token is drawn for a column where it is valid and (its chance + shift) mod 1 is below the rate [2, K] of its
    class (see `Counts.rates`), and then counts 1 / rate, a positive `positive_weight` [K] times as much.  All columns
    go by the same chance: what is drawn for one is mostly drawn for its neighbours, too.  Every rank holds U L D
    numbers; U is at most the sum of what the columns draw.
    """
    own = [found for part in parts for found in _draw(part, feed, rates, shift)]
    every = _of_all_ranks(own, feed)
    columns = []
    for k, (drawn, targets) in enumerate(zip(every.drawn.T, every.targets.T, strict=True)):
        rows = drawn.nonzero()[:, 0]
        positive = targets[rows]
        negative_rate, positive_rate = rates[:, k].to(rows.device)
        of_positive = positive_weight[k].to(rows.device, torch.float32) / positive_rate
        columns.append(ColumnSample(rows, positive, torch.where(positive, of_positive, 1 / negative_rate)))
    return SampledTokens(every.acts, columns)


def _draw(part: Part, feed: Feed, rates: Tensor, shift: float) -> Iterator[_Found]:
    """What is drawn of the chunks of a part."""
    for batch in part.chunks:
        features, targets, valid, extras = feed.of(batch)
        negative_rate, positive_rate = rates.to(valid.device)
        chance = (extras.chance + shift).frac()[:, None]
        drawn = valid & (chance < torch.where(targets, positive_rate, negative_rate))
        rows = drawn.any(1).nonzero()[:, 0]
        yield _Found(features[rows], drawn[rows], targets[rows], torch.full_like(rows, part.number))


def _of_all_ranks(own: list[_Found], feed: Feed) -> _Found:
    """What all ranks have drawn, part by part: a part is of one rank, whose order is kept."""
    dtype = DTYPES[max(each(max((DTYPES.index(found.acts.dtype) for found in own), default=0)))]
    asked = torch.zeros(0, len(feed.columns), dtype=torch.bool, device=feed.columns.device)
    acts = torch.empty(0, len(feed.sites), feed.n_features, dtype=dtype, device=asked.device)
    nothing = _Found(acts, asked, asked, torch.zeros(0, dtype=torch.int64, device=asked.device))
    ours = _Found(*(torch.cat(tensors) for tensors in zip(*own, strict=True))) if own else nothing
    every = _Found(*gather(ours, each(len(ours.part))))
    order = every.part.argsort(stable=True)
    acts, drawn, targets, part = every
    by_site = acts.transpose(0, 1).index_select(1, order).transpose(0, 1)
    return _Found(by_site, drawn[order], targets[order], part[order])
