"""Residuals trained on frozen linear logits: what a probe of another kind adds to what a linear probe says.

Shapes: L sites, K columns, n tokens of each column, S segments of T tokens, D features.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

from streamprobe.system.hardware import coarse_float32, exact_float32

Parts = Mapping[str, Tensor]  # what residuals are made of, by name, each beginning [L, K]


class Batch(NamedTuple):
    """Tokens that residuals are trained or judged on."""

    x: Tensor  # what the residual reads: [L, K, n, D], tokens of each column; or [L, S, T, D], which all columns share
    base: Tensor  # [L, K, ...] frozen linear logits
    targets: Tensor  # bool, broadcastable to base
    weight: Tensor  # what each token counts, 0 where it is not asked; broadcastable to base


class Fitted(NamedTuple):
    """Residuals as training has left them."""

    parts: dict[str, Tensor]
    best_epoch: Tensor  # [L, K] int64: that they are of, 0 where it is the start
    losses: Tensor  # [L, K, 2, 1 + max_epochs] float64: log-loss on training and validation tokens, from the start on


class _LogLoss(NamedTuple):
    """What L x K probes lose on the tokens of some batches, in sums [L, K] float64."""

    loss_: Tensor
    weight: Tensor
    n_batches: int

    @property
    def mean(self) -> Tensor:
        """Per unit of weight; NaN where no token counts."""
        return self.loss_ / self.weight

    @property
    def batch_weight(self) -> Tensor:
        """Of the mean batch."""
        return self.weight / max(1, self.n_batches)


def fit(
    residual: Callable[[Parts, Tensor], Tensor],
    parts: Parts,
    batches: Callable[[int], Iterable[Batch]],
    validation: Callable[[], Iterable[Batch]],
    *,
    learning_rate: float,
    l2: float,
    max_epochs: int,
    patience: int,
) -> Fitted:
    """Trains L x K residuals by Adam, each as if it were alone.

    `residual(parts, x)` is differentiable and of the shape of the base; it is 0 at the start `parts`.  `batches(epoch)`
    gives the tokens of an epoch, counted from 1, each time as many batches of as much weight; `validation()` those
    that a probe is judged by.  The loss of a probe on a batch, with z the base and the residual together,

        sum(weight (y softplus(-z) + (1 - y) softplus(z))) / (the weight of its mean batch) + l2 |parts|^2

    is summed over probes.  Parts whose name ends in `bias` have no penalty.  After each epoch the log-loss on the
    validation tokens decides: the best snapshot of every probe is kept, and one no better for `patience` epochs in a
    row is final.  Where its log-loss on the training tokens is then not below the start's, the start is taken back.

    Of an epoch `losses` tells what was lost on its training tokens, each before the step that it led to, and behind it
    on the validation tokens; of a probe that is final, what was in its best epoch.
    """
    start = {name: part.detach() for name, part in parts.items()}
    at_start = _log_loss(None, start, batches(1))
    live = {name: part.clone().requires_grad_() for name, part in start.items()}
    adam = _adam(live, learning_rate, l2)
    best = _Best(start, at_start.mean, _log_loss(None, start, validation()).mean, patience)
    for epoch in range(1, max_epochs + 1):
        trained = _train(residual, live, adam, batches(epoch), mean_weight=at_start.batch_weight)
        best.update(epoch, live, trained, _log_loss(residual, live, validation()).mean)
        if best.is_final.all():
            break
    if best.epoch.any():
        worse = ~(_log_loss(residual, best.parts, batches(1)).mean < at_start.mean)
        best.take(worse, start, 0)
    return Fitted(best.parts, best.epoch, best.losses_until_final(max_epochs))


class _Best:
    """The best snapshot of every probe so far, and which of them are final."""

    def __init__(self, start: Parts, trained: Tensor, loss: Tensor, patience: int):
        """trained and loss [L, K] of the start, on training and on validation tokens."""
        self.parts = {name: part.clone() for name, part in start.items()}
        self.loss, self.patience, self.losses = loss, patience, [torch.stack([trained, loss], -1)]
        self.epoch, self.misses = torch.zeros(2, *loss.shape, dtype=torch.int64, device=loss.device)

    @property
    def is_final(self) -> Tensor:
        """[L, K] bool: no better for `patience` epochs in a row."""
        return self.misses >= self.patience

    def update(self, epoch: int, live: Parts, trained: Tensor, loss: Tensor) -> None:
        """Takes those of the live parts, as of an epoch, whose loss [L, K] is the lowest yet and that are not final.

        trained [L, K]: what was lost on the training tokens of the epoch.
        """
        better = (loss < self.loss) & ~self.is_final
        self.misses = torch.where(better, 0, self.misses + 1)
        self.loss = loss.where(better, self.loss)
        self.losses.append(torch.stack([trained, loss], -1))
        self.take(better, live, epoch)

    @torch.no_grad()
    def take(self, where: Tensor, parts: Parts, epoch: int) -> None:
        """Takes the parts, as of an epoch, of the probes `where` [L, K] is True."""
        self.epoch = self.epoch.masked_fill(where, epoch)
        for name, part in parts.items():
            chosen = where.reshape(*where.shape, *[1] * (part.dim() - 2))
            self.parts[name] = part.detach().where(chosen, self.parts[name])

    def losses_until_final(self, max_epochs: int) -> Tensor:
        """The losses [L, K, 2, 1 + max_epochs] of each epoch from the start on; of final probes those of the best."""
        best = self.epoch[..., None]
        epoch = torch.arange(1 + max_epochs, device=best.device).expand(*best.shape[:2], -1)
        shown = epoch.where(epoch <= best + self.patience, best)
        return torch.stack(self.losses, -1).gather(-1, shown[:, :, None].expand(-1, -1, 2, -1))


def _adam(live: Parts, learning_rate: float, l2: float) -> torch.optim.Adam:
    """Adam on these parts; a penalty's gradient is torch's `weight_decay` times the part."""
    penalised = [part for name, part in live.items() if not name.endswith("bias")]
    free = [part for name, part in live.items() if name.endswith("bias")]
    groups: list[dict[str, Any]] = [{"params": penalised, "weight_decay": 2 * l2}, {"params": free}]
    return torch.optim.Adam([group for group in groups if group["params"]], lr=learning_rate, fused=True)


def _train(
    residual: Callable[[Parts, Tensor], Tensor],
    live: Parts,
    adam: torch.optim.Adam,
    batches: Iterable[Batch],
    *,
    mean_weight: Tensor,
) -> Tensor:
    """Takes a step for each batch; the log-loss [L, K] of all, each before its step.  mean_weight [L, K] of a batch."""
    loss_, weight = torch.zeros(2, *mean_weight.shape, dtype=torch.float64, device=mean_weight.device)
    for batch in batches:
        adam.zero_grad()
        loss_ += _add_gradients(residual, live, batch, mean_weight)
        weight += batch.weight.flatten(2).sum(-1, dtype=torch.float64)
        adam.step()
    return loss_ / weight


@coarse_float32()  # far below what a gradient differs by from batch to batch
def _add_gradients(
    residual: Callable[[Parts, Tensor], Tensor], live: Parts, batch: Batch, mean_weight: Tensor
) -> Tensor:
    """Adds the gradients of the sum over probes of each one's loss on a batch, without penalty; returns the losses, not
    divided by weights.  mean_weight [L, K].
    """
    of_probes = _weighted(batch.base + residual(live, batch.x), batch).sum(-1)
    (of_probes / mean_weight).where(mean_weight > 0, 0).sum().backward()  # a column that no token trains stays
    return of_probes.detach()


def _weighted(logits: Tensor, batch: Batch) -> Tensor:
    """What each token adds to the log-loss, [L, K, N], of logits [L, K, ...]."""
    margin = logits * torch.where(batch.targets, -1.0, 1.0).to(logits.dtype)
    return (softplus(margin) * batch.weight).flatten(2)


@torch.no_grad()
@exact_float32()
def _log_loss(residual: Callable[[Parts, Tensor], Tensor] | None, parts: Parts, batches: Iterable[Batch]) -> _LogLoss:
    """The log-loss of residuals on batches; None: of a residual of 0."""
    shape, device = next((part.shape[:2], part.device) for part in parts.values())
    loss_, weight = torch.zeros(2, *shape, dtype=torch.float64, device=device)
    n = 0
    for batch in batches:
        logits = batch.base if residual is None else batch.base + residual(parts, batch.x)
        loss_ += _weighted(logits, batch).sum(-1, dtype=torch.float64)
        weight += batch.weight.expand_as(logits).flatten(2).sum(-1, dtype=torch.float64)
        n += 1
    return _LogLoss(loss_, weight, n)
