"""Residuals that read one token at a time, trained on the drawn tokens of every column.

Shapes: U drawn tokens, n of a column, L sites, K columns, k those of a group, D features.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from streamprobe.activations.drawn import SampledTokens
from streamprobe.probes.linear import ProbeBank
from streamprobe.solvers.residual import Batch, Fitted, Parts, fit
from streamprobe.system.distributed import is_own, owner, share

BATCH_TOKENS = 512  # of each column
LAID_OUT_BYTES = 2**31  # that centred features take at most
GROUP_BYTES = 2**25  # of features that a batch of a group of columns takes: what stays near the processor is fast


class PointwiseTokens(NamedTuple):
    """Drawn tokens beside the linear logits that residuals are to improve."""

    sample: SampledTokens
    base: Tensor  # [L, K, U] frozen linear logits
    mean: Tensor  # [L, D] of features
    scale: Tensor  # [L, K or 1, D]
    centred: Tensor | None = None  # [L, U, D] features less their mean, where there is room for them: see `laid_out`

    @property
    def dtype(self) -> torch.dtype:
        """What is computed in: float64 where activations are, else float32."""
        return torch.float64 if self.sample.acts.dtype == torch.float64 else torch.float32

    @property
    def n_batches(self) -> int:
        """Batches of a trip: every column's tokens are spread over as many, so that all make as many steps."""
        return -(-self.sample.most // BATCH_TOKENS)

    def laid_out(self) -> "PointwiseTokens":
        """The same with centred features in memory if they take at most LAID_OUT_BYTES: batches cost half as much."""
        n_tokens, n_sites, n_features = self.sample.acts.shape
        if n_tokens * n_sites * n_features * self.dtype.itemsize > LAID_OUT_BYTES:
            return self
        centred = torch.empty(n_sites, n_tokens, n_features, dtype=self.dtype, device=self.base.device)
        for site, own in enumerate(centred):
            own.copy_(self.sample.acts[:, site]).sub_(self.mean[site].to(self.dtype))
        return self._replace(centred=centred)

    def room(self, columns: Sequence[int], n_tokens: int) -> Batch:
        """Room for a batch of so many tokens of each of k columns, of weight 0."""
        sizes = (len(columns), n_tokens)
        wide: dict[str, Any] = {"dtype": self.dtype, "device": self.base.device}
        x = torch.zeros(len(self.base), *sizes, self.mean.shape[1], **wide)
        targets = torch.zeros(1, *sizes, dtype=torch.bool, device=self.base.device)
        return Batch(x, torch.zeros(len(self.base), *sizes, **wide), targets, torch.zeros(1, *sizes, **wide))

    def batches(self, columns: Sequence[int], order: Sequence[int] | None = None) -> Iterator[Batch]:
        """The tokens of k columns, in an order that these numbers choose (None: as drawn), each until the next.

        The order of a column depends on no other.  Columns with fewer tokens in a batch are filled up with tokens of
        weight 0.  All batches lie in the same memory: writing there anew costs a third of what new memory does.
        """
        spread = [self._spread(len(self.sample.columns[k].rows), order) for k in columns]
        room = self.room(columns, max((len(own[0]) for own in spread if own), default=0))
        for places in zip(*spread, strict=True):
            for number, (k, place) in enumerate(zip(columns, places, strict=True)):
                self.put(room, number, k, place.to(self.base.device))
            yield room

    def _spread(self, n: int, order: Sequence[int] | None) -> tuple[Tensor, ...]:
        """Which of n tokens are in each batch; the first one has the most."""
        if not self.n_batches:
            return ()
        chosen = torch.arange(n) if order is None else torch.from_numpy(np.random.default_rng(order).permutation(n))
        return chosen.tensor_split(self.n_batches)

    def put(self, room: Batch, number: int, k: int, place: Tensor) -> None:
        """Puts the tokens of column k at its places [n] into a batch, as its column of that number."""
        column, n = self.sample.columns[k], len(place)
        rows = column.rows[place]
        room.targets[0, number, :n] = column.targets[place]
        room.weight[0, number, :n] = column.weight[place].to(self.dtype)
        room.weight[0, number, n:] = 0
        room.base[:, number, :n] = self.base[:, k, rows].to(self.dtype)
        scale = self.scale[:, k if self.scale.shape[1] > 1 else 0]
        for site, x in enumerate(room.x[:, number, :n]):
            # One after the other, in memory that stays near the processor.
            if self.centred is None:
                x.copy_(self.sample.acts[:, site].index_select(0, rows)).sub_(self.mean[site].to(self.dtype))
            else:
                torch.index_select(self.centred[site], 0, rows, out=x)
            x.div_(scale[site].to(self.dtype))


class PointwiseKind(NamedTuple):
    """A kind of residual that reads one token at a time."""

    start: Callable[[PointwiseTokens, Sequence[int]], dict[str, Tensor]]  # of the columns of these numbers
    residual: Callable[[Parts, Tensor], Tensor]
    shapes: dict[str, tuple[int, ...]]  # of each part of one probe


def linear_logits(bank: ProbeBank, acts: Tensor, chunk: int = 4096) -> Tensor:
    """The logits [L, K, U] of linear probes of raw features, of acts [U, L, D] a chunk at a time."""
    return torch.cat([bank.scores(part).permute(1, 2, 0) for part in acts.split(chunk)], -1)


def fit_pointwise(
    kind: PointwiseKind,
    training: PointwiseTokens,
    validation: PointwiseTokens,
    *,
    learning_rate: float,
    l2: float,
    max_epochs: int,
    patience: int,
    seed: int = 0,
) -> Fitted:
    """Trains a residual of one kind for every site and column: see `residual.fit`.

    Columns are trained in groups, each by one rank, which gives the others what it has found.  Groups do not depend on
    the number of ranks, so that the parts do not either.
    """
    groups, training, validation = column_groups(training), training.laid_out(), validation.laid_out()
    options: dict[str, Any] = {"learning_rate": learning_rate, "l2": l2, "max_epochs": max_epochs, "patience": patience}
    found: list[Fitted] = []
    for number, columns in enumerate(groups):
        if is_own(number):
            batches, judged = partial(_epoch, training, columns, seed), partial(validation.batches, columns)
            found.append(fit(kind.residual, kind.start(training, columns), batches, judged, **options))
        else:
            found.append(_room(kind, training, len(columns), max_epochs))
    for number, fitted in enumerate(found):
        for tensor in (*fitted.parts.values(), fitted.best_epoch, fitted.losses):
            share(tensor, owner(number))
    parts = {name: torch.cat([fitted.parts[name] for fitted in found], 1) for name in kind.shapes}
    best_epoch, losses = (torch.cat(own, 1) for own in zip(*(fitted[1:] for fitted in found), strict=True))
    return Fitted(parts, best_epoch, losses)


def column_groups(tokens: PointwiseTokens) -> list[range]:
    """Columns that are trained together: as many as their batches have room for."""
    n_sites, n_columns, _ = tokens.base.shape
    n = max(1, GROUP_BYTES // (n_sites * BATCH_TOKENS * tokens.mean.shape[1] * tokens.dtype.itemsize))
    return [range(first, min(first + n, n_columns)) for first in range(0, n_columns, n)]


def _epoch(tokens: PointwiseTokens, columns: Sequence[int], seed: int, epoch: int) -> Iterator[Batch]:
    """The batches of an epoch, in its order."""
    return tokens.batches(columns, order=[seed, epoch])


def _room(kind: PointwiseKind, tokens: PointwiseTokens, n_columns: int, max_epochs: int) -> Fitted:
    """Room for what another rank finds for so many columns."""
    probes = (len(tokens.base), n_columns)
    made = {
        name: torch.zeros(*probes, *shape, dtype=tokens.dtype, device=tokens.base.device)
        for name, shape in kind.shapes.items()
    }
    device = tokens.base.device
    losses = torch.zeros(*probes, 2, 1 + max_epochs, dtype=torch.float64, device=device)
    return Fitted(made, torch.zeros(probes, dtype=torch.int64, device=device), losses)
