"""Chains through the backbone to shuffled, labelled token activations, in bounded memory and never in a file.

Shapes: B chains in a batch, T tokens in a chain, N tokens, L layers, K columns, D hidden size.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch
from torch import Tensor, nn

from streamprobe.backbone import decoder_layers, make_cache
from streamprobe.chains import Chain
from streamprobe.errors import InputError
from streamprobe.hooks import tap
from streamprobe.lags import Column, LagBuffer

MIXING_TOKENS = 65_536  # tokens that pass 1, or a pass that streams, mixes before it trains on any of them
CHUNK_TOKENS = 4_096  # tokens handed on at once
LEAST_TOKENS = 1_024  # fewer in the pool would not be mixed


class TokenBatch(NamedTuple):
    """The only thing that crosses from the model to the probes."""

    acts: Tensor  # [N, L, D] in the backbone's dtype
    targets: Tensor  # [N, K] bool
    valid: Tensor  # [N, K] bool
    chain: Tensor  # [N] int64: which chain of the stream

    def rows(self, index: Tensor | slice) -> "TokenBatch":
        """The tokens at `index`."""
        return TokenBatch(*(x[index] for x in self))

    def to(self, device: torch.device) -> "TokenBatch":
        """The batch on `device`."""
        return TokenBatch(*(x.to(device, non_blocking=True) for x in self))


def make_batches(lengths: Sequence[int], max_tokens: int, seed: int | None) -> list[list[int]]:
    """Groups chains of like length: a padded batch holds at most `max_tokens` tokens; a longer chain is a batch alone.

    With a seed, lengths are jittered by up to 2% and the batches shuffled, so that each pass has its own batches in
    its own order; without, the order is by length.
    """
    rng = np.random.default_rng(seed)
    jitter = 1 + 0.02 * rng.random(len(lengths)) if seed is not None else np.ones(len(lengths))
    batches: list[list[int]] = []
    longest = 0
    for i in np.argsort(np.asarray(lengths) * jitter, kind="stable").tolist():
        longest = max(longest, lengths[i]) if batches else lengths[i]
        if not batches or (len(batches[-1]) + 1) * longest > max_tokens:
            batches.append([])
            longest = lengths[i]
        batches[-1].append(i)
    return [batches[i] for i in rng.permutation(len(batches))] if seed is not None else batches


def stream(
    chains: Sequence[Chain],
    backbone: nn.Module,
    layers: Sequence[int],
    columns: Sequence[Column],
    labels: Sequence[str],
    max_batch_tokens: int = 8192,
    seed: int | None = None,
    on_forward: Callable[[int, int], None] = lambda tokens, padded: None,
) -> Iterator[TokenBatch]:
    """One trip over `chains`: every token that is valid for some column, a batch of chains at a time.

    `labels` names the C label arrays of the chains; `seed` orders the batches (None: by length).  After each forward
    pass `on_forward` is told the tokens in it and those with padding.  Chains are padded on the right, where causal
    attention makes padding invisible, and the mask says so as well.

    A chain longer than `max_batch_tokens` goes through in chunks of so many tokens, each a batch of its own, so that
    it takes no more memory than others do, bar its keys and values.  What it yields is the same for every size of the
    chunks, but for rounding in the activations: in float32 at most about a millionth of their largest number.

    Raises InputError for an empty stream, and for so long a chain if the model cannot read one in chunks.
    """
    if not chains:
        raise InputError("an empty stream", "at least one chain", "use more chains or other shares")
    blocks = decoder_layers(backbone)
    buffer = LagBuffer(columns, labels)
    lengths = [len(c.ids) for c in chains]
    with tap({layer: blocks[layer] for layer in layers}) as taken:
        for batch in make_batches(lengths, max_batch_tokens, seed):
            longest = max(lengths[i] for i in batch)
            cache = make_cache(backbone.config) if longest > max_batch_tokens else None
            for start in range(0, longest, max_batch_tokens):
                part = slice(start, start + max_batch_tokens)
                ids = [chains[i].ids[part] for i in batch]
                forward(backbone, ids, cache)
                on_forward(sum(map(len, ids)), len(ids) * max(map(len, ids)))
                yield _label(chains, batch, part, [taken[layer] for layer in layers], buffer)


@torch.no_grad()
def forward(backbone: nn.Module, ids: Sequence[Tensor], cache: Any = None) -> None:
    """Runs the backbone over chains of token ids, padded on the right; the taps hold what it computed.

    `cache` (of `make_cache`) holds the keys and values of the tokens before these, and afterwards those of these too.
    """
    device: torch.device = backbone.device  # type: ignore[assignment]
    before = 0 if cache is None else cache.get_seq_length()
    lengths = torch.tensor([len(x) for x in ids])
    padded = nn.utils.rnn.pad_sequence(list(ids), batch_first=True)  # any id does: the mask hides it
    mask = torch.arange(before + padded.shape[1]) < before + lengths[:, None]
    caching = {"use_cache": False} if cache is None else {"use_cache": True, "past_key_values": cache}
    backbone(input_ids=send(padded, device), attention_mask=send(mask.long(), device), **caching)  # type: ignore[operator]
    assert cache is None or cache.get_seq_length() == mask.shape[1], "a model that leaves its cache empty"


def send(x: Tensor, device: torch.device) -> Tensor:
    """x on `device`, by a copy that the host does not wait for."""
    return (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True)


def _label(
    chains: Sequence[Chain], index: Sequence[int], part: slice, acts: Sequence[Tensor], buffer: LagBuffer
) -> TokenBatch:
    """Activations [B, T, D] of each layer for a part of the chains at `index` -> the valid tokens, in order."""
    device = acts[0].device
    paired = []
    for b, i in enumerate(index):
        codes, support = chains[i].codes[part], chains[i].support[part]
        rows = torch.stack([a[b, : len(codes)].to(device) for a in acts], dim=1)  # [T, L, D]
        paired.append(buffer.push(rows, codes, support, last=part.stop >= len(chains[i].ids)))
    some = [pairs.valid.any(1).nonzero()[:, 0] for pairs in paired]
    # From here on the host waits for the device, which has been computing while the labels were looked up.
    return TokenBatch(
        torch.cat([pairs.acts.index_select(0, send(at, device)) for pairs, at in zip(paired, some, strict=True)]),
        torch.cat([pairs.targets[at] for pairs, at in zip(paired, some, strict=True)]),
        torch.cat([pairs.valid[at] for pairs, at in zip(paired, some, strict=True)]),
        torch.cat([torch.full((len(at),), i) for i, at in zip(index, some, strict=True)]),
    )


def count_tokens(
    chains: Sequence[Chain], columns: Sequence[Column], labels: Sequence[str]
) -> tuple[int, Tensor, Tensor]:
    """What `stream` will yield, without the model: its tokens, and valid tokens and positives of each column [K]."""
    buffer = LagBuffer(columns, labels)
    tokens, valid, positive = (
        0,
        torch.zeros(len(columns), dtype=torch.int64),
        torch.zeros(len(columns), dtype=torch.int64),
    )
    for c in chains:
        pairs = buffer.push(c.ids, c.codes, c.support, last=True)
        tokens += int(pairs.valid.any(1).sum())
        valid += pairs.valid.sum(0)
        positive += pairs.targets.sum(0)
    return tokens, valid, positive


class Plan(NamedTuple):
    """Where the tokens of the train and validation splits lie."""

    rows: int  # tokens that the train pool holds
    keep_train: bool  # the whole train split fits: the model runs over it once
    keep_validation: bool
    home: torch.device  # where the kept tokens or the pool lie


def free_bytes(device: torch.device) -> int:
    """Memory of `device` that is free."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def memory_room(memory_gb: float | None, device: torch.device) -> int:
    """Bytes that a run may fill on `device`: `memory_gb` 10^9 bytes, or what is free less 3 GiB and a tenth."""
    free = free_bytes(device)
    return max(0, int(0.9 * free) - 3 * 2**30) if memory_gb is None else int(min(memory_gb * 1e9, free))


def token_bytes(n_layers: int, hidden_size: int, n_columns: int, dtype: torch.dtype) -> int:
    """What a token takes in an ActivationMemory: its activations, targets and validity, and its chain."""
    return n_layers * hidden_size * dtype.itemsize + 2 * n_columns + 8


def plan_memory(
    memory_gb: float | None,
    token_bytes: int,
    n_train: int,
    n_validation: int,
    batch_size: int,
    device: torch.device,
    taken: int = 0,
) -> Plan:
    """Device memory first, then host RAM, if both splits fit there; else a mixing pool, in device memory if it can be.

    `memory_gb` as in `memory_room`; `taken` bytes of the device's are spoken for.  Raises InputError if there is not
    even room for a pool of LEAST_TOKENS, or of one mini-batch of `batch_size` if that is more.
    """
    rooms = {device: max(0, memory_room(memory_gb, device) - taken)}
    if device.type != "cpu":
        rooms[torch.device("cpu")] = memory_room(memory_gb, torch.device("cpu"))
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


class ActivationMemory:
    """Bounded room for the tokens of a split: a shuffled pass over it, and no second run of the model if it all fits.

    With `keep`, `rows` holds the whole split: the first trip fills it and later trips only read it.  Without, each trip
    runs the model again and `rows` is the pool in which tokens of many chains are mixed.
    """

    def __init__(
        self,
        rows: int,
        keep: bool,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        device: torch.device,
        home: torch.device | None = None,
    ):
        """`shape` is (L, D, K); tokens lie on `home` (default `device`) in `dtype` and are handed out on `device`."""
        self.home = home or device
        self.rows, self.keep, self.device, self.filled, self.used = rows, keep, device, False, 0
        n_layers, hidden_size, n_columns = shape
        self.pool = TokenBatch(
            torch.empty(rows, n_layers, hidden_size, dtype=dtype, device=self.home),
            torch.empty(rows, n_columns, dtype=torch.bool, device=self.home),
            torch.empty(rows, n_columns, dtype=torch.bool, device=self.home),
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
