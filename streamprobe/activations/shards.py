"""The chains of a split in shards, of which each process of a run works on some: all that decides a batch lies in one.

Shapes: S shards.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

import numpy as np

from streamprobe.activations.batch import TokenBatch
from streamprobe.activations.stream import make_batches
from streamprobe.system.distributed import is_own, owner

Shard = list[list[int]]  # batches of the numbers of chains that are read together


def deal(lengths: Sequence[int], n_shards: int, max_tokens: int) -> list[Shard]:
    """The chains of a split, by their lengths, in S shards of about as many tokens: [S] of batches for `stream`.

    Batches are of chains of like length, as full as lets each shard have as many, and are dealt out in turn.  A padded
    batch holds at most `max_tokens` tokens; a longer chain is a batch alone.
    """
    whole = make_batches(lengths, max_tokens)
    n = -(-len(whole) // n_shards) * n_shards
    padded = sum(len(batch) * max(lengths[i] for i in batch) for batch in whole)
    most, batches = max(1, padded // max(1, n)), whole
    while most < max_tokens:
        smaller = make_batches(lengths, most)
        if len(smaller) <= n:
            batches = smaller
            break
        most = most + most // 50 + 1
    return [batches[shard::n_shards] for shard in range(n_shards)]


class Trip:
    """One pass over the chains of a split: shard by shard, or the batches of all of them in turn."""

    def __init__(
        self,
        shards: Sequence[Shard],
        read: Callable[[Sequence[Sequence[int]]], Iterator[TokenBatch]],
        seed: int | None = None,
    ):
        """`read` gives the tokens of batches of chains; `seed` orders the batches of every shard (None: as dealt)."""
        self.shards, self.read = [list(shard) for shard in shards], read
        if seed is not None:
            orders = [np.random.default_rng([seed, s]).permutation(len(shard)) for s, shard in enumerate(shards)]
            self.shards = [[shard[i] for i in order] for shard, order in zip(shards, orders, strict=True)]

    def own(self) -> Iterator[tuple[int, Iterator[TokenBatch]]]:
        """The shards of this rank by number, each with its tokens, which are to be taken before the next one's."""
        for number, shard in enumerate(self.shards):
            if is_own(number):
                yield number, self.read(shard)

    def turns(self) -> list[tuple[int, list[int]]]:
        """The first batch of every shard, then the second ones, and so on, each with the number of its shard."""
        longest = max(map(len, self.shards))
        return [(s, shard[j]) for j in range(longest) for s, shard in enumerate(self.shards) if j < len(shard)]

    def in_turn(self) -> Iterator[tuple[int, list[TokenBatch]]]:
        """The batches of the trip in turn, each by the rank that reads it: with its tokens on that one, else none.

        A rank has read its next one before it learns of those of others, so that all read at once.
        """
        turns = self.turns()
        own = self._by_turn([batch for s, batch in turns if is_own(s)])
        ready = next(own, [])
        for s, _ in turns:
            if is_own(s):
                yield owner(s), ready
                ready = next(own, [])
            else:
                yield owner(s), []

    def _by_turn(self, batches: Sequence[Sequence[int]]) -> Iterator[list[TokenBatch]]:
        """The tokens of each batch of chains: several batches of them where it is read in parts, or none."""
        turn_of = {chain: turn for turn, batch in enumerate(batches) for chain in batch}
        read = groupby(self.read(batches), key=lambda tokens: turn_of[int(tokens.chain[0])])
        found = next(read, None)
        for turn in range(len(batches)):
            if found and found[0] == turn:
                yield list(found[1])
                found = next(read, None)
            else:
                yield []
