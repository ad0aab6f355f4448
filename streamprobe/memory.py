"""Room for the activations of a split: bounded, shuffled, in device memory or host RAM, and never a file.

Shapes: N tokens, L layers, K columns, D hidden size, P features on the side.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from streamprobe.errors import InputError
from streamprobe.stream import TokenBatch
from streamprobe.system.hardware import free_bytes

MIXING_TOKENS = 65_536  # tokens that pass 1, or a pass that streams, mixes before it trains on any of them
CHUNK_TOKENS = 4_096  # tokens handed on at once
LEAST_TOKENS = 1_024  # fewer in the pool would not be mixed


class Plan(NamedTuple):
    """Where the tokens of the train and validation splits lie."""

    rows: int  # tokens that the train pool holds
    keep_train: bool  # the whole train split fits: the model runs over it once
    keep_validation: bool
    home: torch.device  # where the kept tokens or the pool lie


class Reserve(NamedTuple):
    """Bytes that a run fills for a while, beside the activations that it keeps and what its solvers hold."""

    device: int = 0  # in a pass: a batch in the model, and a chunk of tokens on its way through the solvers
    host: int = 0  # after a pass: scores of all probes, or a checkpoint that is being written

    def on(self, home: torch.device, device: torch.device) -> int:
        """Those of them that lie on `home`, in a run on `device`."""
        return max(self.device * (home == device), self.host * (home.type == "cpu"))


NO_RESERVE = Reserve()


def memory_room(memory_gb: float | None, device: torch.device, reserve: int = 0) -> int:
    """Bytes that a run may fill on `device`: nine tenths of what is free less `reserve`, at most `memory_gb` 10^9."""
    room = max(0, int(0.9 * free_bytes(device)) - reserve)
    return room if memory_gb is None else int(min(memory_gb * 1e9, room))


class Sizes(NamedTuple):
    """What a token has in an ActivationMemory."""

    layers: int  # those of the surface among them
    hidden: int
    columns: int
    side: int
    dtype: torch.dtype

    def token_bytes(self) -> int:
        """Bytes of a token: its activations and features on the side, targets and validity, and its place."""
        return self.layers * self.hidden * self.dtype.itemsize + 4 * self.side + 2 * self.columns + 16

    def reserve(self, batch: tuple[int, int], intermediate: int, n_evaluated: int, n_probes: int) -> Reserve:
        """What must stay free, estimated for blocks like Llama's with fused attention.

        `batch`: tokens of the largest forward pass, with padding, and those of its longest chain; `intermediate`: width
        of the model's MLPs; `n_evaluated`: tokens of the largest split that is evaluated; `n_probes`: of all solvers.
        """
        tokens, longest = batch
        item = self.dtype.itemsize
        forward = item * tokens * (12 * self.hidden + 4 * intermediate + self.layers * self.hidden + longest)
        handed_on = 3 * item * tokens * self.layers * self.hidden  # rows, paired rows, and the batch
        trained_on = 4 * 4 * CHUNK_TOKENS * self.layers * (self.hidden + 1)  # float32, in four steps of the arithmetic
        return Reserve(forward + handed_on + trained_on, 3 * 4 * n_evaluated * n_probes)


def plan_memory(
    memory_gb: float | None,
    token_bytes: int,
    n_train: int,
    n_validation: int,
    batch_size: int,
    device: torch.device,
    taken: int = 0,
    reserve: Reserve = NO_RESERVE,
    before: tuple[int, bool, bool] | None = None,
) -> Plan:
    """Device memory first, then host RAM, if both splits fit there; else a mixing pool, in device memory if it can be.

    `memory_gb` as in `memory_room`; `taken` bytes of the device's are spoken for, and those of `reserve` stay free.
    `before`: what a run that is resumed kept, which decides the order of its tokens and so is kept again.  Raises
    InputError if there is no room for that, or not even for a pool of LEAST_TOKENS, or of one mini-batch of
    `batch_size` if that is more.
    """
    homes = dict.fromkeys((device, torch.device("cpu")))
    rooms = {home: memory_room(memory_gb, home, reserve.on(home, device)) for home in homes}
    rooms[device] = max(0, rooms[device] - taken)
    if before:
        return _as_before(before, (before[0] + n_validation * before[2]) * token_bytes, rooms)
    for home, space in rooms.items():
        if (n_train + n_validation) * token_bytes <= space:
            return Plan(n_train, True, True, home)
    least = max(LEAST_TOKENS, batch_size)
    for home, space in rooms.items():
        for keep_validation in (n_validation * token_bytes <= space / 2, False):
            rows = space // token_bytes - n_validation * keep_validation
            if rows >= least:
                return Plan(min(rows, max(MIXING_TOKENS, batch_size), n_train), False, keep_validation, home)
    raise InputError(
        f"{max(rooms.values()) / 1e6:,.2f} MB for activations"
        + (f" beside {taken / 1e6:,.2f} MB for Newton's matrices" if taken else ""),
        f"at least {least * token_bytes / 1e6:,.2f} MB, to mix {least:,} tokens in",
        "raise --memory_gb, free memory, or probe fewer layers",
    )


def _as_before(before: tuple[int, bool, bool], needed: int, rooms: Mapping[torch.device, int]) -> Plan:
    """The plan of the run that is resumed, in whichever memory has room for it."""
    home = next((home for home, space in rooms.items() if needed <= space), None)
    if home is None:
        raise InputError(
            f"{max(rooms.values()) / 1e6:,.2f} MB for activations",
            f"{needed / 1e6:,.2f} MB for {before[0]:,} training tokens, as when the run began",
            "raise --memory_gb, free memory, or start a new run",
        )
    return Plan(*before, home)


class ActivationMemory:
    """Bounded room for the tokens of a split: a shuffled pass over it, and no second run of the model if it all fits.

    With `keep`, `rows` holds the whole split: the first trip fills it and later trips only read it.  Without, each trip
    runs the model again and `rows` is the pool in which tokens of many chains are mixed.
    """

    def __init__(self, rows: int, keep: bool, sizes: Sizes, device: torch.device, home: torch.device | None = None):
        """Tokens of these `sizes` lie on `home` (default `device`) and are handed out on `device`."""
        self.home = home or device
        self.rows, self.keep, self.device, self.filled, self.used = rows, keep, device, False, 0
        self.pool = TokenBatch(
            torch.empty(rows, sizes.layers, sizes.hidden, dtype=sizes.dtype, device=self.home),
            torch.empty(rows, sizes.side, device=self.home),
            torch.empty(rows, sizes.columns, dtype=torch.bool, device=self.home),
            torch.empty(rows, sizes.columns, dtype=torch.bool, device=self.home),
            torch.empty(rows, dtype=torch.int64, device=self.home),
            torch.empty(rows, dtype=torch.int64, device=self.home),
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
            self._put(torch.arange(self.used, self.used + len(batch.chain)), batch)
            self.used += len(batch.chain)
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
        for store, new in zip(self.pool, batch, strict=True):
            store.index_copy_(0, index.to(store.device), new.to(store))

    def _hand_out(self, index: Tensor, multiple: int) -> Iterator[TokenBatch]:
        size = max(multiple, CHUNK_TOKENS // multiple * multiple)
        for part in index.split(size) if len(index) else ():
            yield self.pool.rows(part.to(self.home)).to(self.device)
