"""Chains through the backbone to labelled token activations.

Shapes: B chains in a batch, T tokens in a chain, N tokens, L layers, K columns, D hidden size, P features on the side.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Protocol

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


class Rows(Protocol):
    """Layers that need no forward pass, such as `controls.Surface`."""

    before: int  # tokens that a token's row looks back on

    def rows(self, ids: Tensor, n: int) -> Tensor:
        """Activations [n, S, D] at the last n of these tokens, which begin `before` earlier, or with the chain."""
        ...


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


def _split(batch: list[int], lengths: Sequence[int], longest: int) -> list[list[int]]:
    """The chains of a batch of at most so many tokens, and the others."""
    parts = [i for i in batch if lengths[i] <= longest], [i for i in batch if lengths[i] > longest]
    return [part for part in parts if part]


def stream(
    chains: Sequence[Chain],
    backbone: nn.Module,
    layers: Sequence[int],
    columns: Sequence[Column],
    labels: Sequence[str],
    max_batch_tokens: int = 8192,
    seed: int | None = None,
    on_forward: Callable[[int, int], None] | None = None,
    surface: Rows | None = None,
    side: Callable[[Chain], Tensor] = lambda chain: torch.empty(len(chain.ids), 0),
) -> Iterator[TokenBatch]:
    """One trip over `chains`: every token that is valid for some column, a batch of chains at a time.

    `labels` names the C label arrays of the chains; `seed` orders the batches (None: by length).  After each forward
    pass `on_forward` is told the tokens in it and those with padding.  The layers of `surface` stand behind the probed
    ones, and `side` gives a chain's features [T, P].  Chains are padded on the right, where causal attention makes
    padding invisible, and the mask says so as well.

    A chain longer than `max_batch_tokens` goes through in chunks of so many tokens, each a batch of its own, so that
    it takes no more memory than others do, bar its keys and values.  What it yields is the same for every size of the
    chunks, but for rounding in the activations: in float32 at most about a millionth of their largest number.

    Raises InputError for an empty stream, and for so long a chain if the model cannot read one in chunks.
    """
    if not chains:
        raise InputError("an empty stream", "at least one chain", "use more chains or other shares")
    blocks = decoder_layers(backbone)
    last = blocks[max(layers)]
    buffer = LagBuffer(columns, labels)
    lengths = [len(c.ids) for c in chains]
    apart = frequencies_change(backbone.config)
    batches = [
        part for batch in make_batches(lengths, max_batch_tokens, seed) for part in _split(batch, lengths, apart)
    ]
    with tap({layer: blocks[layer] for layer in layers}) as taken:
        for batch in batches:
            longest = max(lengths[i] for i in batch)
            cache = make_cache(backbone.config) if longest > max_batch_tokens else None
            for start in range(0, longest, max_batch_tokens):
                part = slice(start, start + max_batch_tokens)
                ids = [chains[i].ids[part] for i in batch]
                forward(backbone, ids, cache, last)
                check_taken(taken, layers, len(ids), max(map(len, ids)))
                if on_forward:
                    on_forward(sum(map(len, ids)), len(ids) * max(map(len, ids)))
                chosen = [chains[i] for i in batch]
                yield _label(chosen, batch, part, [taken[layer] for layer in layers], buffer, surface, side)


def forward(backbone: nn.Module, ids: Sequence[Tensor], cache: Any = None, last: nn.Module | None = None) -> None:
    """Runs the backbone over chains of token ids, padded on the right; the taps hold what it computed.

    `cache` (of `make_cache`) holds the keys and values of the tokens before these, and afterwards those of these too.
    Nothing behind the block `last` is computed.  Raises InputError for a model that leaves the cache empty.
    """
    device: torch.device = backbone.device  # type: ignore[assignment]
    before = 0 if cache is None else cache.get_seq_length()
    lengths = torch.tensor([len(x) for x in ids])
    padded = nn.utils.rnn.pad_sequence(list(ids), batch_first=True)  # any id does: the mask hides it
    mask = torch.arange(before + padded.shape[1]) < before + lengths[:, None]
    read(backbone, send(padded, device), send(mask.long(), device), last, cache)


def send(x: Tensor, device: torch.device) -> Tensor:
    """x on `device`, by a copy that the host does not wait for."""
    return (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True)


def _label(
    chains: Sequence[Chain],
    index: Sequence[int],
    part: slice,
    acts: Sequence[Tensor],
    buffer: LagBuffer,
    surface: Rows | None,
    side: Callable[[Chain], Tensor],
) -> TokenBatch:
    """Activations [B, T, D] of each layer for a part of B chains, numbered `index` -> the valid tokens, in order."""
    device = acts[0].device
    paired = []
    for b, chain in enumerate(chains):
        codes, support = chain.codes[part], chain.support[part]
        rows = [a[b, : len(codes)].to(device) for a in acts]
        if surface is not None:
            seen = send(chain.ids[max(0, part.start - surface.before) : part.stop], device)
            rows += surface.rows(seen, len(codes)).to(rows[0]).unbind(1)
        paired.append(buffer.push(torch.stack(rows, dim=1), codes, support, last=part.stop >= len(chain.ids)))
    some = [pairs.valid.any(1).nonzero()[:, 0] for pairs in paired]
    beside = [side(chain)[pairs.token[at]] for chain, pairs, at in zip(chains, paired, some, strict=True)]
    # From here on the host waits for the device, which has been computing while the labels were looked up.
    return TokenBatch(
        torch.cat([pairs.acts.index_select(0, send(at, device)) for pairs, at in zip(paired, some, strict=True)]),
        torch.cat(beside),
        torch.cat([pairs.targets[at] for pairs, at in zip(paired, some, strict=True)]),
        torch.cat([pairs.valid[at] for pairs, at in zip(paired, some, strict=True)]),
        torch.cat([torch.full((len(at),), i) for i, at in zip(index, some, strict=True)]),
        torch.cat([pairs.token[at] for pairs, at in zip(paired, some, strict=True)]),
    )


def check_finite(
    batches: Iterable[TokenBatch], chains: Sequence[Chain], layers: Sequence[int | str]
) -> Iterator[TokenBatch]:
    """The batches of a stream over `chains`, each looked through as it is read; `layers` [L] names their activations.

    Raises InputError for the first activation that is infinite or not a number, by chain, token and layer.
    """
    for batch in batches:
        # A sum tells of any such number at the price of one read; where it overflows itself, a closer look decides.
        if not batch.acts.sum(2).isfinite().all():
            for n, i in (~batch.acts.isfinite().all(2)).nonzero()[:1].tolist():
                chain, token, layer = chains[int(batch.chain[n])], int(batch.token[n]), layers[i]
                raise InputError(
                    f"activations that are infinite or not numbers: chain {chain.id!r}, token {token}, layer {layer}",
                    "finite numbers",
                    "use --dtype float32 or bfloat16, or leave such chains out by --bad_chains skip"
                    if isinstance(layer, int)
                    else "use --dtype float32 or bfloat16, or other --controls",
                )
        yield batch


def find_bad_chains(
    chains: Sequence[Chain],
    backbone: nn.Module,
    layers: Sequence[int],
    max_batch_tokens: int,
    on_forward: Callable[[int, int], None] | None = None,
) -> list[Chain]:
    """Those of the chains that have an activation that is infinite or not a number at a sample, whatever its label.

    The other arguments are those of `stream`.
    """
    labelled = [replace(c, codes=torch.zeros(len(c.ids), 1, dtype=torch.int8)) for c in chains]
    every = Column("any", "token", 0)
    bad: set[int] = set()
    for batch in stream(labelled, backbone, layers, [every], [every.label], max_batch_tokens, None, on_forward):
        if not batch.acts.sum(2).isfinite().all():
            wrong = ~batch.acts.isfinite().flatten(1).all(1)
            bad |= set(batch.chain[wrong.to(batch.chain.device)].tolist())
    return [chains[i] for i in sorted(bad)]
