"""Chains through the backbone to labelled token activations.

Shapes: B chains in a batch, T tokens in a chain, N tokens, L layers, K columns, D hidden size, p numbers on the side.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from streamprobe.activations.batch import TokenBatch
from streamprobe.data.tokenize import Chain
from streamprobe.errors import InputError
from streamprobe.lags import Column, LagBuffer
from streamprobe.model.blocks import decoder_layers
from streamprobe.model.chunks import frequencies_change, make_cache
from streamprobe.model.hooks import check_taken, read, tap
from streamprobe.model.places import main_device
from streamprobe.system.hardware import send


def chances(chain: Chain) -> Tensor:
    """A uniform number [T] in 0 .. 1 for every token of a chain, the same whenever and wherever it is read."""
    return torch.from_numpy(np.random.default_rng(chain.row).random(len(chain.ids), np.float32))


class LayersOfTokens(Protocol):
    """Layers that need no forward pass, such as `controls.embedding.EmbeddingLayers`."""

    before: int  # tokens that a token's row looks back on

    def rows(self, ids: Tensor, n: int) -> Tensor:
        """Activations [n, S, D] at the last n of these tokens, which begin `before` earlier, or with the chain.

        They lie where the layers do, whatever the device of `ids`.
        """
        ...


def no_features(chain: Chain) -> Tensor:
    """[T, 0], where no control asks for more."""
    return torch.empty(len(chain.ids), 0)


def make_batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Groups chains of like length, the shortest first.

    A padded batch holds at most `max_tokens` tokens; a longer chain is a batch alone.
    """
    batches: list[list[int]] = []
    for i in np.argsort(lengths, kind="stable").tolist():  # so that each one is the longest so far
        if not batches or (len(batches[-1]) + 1) * lengths[i] > max_tokens:
            batches.append([])
        batches[-1].append(i)
    return batches


def stream(
    chains: Sequence[Chain],
    backbone: nn.Module,
    layers: Sequence[int],
    columns: Sequence[Column],
    *,
    labels: Sequence[str],
    max_batch_tokens: int = 8192,
    batches: Sequence[Sequence[int]] | None = None,
    on_forward: Callable[[int, int], None] | None = None,
    embedded: LayersOfTokens | None = None,
    side: Callable[[Chain], Tensor] = no_features,
) -> Iterator[TokenBatch]:
    """One trip over `chains`: every token that is valid for some column, a batch of chains at a time.

    `labels` names the C label arrays of the chains; `batches` which of the chains are read together, and in which order
    (None: all, see `make_batches`).  After each forward pass `on_forward` is given the tokens in it and those with
    padding.  The layers of `embedded` stand behind the probed ones; `side` gives numbers of a chain's tokens [T, p].
    A chain longer than `max_batch_tokens` goes through in chunks of so many tokens: the same but for rounding, in
    float32 at most about a millionth of the largest activation.  Raises InputError for an empty stream, and for so long
    a chain if the model cannot read one in chunks.
    """
    if batches is None:
        batches = make_batches([len(chain.ids) for chain in chains], max_batch_tokens)
    blocks = decoder_layers(backbone)
    pairing = _Pairing(LagBuffer(columns, labels), embedded, side, main_device(backbone))
    with tap({layer: blocks[layer] for layer in layers}) as taken:
        for batch in _of_like_frequencies(batches, chains, backbone):
            some, asked = {i: chains[i] for i in batch}, None
            longest = max(len(chain.ids) for chain in some.values())
            cache = make_cache(backbone.config) if longest > max_batch_tokens else None
            for start in range(0, longest, max_batch_tokens):
                part = slice(start, start + max_batch_tokens)
                ids = [chain.ids[part] for chain in some.values()]
                forward(backbone, ids, cache, last=blocks[max(layers)])
                check_taken(taken, layers, len(ids), max(map(len, ids)))
                if on_forward:
                    on_forward(sum(map(len, ids)), len(ids) * max(map(len, ids)))
                asked = asked or pairing.look_up(list(some.values()))  # while the device computes
                yield from pairing.lay(asked, some, part, [taken[layer] for layer in layers])


def stream_samples(
    chains: Sequence[Chain],
    backbone: nn.Module,
    layers: Sequence[int],
    max_batch_tokens: int,
    *,
    on_forward: Callable[[int, int], None] | None = None,
) -> Iterator[TokenBatch]:
    """One trip over `chains`: every token that may be a sample, whatever its label, by length.  See `stream`."""
    every = Column("any", "token", 0)
    labelled = [replace(c, codes=torch.zeros(len(c.ids), 1, dtype=torch.int8)) for c in chains]
    options: dict[str, Any] = {"labels": [every.label], "max_batch_tokens": max_batch_tokens, "on_forward": on_forward}
    return stream(labelled, backbone, layers, [every], **options)


def _of_like_frequencies(
    batches: Sequence[Sequence[int]], chains: Sequence[Chain], backbone: Any
) -> Iterator[list[int]]:
    """The batches, each in two where some of its chains are so long that the model reads them in other frequencies.

    Raises InputError where there is none.
    """
    if not chains:
        raise InputError("an empty stream", "at least one chain", "use more chains or other shares")
    limit = frequencies_change(backbone.config)
    for batch in batches:
        parts = [i for i in batch if len(chains[i].ids) <= limit], [i for i in batch if len(chains[i].ids) > limit]
        yield from (some for some in parts if some)


def forward(backbone: Any, ids: Sequence[Tensor], cache: Any = None, last: nn.Module | None = None) -> None:
    """Runs the backbone over chains of token ids, padded on the right; the taps hold what it computed.

    `cache` (of `make_cache`) holds the keys and values of the tokens before these, and afterwards those of these too.
    Nothing behind the block `last` is computed.  Raises InputError for a model that leaves the cache empty.
    """
    padded = nn.utils.rnn.pad_sequence(list(ids), batch_first=True)  # any id does: no token sees a later one
    read(backbone, send(padded, main_device(backbone)), last=last, cache=cache)


class _Asked(NamedTuple):
    """The tokens of B chains that are valid for some column, chain by chain, with all but their activations."""

    row: Tensor  # [N] int64: which of the B chains
    token: Tensor  # [N] int64
    side: Tensor  # [N, p]
    targets: Tensor  # [N, K] bool
    valid: Tensor  # [N, K] bool
    chance: Tensor  # [N]


class _Pairing(NamedTuple):
    """How what the model computed is laid beside labels and features."""

    buffer: LagBuffer
    embedded: LayersOfTokens | None
    side: Callable[[Chain], Tensor]
    device: torch.device  # where the activations of all layers are gathered: a model may lie on several

    def look_up(self, chains: Sequence[Chain]) -> _Asked:
        """What the whole of these chains is asked."""
        found = []
        for b, chain in enumerate(chains):
            pairs = self.buffer.push(chain.ids, chain.codes, chain.support, last=True)
            at = pairs.valid.any(1).nonzero()[:, 0]
            row, token, chance = torch.full((len(at),), b), pairs.token[at], chances(chain)
            found.append(_Asked(row, token, self.side(chain)[token], pairs.targets[at], pairs.valid[at], chance[token]))
        return _Asked(*(torch.cat(every) for every in zip(*found, strict=True)))

    def lay(
        self, asked: _Asked, chains: Mapping[int, Chain], part: slice, acts: Sequence[Tensor]
    ) -> Iterator[TokenBatch]:
        """Those of the tokens, if any, that lie in a part of each of the chains, whose layers are acts [B, T, D]."""
        inside = (asked.token >= part.start) & (asked.token < part.stop)
        if not inside.any():
            return
        if not inside.all():
            asked = _Asked(*(x[inside] for x in asked))
        place = asked.token - part.start  # [N] in this part
        sources = [(layer.flatten(0, 1), asked.row * layer.shape[1] + place) for layer in acts]
        if self.embedded is not None:
            embedded = self._embed(self.embedded, list(chains.values()), part, acts[0].dtype)
            lengths = torch.tensor([len(chain.ids[part]) for chain in chains.values()])
            before = lengths.cumsum(0) - lengths  # tokens of the chains before each
            sources += [(layer, before[asked.row] + place) for layer in embedded.unbind(1)]
        numbers, folds = torch.tensor(list(chains)), torch.tensor([chain.fold for chain in chains.values()])
        taken, row, own = _gather(sources, self.device), asked.row, asked
        yield TokenBatch(
            taken, own.side, own.targets, own.valid, numbers[row], own.token, folds[row], chance=own.chance
        )

    def _embed(self, layers: LayersOfTokens, chains: Sequence[Chain], part: slice, dtype: torch.dtype) -> Tensor:
        """The embedded layers [n, S, D] at the n tokens of a part of the chains, one chain behind the other."""
        starts = max(0, part.start - layers.before)
        parts = [(chain.ids[starts : part.stop], len(chain.ids[part])) for chain in chains]
        return torch.cat([layers.rows(ids, n).to(self.device, dtype) for ids, n in parts if n])


def _gather(sources: Sequence[tuple[Tensor, Tensor]], device: torch.device) -> Tensor:
    """Rows [N] of each of L layers [n, D], together [N, L, D] on `device`."""
    (first, rows), *_ = sources
    taken = torch.empty(len(rows), len(sources), first.shape[1], dtype=first.dtype, device=device)
    for i, (layer, rows) in enumerate(sources):
        if layer.device == device:
            torch.index_select(layer, 0, send(rows, device), out=taken[:, i])
        else:
            taken[:, i] = layer[send(rows, layer.device)]
    return taken
