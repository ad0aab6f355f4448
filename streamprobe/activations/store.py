"""Room for the activations of a split: bounded, in device memory or host RAM, shuffled if need be, and never a file.

Shapes: N tokens, L layers, K columns, D hidden size, p numbers on the side.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from streamprobe.activations.batch import TokenBatch
from streamprobe.system.hardware import send

MIXING_TOKENS = 65_536  # tokens that pass 1, or a pass that streams, mixes before it trains on any of them
CHUNK_TOKENS = 4_096  # tokens handed on at once
LEAST_TOKENS = 1_024  # fewer in the pool would not be mixed


class Sizes(NamedTuple):
    """What a token has in an ActivationMemory."""

    layers: int  # those of controls made of embeddings among them
    hidden: int
    columns: int
    side: int
    dtype: torch.dtype

    def token_bytes(self) -> int:
        """Bytes of a token: its activations and numbers on the side, targets and validity, and its place."""
        return self.layers * self.hidden * self.dtype.itemsize + 4 * self.side + 2 * self.columns + 24


class ActivationMemory:
    """Bounded room for the tokens of a split: a shuffled pass over it, and no second run of the model if it all fits.

    With `keep`, `rows` holds the whole split: the first trip fills it and later trips only read it.  Without, each trip
    runs the model again and `rows` is the pool in which tokens of many chains are mixed.
    """

    def __init__(self, rows: int, keep: bool, sizes: Sizes, device: torch.device, *, home: torch.device | None = None):
        """Tokens of these `sizes` lie on `home` (default `device`) and are handed out on `device`."""
        self.home = home or device
        self.rows, self.keep, self.device, self.filled, self.used = rows, keep, device, False, 0
        self.sizes = sizes

    @cached_property
    def pool(self) -> TokenBatch:
        """The rows, made when the first is put there: a stream that nobody shuffles needs none."""
        rows, sizes, home = self.rows, self.sizes, self.home
        return TokenBatch(
            # Layer by layer and column by column, as they are read: what a token has lies apart.
            torch.empty(sizes.layers, rows, sizes.hidden, dtype=sizes.dtype, device=home).transpose(0, 1),
            torch.empty(rows, sizes.side, device=home),
            torch.empty(sizes.columns, rows, dtype=torch.bool, device=home).T,
            torch.empty(sizes.columns, rows, dtype=torch.bool, device=home).T,
            *(torch.empty(rows, dtype=torch.int64, device=home) for _ in ("chain", "token", "fold")),
        )

    def shuffled(self, source: Callable[[], Iterable[TokenBatch]], multiple: int, seed: int) -> Iterator[TokenBatch]:
        """One pass in random order, in chunks of at most CHUNK_TOKENS, multiples of `multiple` bar the last.

        `source()` is one trip over the split; it is not called if the split is in memory.  The first pass trains on
        tokens while later ones are still on their way: whenever the pool holds MIXING_TOKENS (or all it can hold)
        untrained ones, a random half of them is handed out.
        """
        random = torch.Generator().manual_seed(seed)
        if self.filled:
            yield from self._hand_out(torch.randperm(self.used, generator=random), multiple)
            return
        window = min(self.rows, max(MIXING_TOKENS, multiple))
        free = torch.arange(self.rows)
        waiting = torch.empty(0, dtype=torch.int64)
        for batch in source():
            while len(batch.chain):
                room = min(len(batch.chain), window - len(waiting), len(free))
                assert room or len(waiting) == window, "more tokens than were counted"
                index, free = free[:room], free[room:]
                self._put(index, batch.rows(slice(room)))
                waiting, batch = torch.cat([waiting, index]), batch.rows(slice(room, None))
                if len(waiting) == window:
                    waiting = waiting[torch.randperm(window, generator=random)]
                    half = max(multiple, window // 2 // multiple * multiple)
                    yield from self._hand_out(waiting[:half], multiple)
                    free = free if self.keep else torch.cat([free, waiting[:half]])
                    waiting = waiting[half:]
        yield from self._hand_out(waiting[torch.randperm(len(waiting), generator=random)], multiple)
        self.used = self.rows - len(free)
        self.filled = self.keep

    def fill(self, source: Callable[[], Iterable[TokenBatch]]) -> None:
        """Puts the split into memory as the first `shuffled` pass over the same source would, training on nothing."""
        assert self.keep and not self.filled
        self.used = 0
        for batch in source():
            rows = slice(self.used, self.used + len(batch.chain))
            for store, new in zip(self.pool, batch.to(self.home), strict=True):
                store[rows].copy_(new)
            self.used = rows.stop
        self.filled = True

    def in_order(self, source: Callable[[], Iterable[TokenBatch]]) -> Iterator[TokenBatch]:
        """One trip in the order of the source; kept for the next one if there is room."""
        if not self.keep:
            yield from (batch.to(self.device) for batch in source())
            return
        if not self.filled:
            self.fill(source)
        for start in range(0, self.used, CHUNK_TOKENS):
            yield self.pool.rows(slice(start, min(start + CHUNK_TOKENS, self.used))).to(self.device)

    def _put(self, index: Tensor, batch: TokenBatch) -> None:
        index = send(index, self.home)
        for store, new in zip(self.pool, batch.to(self.home), strict=True):
            store.index_copy_(0, index, new.to(store.dtype))

    def _hand_out(self, index: Tensor, multiple: int) -> Iterator[TokenBatch]:
        size = max(multiple, CHUNK_TOKENS // multiple * multiple)
        for part in index.split(size) if len(index) else ():
            yield self.pool.rows(send(part, self.home)).to(self.device)
