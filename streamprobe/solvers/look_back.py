"""Trains probes that look back in a chain: residuals on frozen linear logits, from a sample of segments.

Shapes: S segments of T tokens, s those of a batch, L sites, K columns (of F folds, fold by fold), k those of a group, D
features.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from streamprobe.activations.segments import Segments
from streamprobe.probes import attention
from streamprobe.probes.linear import ProbeBank
from streamprobe.solvers.residual import Batch, Fitted, fit
from streamprobe.system.distributed import is_own, owner, share
from streamprobe.system.hardware import exact_float32

EPOCH_TOKENS = 65_536  # of an epoch, own ones and others
AT_ONCE = 8  # segments of a batch
COLUMNS = 32  # of a group: what a rank trains at once


class Scaling(NamedTuple):
    """What features are standardised by: (x - mean) / scale, the same for all columns of a site."""

    mean: Tensor  # [L, D] float32
    scale: Tensor  # [L, D] float32


class _Group(NamedTuple):
    """The probes that are trained at once: some columns of one site."""

    site: int
    first: int  # of its columns
    stop: int

    @property
    def columns(self) -> slice:
        """Which columns they are."""
        return slice(self.first, self.stop)

    def of(self, part: Tensor) -> Tensor:
        """A view of what is the group's, [1, k, ...], of a part [L, K, ...]."""
        return part[self.site : self.site + 1, self.columns]


class SegmentBatches:
    """A sample of segments as the trainer reads it: standardised, with the logits of the linear probes of a group."""

    def __init__(self, segments: Segments, linear: ProbeBank, scaling: Scaling, group: _Group):
        """`linear`: the frozen probes of the sites and columns of `segments`."""
        self.segments, self.scaling, self.group = segments, scaling, group
        self.weight = linear.weight[group.site, group.columns].float()  # [k, D]
        self.bias = linear.bias[group.site, group.columns].float()  # [k]

    def epoch(self, epoch: int, *, seed: int, n_tokens: int = EPOCH_TOKENS) -> Iterator[Batch]:
        """Batches of so many tokens at most: of other segments in each epoch, drawn by `seed`, all if there are few."""
        n_segments, length = self.segments.own.shape
        order = np.random.default_rng([seed, epoch]).permutation(n_segments)
        yield from self._batches(torch.from_numpy(order[: max(1, n_tokens // length)]))

    def all(self) -> Iterator[Batch]:
        """Batches of all segments, in their order."""
        yield from self._batches(torch.arange(len(self.segments.chain)))

    def _batches(self, chosen: Tensor) -> Iterator[Batch]:
        for some in chosen.split(AT_ONCE) if len(chosen) else ():
            yield self._batch(some.to(self.segments.acts.device))

    def _batch(self, some: Tensor) -> Batch:
        """The batch of these segments [s]: x [1, s, T, D], the rest [1, k, s, T]; those of a place lie side by side."""
        segments, site, columns = self.segments, self.group.site, self.group.columns
        x = segments.acts[some, :, site].transpose(0, 1).contiguous().float()  # [T, s, D]
        with exact_float32():
            base = x @ self.weight.T + self.bias  # [T, s, k]
        x = x.sub_(self.scaling.mean[site]).div_(self.scaling.scale[site])
        targets, weight = (own[some][..., columns].transpose(0, 1) for own in (segments.targets, segments.weight))
        base, targets, weight = (own.permute(2, 1, 0)[None] for own in (base, targets, weight))
        return Batch(x.transpose(0, 1)[None], base, targets, weight)


def fit_attention(
    training: Segments,
    validation: Segments,
    linear: ProbeBank,
    scaling: Scaling,
    *,
    n_heads: int = 4,
    seed: int = 0,
    n_tokens: int = EPOCH_TOKENS,
    learning_rate: float = 3e-3,
    l2: float = 1e-2,
    max_epochs: int = 30,
    patience: int = 3,
) -> Fitted:
    """Residuals that look back, for every frozen linear probe: parts of standardised features, see `probes.attention`.

    An epoch has `n_tokens` at most.  Each rank trains some groups of probes and shares them: the result is the same on
    every number of ranks.  See `residual.fit` for the loss and when a probe is final.
    """
    start = attention.start(*linear.bias.shape, n_heads=n_heads, n_features=linear.n_features)
    start = {name: part.to(training.acts.device) for name, part in start.items()}
    options: dict[str, Any] = {"learning_rate": learning_rate, "l2": l2, "max_epochs": max_epochs}
    found = {}
    for number, group in enumerate(_groups(linear)):
        own = {name: group.of(part).clone() for name, part in start.items()}
        if is_own(number):
            known, judged = (SegmentBatches(each, linear, scaling, group) for each in (training, validation))
            epoch = partial(known.epoch, seed=seed, n_tokens=n_tokens)
            found[group] = fit(attention.residual, own, epoch, judged.all, patience=patience, **options)
        else:
            found[group] = _nothing(own, max_epochs)
    return _of_all_ranks(_nothing(start, max_epochs), found)


def _groups(linear: ProbeBank) -> list[_Group]:
    n_sites, n_columns = linear.bias.shape
    return [_Group(i, k, min(k + COLUMNS, n_columns)) for i in range(n_sites) for k in range(0, n_columns, COLUMNS)]


def _nothing(parts: dict[str, Tensor], max_epochs: int) -> Fitted:
    """Parts that are not trained."""
    probes = torch.zeros_like(parts["pace"][..., 0], dtype=torch.int64)
    return Fitted(
        parts, probes, torch.zeros(*probes.shape, 2, 1 + max_epochs, dtype=torch.float64, device=probes.device)
    )


def _of_all_ranks(every: Fitted, found: dict[_Group, Fitted]) -> Fitted:
    """What every group's rank has found, laid into that of all."""
    for number, (group, fitted) in enumerate(found.items()):
        whole, own = ({**each.parts, "best_epoch": each.best_epoch, "losses": each.losses} for each in (every, fitted))
        for name, part in own.items():
            group.of(whole[name]).copy_(share(part.contiguous(), owner(number)))
    return every
