"""What probes that look back in a chain need, to score tokens that arrive as a stream or a conversation brings them.

Of every chain a small state is kept between calls of a scorer.  A logit depends on no later token and no other chain:
where these are changed and calls have the same shapes, it is the same to the bit.  Where a chain is cut into other
calls, logits differ by the rounding of w . x alone, about 1e-6: libraries add the products of a row in another order
where a matrix has another number of rows.

Shapes: N tokens of a call, of R chains; L sites, K columns, D features, M numbers that run along a chain for each site.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from streamprobe.probes.base import Scorer


class Steps(NamedTuple):
    """The tokens of a call in steps: the first of every chain, then the second of each that has one, and so on.

    Chains with more tokens come first in every step, so that those of a step are the first ones of the step before.
    """

    chains: list[int]  # R numbers of chains, in the order of a step
    order: Tensor  # [N] int64: which token of the call, on its device
    sizes: list[int]  # tokens of every step
    last: Tensor  # [R] int64: where the last token of every chain stands in `order`


def first(x: Tensor, size: int) -> Tensor:
    """The first `size` of x [L, R, M], as [L, size, M]."""
    return x if x.shape[1] == size else x[:, :size]


def to_steps(chain: Tensor) -> Steps:
    """The steps of tokens whose chains are chain [N] int64, each chain's side by side."""
    chains, counts = torch.unique_consecutive(chain.cpu(), return_counts=True)
    numbers = chains.tolist()
    assert len(set(numbers)) == len(numbers), "the tokens of a chain lie side by side"
    longest_first = counts.argsort(descending=True, stable=True)
    rank = longest_first.argsort()
    place = torch.arange(len(chain)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    position = place * max(1, len(numbers)) + rank.repeat_interleave(counts)
    order = position.argsort()
    sizes = place.bincount()
    last = (sizes.cumsum(0) - sizes)[counts[longest_first] - 1] + torch.arange(len(numbers))
    return Steps([numbers[i] for i in longest_first.tolist()], order.to(chain.device), sizes.tolist(), last)


class States:
    """The numbers that a scorer keeps for each chain, between its calls."""

    def __init__(self, *starts: Tensor):
        """`starts` [...]: the numbers of a chain of which no token has come."""
        self.starts, self.rows = starts, dict[int, int]()
        self.held = [start[None].clone() for start in starts]  # each [room, ...]

    def of(self, chains: Sequence[int]) -> list[Tensor]:
        """The numbers of these chains, each [R, ...]."""
        new = [chain for chain in chains if chain not in self.rows]
        self.rows |= dict(zip(new, range(len(self.rows), len(self.rows) + len(new)), strict=True))
        room = len(self.held[0])
        if len(self.rows) > room:
            more = max(room, len(self.rows) - room)
            pairs = zip(self.held, self.starts, strict=True)
            self.held = [torch.cat([held, start.expand(more, *start.shape)]) for held, start in pairs]
        return [held[self._index(chains)] for held in self.held]

    def keep(self, chains: Sequence[int], *numbers: Tensor) -> None:
        """Takes the numbers, each [R, ...], for those of these chains."""
        for held, own in zip(self.held, numbers, strict=True):
            held[self._index(chains)] = own

    def _index(self, chains: Sequence[int]) -> Tensor:
        return torch.tensor([self.rows[c] for c in chains], dtype=torch.int64, device=self.starts[0].device)


def on_its_device(make: Callable[[torch.device], Scorer]) -> Scorer:
    """The scorer that `make` gives for the device of the first tokens that come."""
    made: list[Scorer] = []

    def logits(acts: Tensor, chain: Tensor) -> Tensor:
        if not made:
            made.append(make(acts.device))
        return made[0](acts, chain)

    return logits


def running_means(values: Tensor, shares: Tensor, sizes: Sequence[int], before: Tensor) -> Tensor:
    """Means that run along chains, [L, N, M], in steps of these sizes.

    mean_t = mean_(t-1) + shares_t (values_t - mean_(t-1)): each token moves the mean by its share of the weight so far.
    values [L, N, M] and shares, broadcastable to them, in the order of `Steps`; before [L, R, M]: the means so far.
    """
    means = torch.empty_like(values)
    steps = (x.split(list(sizes), 1) for x in (values, shares, means))
    for size, value, share, mean in zip(sizes, *steps, strict=True):
        torch.lerp(first(before, size), value, share, out=mean)
        before = mean
    return means


def to_call(scores: Tensor, order: Tensor) -> Tensor:
    """Scores [L, N, K] in the order of `Steps` as those of the call's tokens, [N, L, K], each probe's side by side."""
    found = torch.empty(scores.shape[0], scores.shape[2], scores.shape[1], device=scores.device)
    found[..., order] = scores.mT
    return found.permute(2, 0, 1)
