"""Segments of chains, for probes that look back in a chain while they are trained: a bounded sample from one trip.

Every chain is cut into segments of OWN tokens, each with the HALO tokens before it: these are read too, but not trained
on, so that the first own tokens have something to look back on.  Tokens are those that a trip brings.

Shapes: S segments of T = HALO + OWN tokens, L sites, K columns (of F folds, fold by fold), D features.
"""

from bisect import bisect, insort
from collections.abc import Iterable, Iterator
from operator import attrgetter
from typing import NamedTuple

import torch
from torch import Tensor

from streamprobe.activations.batch import TokenBatch
from streamprobe.activations.feed import Feed
from streamprobe.activations.store import Part
from streamprobe.system.distributed import add, each, gather

OWN, HALO = 256, 64
MOST = 1_024  # segments of a sample, unless the caller says another number


class Segments(NamedTuple):
    """A sample of segments: a segment's halo comes first, then its own tokens, and then zeros up to T tokens.

    A probe that looks back reads what is behind the own tokens without its changing anything.
    """

    acts: Tensor  # [S, T, L, D] in the dtype of the features
    halo: Tensor  # [S, T] bool
    own: Tensor  # [S, T] bool
    targets: Tensor  # [S, T, K] bool
    weight: Tensor  # [S, T, K] float32: 0 where a column does not ask, more for positives and where few are drawn
    chain: Tensor  # [S] int64
    token: Tensor  # [S] int64: the place of the first own token in its chain


class _Tokens(NamedTuple):
    """Tokens of one chain, in their order."""

    acts: Tensor  # [n, L, D]
    targets: Tensor  # [n, K] bool, False where not valid
    valid: Tensor  # [n, K] bool
    chain: Tensor  # [n] int64
    token: Tensor  # [n] int64
    chance: Tensor  # [n]

    def at(self, rows: slice) -> "_Tokens":
        return _Tokens(*(x[rows] for x in self))

    def then(self, more: "_Tokens") -> "_Tokens":
        return _Tokens(*(torch.cat(pair) for pair in zip(self, more, strict=True)))


class _Place(NamedTuple):
    """By what segments are drawn, the smallest first: the chance of the first own token, and where that is."""

    chance: float
    chain: int
    token: int


class _Segment(NamedTuple):
    tokens: _Tokens
    n_halo: int
    place: _Place


class _Cut(NamedTuple):
    """A chain as far as it has come, without what has been cut off."""

    tokens: _Tokens
    n_halo: int = 0  # of the tokens, the first ones

    def segment(self) -> _Segment:
        """The first segment."""
        tokens = self.tokens.at(slice(self.n_halo + OWN))
        chance, chain, token = (x[self.n_halo] for x in (tokens.chance, tokens.chain, tokens.token))
        return _Segment(tokens, self.n_halo, _Place(float(chance), int(chain), int(token)))

    def rest(self) -> "_Cut":
        """What is left behind the first segment, with its halo."""
        return _Cut(self.tokens.at(slice(self.n_halo + OWN - HALO, None)), HALO)

    @property
    def n_own(self) -> int:
        """Tokens that no segment has as its own yet."""
        return len(self.tokens.chain) - self.n_halo


def _cut(chunks: Iterable[TokenBatch], feed: Feed) -> Iterator[_Segment]:
    """The segments of the chains of a part, as soon as their last token has come."""
    open_, seen = None, set[int]()
    for batch in chunks:
        acts, targets, valid, extras = feed.of(batch)
        tokens = _Tokens(acts, targets & valid, valid, batch.chain, batch.token, extras.chance)
        chains, counts = torch.unique_consecutive(batch.chain, return_counts=True)
        start = 0
        for chain, count in zip(chains.tolist(), counts.tolist(), strict=True):
            own, start = tokens.at(slice(start, start + count)), start + count
            if open_ is not None and chain in seen:
                assert chain == int(open_.tokens.chain[-1]), "the tokens of a chain come one behind the other"
                open_ = _Cut(open_.tokens.then(own), open_.n_halo)
            else:
                yield from [open_.segment()] if open_ is not None and open_.n_own else []
                open_ = _Cut(own)
            seen.add(chain)
            while open_.n_own >= OWN:
                yield open_.segment()
                open_ = open_.rest()
    yield from [open_.segment()] if open_ is not None and open_.n_own else []


class _Sample:
    """The segments with the smallest chances: `most` at most, half of them with a positive, if there are so many."""

    def __init__(self, most: int):
        self.most = most
        self.kept: dict[bool, list[_Segment]] = {True: [], False: []}  # by whether a column has a positive there
        self.counts = torch.zeros(2, dtype=torch.int64)  # segments without and with one that have been offered

    def room(self, positive: bool) -> int:
        """How many of a kind are kept; the more of the other kind come, the fewer."""
        return max(self.most // 2, self.most - int(self.counts[int(not positive)]))

    def offer(self, segment: _Segment) -> None:
        """Takes a segment, if it is asked anything and may be among the last ones, and drops those that may not."""
        own = slice(segment.n_halo, None)
        if not segment.tokens.valid[own].any():
            return
        positive = bool(segment.tokens.targets[own].any())
        self.counts[int(positive)] += 1
        by_place = attrgetter("place")
        if bisect(self.kept[positive], segment.place, key=by_place) < self.room(positive):
            copied = segment._replace(tokens=_Tokens(*(x.clone() for x in segment.tokens)))  # not a view of a chunk
            insort(self.kept[positive], copied, key=by_place)
        for kind, kept in self.kept.items():
            del kept[self.room(kind) :]

    def agree(self) -> None:
        """Keeps, of this rank's segments, those that are among the first of all ranks."""
        add(self.counts)
        for kind, kept in self.kept.items():
            places = torch.tensor([segment.place for segment in kept], dtype=torch.float64).view(-1, 3)
            [everyone] = gather([places], each(len(kept)))
            last = sorted(_Place(*place) for place in everyone.tolist())[: self.room(kind)][-1:]
            self.kept[kind] = [segment for segment in kept if segment.place <= last[0]]

    def rate(self, positive: bool) -> float:
        """Which share of the segments of a kind is kept."""
        return min(1.0, self.room(positive) / max(1, int(self.counts[int(positive)])))


def sample_segments(
    parts: Iterable[Part],
    feed: Feed,
    positive_weight: Tensor,
    *,
    dtype: torch.dtype,
    device: torch.device,
    most: int = MOST,
) -> Segments:
    """Segments of the chains of one trip, on `device`: all of them, or `most`; the same on every number of ranks.

    parts: those of this rank, each with all tokens of its chains in their order that may be samples, also those which
    no column asks.  positive_weight [K]: what a positive counts.  `dtype` is that of the features.  Where there are too
    many segments, half of the sample are such with a positive of some column, if there are so many.  Of each kind those
    with the smallest `TokenBatch.chance` of the first own token are drawn, and count as much more as they are fewer.
    A sample takes most x (HALO + OWN) x L x D numbers, and about twice that while it is put together.
    """
    sample = _Sample(most)
    for part in parts:
        for segment in _cut(part.chunks, feed):
            sample.offer(segment)
    sample.agree()
    laid = _laid(sample, feed, positive_weight, dtype=dtype, device=device)
    found = Segments(*gather(laid, each(len(laid.chain))))
    places = list(zip(found.chain.tolist(), found.token.tolist(), strict=True))
    order = torch.tensor(sorted(range(len(places)), key=places.__getitem__), dtype=torch.int64, device=device)
    return Segments(*(x[order] for x in found))


def _laid(
    sample: _Sample, feed: Feed, positive_weight: Tensor, *, dtype: torch.dtype, device: torch.device
) -> Segments:
    """The segments that this rank has kept, one behind the other."""
    kept = [(segment, sample.rate(kind)) for kind, segments in sample.kept.items() for segment in segments]
    room, n_columns = (len(kept), HALO + OWN), len(feed.columns)
    acts = torch.zeros(*room, len(feed.sites), feed.n_features, dtype=dtype, device=device)
    halo, own = torch.zeros(2, *room, dtype=torch.bool, device=device)
    targets = torch.zeros(*room, n_columns, dtype=torch.bool, device=device)
    weight = torch.zeros(*room, n_columns, device=device)
    p = positive_weight.to(device, torch.float32)
    for s, (segment, rate) in enumerate(kept):
        tokens, inside = segment.tokens, slice(segment.n_halo, len(segment.tokens.chain))
        acts[s, : inside.stop] = tokens.acts
        halo[s, : inside.start], own[s, inside] = True, True
        targets[s, inside] = tokens.targets[inside].to(device)
        asked = tokens.valid[inside].to(device)
        weight[s, inside] = asked * torch.where(targets[s, inside], p, 1.0) / rate
    chain, token = (
        torch.tensor([getattr(segment.place, name) for segment, _ in kept], dtype=torch.int64, device=device)
        for name in ("chain", "token")
    )
    return Segments(acts, halo, own, targets, weight, chain, token)
