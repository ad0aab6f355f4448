"""Chains through the backbone to labelled token activations.

Shapes: B chains in a batch, T tokens in a chain, N tokens, L layers or other places, K columns, D hidden size (of
several places: the width of the widest), p numbers on the side.
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
from streamprobe.model.chunks import frequencies_change, make_cache
from streamprobe.model.hooks import check_taken, read, tap
from streamprobe.model.places import main_device
from streamprobe.model.points import Place
from streamprobe.model.taps import Taps, taps_of_layers
from streamprobe.probes.ema import MeanState, running_mean
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
    layers: Sequence[int] | Taps,
    columns: Sequence[Column],
    *,
    labels: Sequence[str],
    max_batch_tokens: int = 8192,
    batches: Sequence[Sequence[int]] | None = None,
    on_forward: Callable[[int, int], None] | None = None,
    embedded: LayersOfTokens | None = None,
    side: Callable[[Chain], Tensor] = no_features,
    half_lives: Sequence[int] = (),
    every: bool = False,
) -> Iterator[TokenBatch]:
    """One trip over `chains`, by batches: every token that a column asks, or with `every` each that may be a sample.

    `layers` are blocks, or other places, of which narrower ones end in zeros; `labels` names the C label arrays of the
    chains; `batches` which are read together, and in which order (None: all, see `make_batches`).  `on_forward` is
    given the tokens of each forward pass, and those with padding.  Behind the places stand, for each of `half_lives`
    (in tokens), their running means (see `probes.ema`), and then the layers of `embedded`; `side` gives numbers of a
    chain's tokens [T, p].  A chain longer than `max_batch_tokens` goes through in chunks of so many tokens: the same
    but for rounding, in float32 at most about a millionth of the largest activation.  Raises InputError for an empty
    stream, and for so long a chain if the model cannot read one in chunks.
    """
    if batches is None:
        batches = make_batches([len(chain.ids) for chain in chains], max_batch_tokens)
    pairing = _Pairing(LagBuffer(columns, labels), embedded, side, main_device(backbone), every=every)
    taps = layers if isinstance(layers, Taps) else taps_of_layers(backbone, layers)
    with tap(taps.hooks) as taken:
        for batch in _of_like_frequencies(batches, chains, backbone):
            some, asked = {i: chains[i] for i in batch}, None
            means = RunningMeans(half_lives, list(some.values()))
            for part, acts in _read_parts(
                backbone, list(some.values()), taps, taken, most=max_batch_tokens, on_forward=on_forward
            ):
                asked = asked or pairing.look_up(list(some.values()))  # while the device computes
                yield from pairing.lay(asked, some, part, [*acts, *means.of(acts, part)])


def _read_parts(
    backbone: Any,
    chains: Sequence[Chain],
    taps: Taps,
    taken: Mapping[Place, Tensor],
    *,
    most: int,
    on_forward: Callable[[int, int], None] | None,
) -> Iterator[tuple[slice, list[Tensor]]]:
    """Runs the backbone over B chains, at most so many tokens of each at once: which they are, and each place's acts.

    `taken` is what `tap` yields, acts are [B, T, W].
    """
    longest = max(len(chain.ids) for chain in chains)
    cache = make_cache(backbone.config) if longest > most else None
    for start in range(0, longest, most):
        part = slice(start, start + most)
        ids = [chain.ids[part] for chain in chains]
        forward(backbone, ids, cache, last=taps.last)
        acts = check_taken(taken, taps.hooks, len(ids), max(map(len, ids)))
        if on_forward:
            on_forward(sum(map(len, ids)), len(ids) * max(map(len, ids)))
        yield part, acts


def stream_samples(
    chains: Sequence[Chain],
    backbone: nn.Module,
    layers: Sequence[int] | Taps,
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


class RunningMeans:
    """The running means of L layers, or other places, of B chains, part by part of them."""

    def __init__(self, half_lives: Sequence[int], chains: Sequence[Chain]):
        """One for each of `half_lives`, in tokens that may be samples."""
        self.half_lives = half_lives
        self.support = nn.utils.rnn.pad_sequence([chain.support for chain in chains], batch_first=True)  # [B, T]
        self.states: dict[tuple[int, int], MeanState] = {}  # by half-life and layer

    def of(self, layers: Sequence[Tensor], part: slice) -> list[Tensor]:
        """The means of layers [B, T, D] at a part of each chain, in their dtype: all of a half-life, then the next."""
        found = []
        for half_life in self.half_lives:
            for number, layer in enumerate(layers):
                support = send(self.support[:, part], layer.device)
                means = running_mean(layer, support, half_life, self.states.get((half_life, number)))
                self.states[half_life, number] = means.state
                found.append(means.values.to(layer.dtype))
        return found


class _Asked(NamedTuple):
    """The tokens of B chains that are yielded, chain by chain, with all but their activations."""

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
    every: bool = False  # whether tokens are yielded that are valid for no column

    def look_up(self, chains: Sequence[Chain]) -> _Asked:
        """What the whole of these chains is asked."""
        found = []
        for b, chain in enumerate(chains):
            pairs = self.buffer.push(chain.ids, chain.codes, chain.support, last=True)
            at = (chain.support if self.every else pairs.valid.any(1)).nonzero()[:, 0]
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
    """Rows [N] of each of L layers [n, W], together [N, L, D] on `device`; D is the largest W."""
    (first, rows), *_ = sources
    widths = [layer.shape[1] for layer, _ in sources]
    make = torch.empty if min(widths) == max(widths) else torch.zeros
    taken = make(len(rows), len(sources), max(widths), dtype=first.dtype, device=device)
    for i, (layer, rows) in enumerate(sources):
        room = taken[:, i, : widths[i]]
        if layer.device == device and layer.dtype == first.dtype:
            torch.index_select(layer, 0, send(rows, device), out=room)
        else:
            room.copy_(layer[send(rows, layer.device)])
    return taken
