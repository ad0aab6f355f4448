"""Room for the activations of a split: bounded, in device memory or host RAM, shuffled if need be, and never a file.

Shapes: N tokens, L layers, K columns, D hidden size, p numbers on the side.
"""

from collections.abc import Callable, Iterator
from functools import cached_property
from itertools import accumulate, groupby
from operator import itemgetter
from typing import NamedTuple

import torch
from torch import Tensor

from streamprobe.activations.batch import TokenBatch
from streamprobe.activations.shards import Trip
from streamprobe.system.distributed import add, gather, is_own, share, world
from streamprobe.system.hardware import send

MIXING_TOKENS = 65_536  # tokens that a pass which streams mixes before it trains on any of them
CHUNK_TOKENS = 4_096  # tokens handed on at once
LEAST_TOKENS = 1_024  # fewer in the pool would not be mixed


class Part(NamedTuple):
    """Some chunks of a pass: those of a shard, or as many of a shuffled pass."""

    number: int
    chunks: Iterator[TokenBatch]  # to be taken before those of the next part

    @property
    def is_own(self) -> bool:
        """Whether this rank is to sum over its tokens, which other ranks may be given, too."""
        return is_own(self.number)


class Sizes(NamedTuple):
    """What a token has in an ActivationMemory."""

    layers: int  # those of controls made of embeddings among them
    hidden: int
    columns: int
    side: int
    dtype: torch.dtype

    def token_bytes(self) -> int:
        """Bytes of a token: its activations and numbers on the side, targets and validity, and its place."""
        return self.layers * self.hidden * self.dtype.itemsize + 4 * self.side + 2 * self.columns + 28


class ActivationMemory:
    """Bounded room for the tokens of a split: a shuffled pass over it, and no second run of the model if it all fits.

    With `keep`, `rows` holds the whole split, or this rank's shards of it: the first trip fills it and later trips only
    read it.  Without, each trip runs the model again and `rows` is the pool in which tokens of many chains are mixed.
    """

    def __init__(
        self,
        rows: int,
        keep: bool,
        sizes: Sizes,
        device: torch.device,
        *,
        home: torch.device | None = None,
        n_shards: int = 1,
        tokens: int = 0,
        every: bool = False,
    ):
        """Tokens of these `sizes` lie on `home` (default `device`) and are handed out on `device`.

        `tokens` is how many there are in a trip over all shards, about; `every`: also those that no column asks, which
        are for probes that look back.
        """
        self.home = home or device
        self.rows, self.keep, self.device, self.filled, self.used = rows, keep, device, False, 0
        self.sizes, self.tokens, self.every = sizes, tokens, every
        self.counts = torch.zeros(n_shards, dtype=torch.int64)  # tokens of each shard, once it is filled

    @cached_property
    def pool(self) -> TokenBatch:
        """The rows, made when the first is put there: a stream that nobody shuffles needs none."""
        return self._room(self.rows, self.home)

    def _room(self, rows: int, home: torch.device) -> TokenBatch:
        """Room for so many tokens."""
        sizes = self.sizes
        chain, token, fold = torch.empty(3, rows, dtype=torch.int64, device=home)
        return TokenBatch(
            # Layer by layer and column by column, as they are read: what a token has lies apart.
            torch.empty(sizes.layers, rows, sizes.hidden, dtype=sizes.dtype, device=home).transpose(0, 1),
            torch.empty(rows, sizes.side, device=home),
            torch.empty(sizes.columns, rows, dtype=torch.bool, device=home).T,
            torch.empty(sizes.columns, rows, dtype=torch.bool, device=home).T,
            chain,
            token,
            fold,
            torch.empty(rows, device=home),
        )

    def fill(self, source: Callable[[], Trip]) -> None:
        """Puts this rank's shards of the split into memory, unless they are there; `source()` is one trip over it."""
        if self.filled:
            return
        assert self.keep
        self.used = 0
        self.counts.zero_()
        for number, batches in source().own():
            for batch in batches:
                rows = slice(self.used, self.used + len(batch.chain))
                assert rows.stop <= self.rows, "more tokens than were counted"
                for store, new in zip(self.pool, batch.to(self.home), strict=True):
                    store[rows].copy_(new)
                self.used = rows.stop
                self.counts[number] += len(batch.chain)
        add(self.counts)
        self.filled = True

    def in_order(self, source: Callable[[], Trip]) -> Iterator[Part]:
        """One trip over this rank's shards, each in its order, kept for the next one if there is room: asked tokens."""
        for part in self.every_in_order(source):
            yield part._replace(chunks=map(self._asked, part.chunks))

    def every_in_order(self, source: Callable[[], Trip]) -> Iterator[Part]:
        """The same with all tokens that the source gives."""
        if not self.keep:
            for number, batches in source().own():
                yield Part(number, (batch.to(self.device) for batch in batches))
            return
        self.fill(source)
        start = 0
        for number, n in enumerate(self.counts.tolist()):
            if n and is_own(number):
                yield Part(number, self._slices(start, start + n))
                start += n

    def all_chunks(self, source: Callable[[], Trip]) -> Iterator[TokenBatch]:
        """One trip over all of this rank's tokens, whatever shard they are of."""
        for part in self.every_in_order(source):
            yield from part.chunks

    def _asked(self, batch: TokenBatch) -> TokenBatch:
        """The tokens of a batch that some column asks, where others are among them."""
        return batch.rows(batch.valid.any(1).nonzero()[:, 0]) if self.every else batch

    def _slices(self, start: int, stop: int) -> Iterator[TokenBatch]:
        """The rows from start to stop in chunks."""
        for first in range(start, stop, CHUNK_TOKENS):
            yield self.pool.rows(slice(first, min(first + CHUNK_TOKENS, stop))).to(self.device)

    def shuffled(self, source: Callable[[], Trip], multiple: int, seed: int) -> Iterator[Part]:
        """One pass over all shards in random order, the same on every rank, in as many parts as there are shards.

        Chunks have at most CHUNK_TOKENS tokens, multiples of `multiple` bar the last.
        """
        random = torch.Generator().manual_seed(seed)
        size, n_parts, tokens = _chunk_size(multiple), len(self.counts), self.tokens
        if self.keep:
            self.fill(source)
            tokens = int(self.counts.sum())
            order = torch.randperm(tokens, generator=random).split(size)
            chunks: Iterator[TokenBatch] = (self._chosen(numbers) for numbers in order if len(numbers))
        else:
            chunks = self._mixed(source(), random, multiple)
        n = max(1, -(-tokens // size))  # chunks of the pass, about
        numbered = ((min(c * n_parts // n, n_parts - 1), chunk) for c, chunk in enumerate(chunks))
        for part, own in groupby(numbered, key=itemgetter(0)):
            yield Part(part, (self._asked(chunk) for _, chunk in own))

    def _chosen(self, numbers: Tensor) -> TokenBatch:
        """The tokens of these numbers [n], from all ranks; tokens are counted shard by shard."""
        ends = self.counts.cumsum(0)
        shard = torch.searchsorted(ends, numbers, right=True)
        rank = shard % world().size
        own = [number if is_own(s) else 0 for s, number in enumerate(self.counts.tolist())]
        before = torch.tensor([0, *accumulate(own)][:-1])  # rows of this rank in front of each shard's
        ours = rank == world().rank
        rows = (numbers - ends[shard] + self.counts[shard] + before[shard])[ours]
        chosen = self.pool.rows(send(rows, self.home)).to(self.device)
        if world().size == 1:
            return chosen
        gathered = TokenBatch(*gather(chosen, rank.bincount(minlength=world().size).tolist()))
        place = rank.argsort(stable=True).argsort()  # of each of the numbers, in the order of ranks
        return gathered.rows(send(place, self.device))

    def _mixed(self, trip: Trip, random: torch.Generator, multiple: int) -> Iterator[TokenBatch]:
        """The tokens of a trip, of all ranks, mixed in the pool while later ones are still on their way.

        Whenever it holds MIXING_TOKENS (or all it can hold), a random half of them is handed out.
        """
        window, size = min(self.rows, max(MIXING_TOKENS, multiple)), _chunk_size(multiple)
        free = torch.arange(self.rows)
        waiting = torch.empty(0, dtype=torch.int64)
        for batch in self._received(trip):
            while len(batch.chain):
                room = min(len(batch.chain), window - len(waiting))
                index, free = free[:room], free[room:]
                self._put(index, batch.rows(slice(room)))
                waiting, batch = torch.cat([waiting, index]), batch.rows(slice(room, None))
                if len(waiting) == window:
                    waiting = waiting[torch.randperm(window, generator=random)]
                    half = max(multiple, window // 2 // multiple * multiple)
                    yield from self._hand_out(waiting[:half], size)
                    free, waiting = torch.cat([free, waiting[:half]]), waiting[half:]
        yield from self._hand_out(waiting[torch.randperm(len(waiting), generator=random)], size)

    def _received(self, trip: Trip) -> Iterator[TokenBatch]:
        """The batches of a trip in turn, each sent to all ranks by the one that has read it."""
        if world().size == 1:
            yield from trip.read([batch for _, batch in trip.turns()])
            return
        for source, batches in trip.in_turn():
            n = share(torch.tensor([len(batches)]), source)
            sizes = share(torch.tensor([len(batch.chain) for batch in batches] or [0] * int(n)), source)
            for number, rows in enumerate(sizes.tolist()):
                room = self._room(rows, self.device)
                if batches:
                    room = batches[number].to(self.device)
                sent = [share(tensor.contiguous(), source) for tensor in room]
                yield TokenBatch(*sent)

    def _put(self, index: Tensor, batch: TokenBatch) -> None:
        index = send(index, self.home)
        for store, new in zip(self.pool, batch.to(self.home), strict=True):
            store.index_copy_(0, index, new.to(store.dtype))

    def _hand_out(self, index: Tensor, size: int) -> Iterator[TokenBatch]:
        for part in index.split(size) if len(index) else ():
            yield self.pool.rows(send(part, self.home)).to(self.device)


def _chunk_size(multiple: int) -> int:
    """Tokens of a chunk that is a multiple of so many."""
    return max(multiple, CHUNK_TOKENS // multiple * multiple)
