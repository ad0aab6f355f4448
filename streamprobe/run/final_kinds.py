"""From trained kinds to the probes that a run ends with: calibrated, with thresholds, and beside the joint control.

Shapes: n tokens of a column, L layers, S sites of a kind, K columns of the data and J of the joint control.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from streamprobe.activations.batch import TokenBatch
from streamprobe.activations.feed import Feed
from streamprobe.evaluation.calibration import recalibrate
from streamprobe.evaluation.metrics import measure
from streamprobe.evaluation.mixing import mean_loss, mix
from streamprobe.evaluation.scores import Scored, evaluate
from streamprobe.lags import Column
from streamprobe.probes.joined import Joined, group_norms
from streamprobe.probes.kept import FinalProbes
from streamprobe.probes.kind_bank import KindBank
from streamprobe.probes.linear import ProbeBank
from streamprobe.probes.mixed import Mixed
from streamprobe.probes.nested import NESTED
from streamprobe.run.inputs import Inputs
from streamprobe.run.kind_feeds import kind_feed, mixed_feed
from streamprobe.run.kinds import LinearProbes, TrainedKind

MEANDIFF, STACK = "meandiff", "stack"


class Ended(NamedTuple):
    """A group of probes as they end, and what they are fed."""

    final: FinalProbes
    feed: Feed


def final_kinds(
    linear: LinearProbes,
    trained: Sequence[TrainedKind],
    validation: Callable[[], Iterable[TokenBatch]],
    *,
    inputs: Inputs,
    kinds: Sequence[str],
    beside: Ended | None,
) -> list[Ended]:
    """The probes of all kinds, and those that say what each adds to the joint control, if there is one.

    `beside` are the nested probes, which that is compared with; `kinds` those of the run, in their order.  A weighted
    mean of the layers' logits is fitted here, on the validation chains that choose thresholds, too: of each fold where
    there are several.
    """
    prior = inputs.prior_of(linear.feed).to(linear.bank.bias)
    banks: list[Any] = [linear.bank.add_to_logits(prior), *(each.bank.add_to_logits(prior) for each in trained)]
    feeds = [linear.feed, *(kind_feed(linear.feed, each.kind) for each in trained)]
    of_nested = [(beside.final.bank, beside.feed)] if beside else []
    of_linear, *said = evaluate([*zip(banks, feeds, strict=True), *of_nested], validation())
    ended: list[_Trained] = []
    for each, bank, scored in zip(trained, banks[1:], said, strict=False):
        if each.kind == MEANDIFF:
            bank, scored = scaled(bank, scored)
        ended.append(_Trained(bank, scored, each.best_pass, each.gradient_norm))
    if STACK in kinds:
        ended.append(stack(banks[0], of_linear))
        ended.sort(key=lambda each: kinds.index(each.bank.kind))
    found = [_judged(each, linear.feed, inputs) for each in ended]
    if beside:
        columns = shared_columns(beside.final.bank.columns, linear.bank.columns)
        for own in ended:
            mixed = mixture(own, len(linear.bank.sites), said[-1], beside=beside, columns=columns)
            found.append(Ended(mixed, mixed_feed(beside.feed, linear.feed, own.bank.kind)))
    return found


class _Trained(NamedTuple):
    """Calibrated probes of a kind, and what they say of the validation tokens."""

    bank: Any
    scored: Scored
    best_pass: Tensor
    gradient_norm: Tensor


def _judged(each: _Trained, layers: Feed, inputs: Inputs) -> Ended:
    """The probes with the thresholds that validation chooses."""
    half = inputs.prior_of(layers)
    threshold = measure(each.scored.scores, each.scored.targets, each.scored.valid, half=half)["threshold"]
    bank = each.bank.choose(list(range(len(each.bank.columns))), threshold)
    final = FinalProbes(bank.solver, bank.kind, bank, half, each.best_pass, each.gradient_norm)
    return Ended(final, kind_feed(layers, bank.kind))


def scaled(bank: ProbeBank, scored: Scored) -> tuple[ProbeBank, Scored]:
    """Probes that have directions alone, with the slope and the offset that the validation tokens give them."""
    slope, offset = recalibrate(scored.scores, scored.targets, scored.valid)
    slope, offset = slope.to(bank.bias), of_all_folds(offset, bank.columns).to(bank.bias)
    made = ProbeBank.from_tensors(
        bank.sites,
        bank.columns,
        {"weight": bank.weight * slope[..., None], "bias": bank.bias * slope + offset},
        solver=bank.solver,
        kind=bank.kind,
    )
    scores = scored.scores.permute(1, 2, 0) * slope[..., None] + offset[..., None]
    return made, scored._replace(scores=scores.permute(2, 0, 1))


def of_all_folds(offset: Tensor, columns: Sequence[Column]) -> Tensor:
    """Offsets [L, K] of columns fold by fold, each the mean over folds: with its own, rates would rank the folds."""
    n_folds = max(column.fold for column in columns) + 1
    of_folds = offset.unflatten(1, (n_folds, -1))
    return of_folds.mean(1, keepdim=True).expand_as(of_folds).flatten(1, 2)


def layer_norms(probes: Sequence[FinalProbes], scale: Tensor) -> dict[str, dict[str, dict[str, float]]]:
    """How much of each probe that joins all layers is each layer's: by kind, column and site.

    They are norms of weights in units of each feature's deviation, `scale` [L, D].
    """
    found: dict[str, dict[str, dict[str, float]]] = {}
    for bank in (each.bank for each in probes if each.bank.sites != each.bank.reads):
        assert isinstance(bank, KindBank)
        norms = group_norms(bank.weight, scale.to(bank.weight)).tolist()
        names = [site.name for site in bank.reads]
        own = {str(c): dict(zip(names, row, strict=True)) for c, row in zip(bank.columns, norms, strict=True)}
        found[bank.kind] = own
    return found


def stack(linear: ProbeBank, scored: Scored) -> _Trained:
    """Weighted means of the layers' logits: linear probes of all layers side by side, of L + 1 numbers a column."""
    n_layers, n_columns = linear.bias.shape
    share, offset = torch.zeros(n_columns, n_layers, dtype=torch.float64), torch.zeros(n_columns, dtype=torch.float64)
    logits = scored.scores.permute(2, 1, 0)  # [K, L, N]
    found = torch.zeros(n_columns, 1, len(scored.chain), device=scored.scores.device)
    for k in range(n_columns):
        asked = scored.valid[:, k].nonzero()[:, 0]
        fitted = mix(logits[k : k + 1, :, asked], scored.targets[asked, k], near=[1 / n_layers] * n_layers)
        share[k], offset[k] = fitted.weight[0].cpu(), fitted.offset[0].cpu()
        found[k, 0] = (fitted.weight.float() @ logits[k] + fitted.offset.float())[0]
    of_folds = of_all_folds(offset[None], linear.columns)[0]
    found += (of_folds - offset).to(found)[:, None, None]
    share, offset = share.to(linear.bias), of_folds.to(linear.bias)
    weight = (linear.weight.transpose(0, 1) * share[..., None])[None]  # [1, K, L, D]
    bias = ((linear.bias.T * share).sum(1) + offset)[None]
    bank = KindBank(Joined(STACK), linear.sites, linear.columns, {"weight": weight, "bias": bias}, solver=linear.solver)
    nothing = torch.zeros(1, n_columns, dtype=torch.int64)
    return _Trained(bank, scored._replace(scores=found.permute(2, 1, 0)), nothing, torch.full((1, n_columns), math.nan))


def shared_columns(wanted: Sequence[Column], held: Sequence[Column]) -> Tensor:
    """Where each of the wanted columns stands among those that are held, [J]."""
    places: Mapping[Column, int] = {column: k for k, column in enumerate(held)}
    return torch.tensor([places[column] for column in wanted], dtype=torch.int64)


def mixture(each: _Trained, n_layers: int, nested: Scored, *, beside: Ended, columns: Tensor) -> FinalProbes:
    """What a kind says beside the joint control: for each of its sites a weighted sum of two logits.

    These are of the nested probe of its layer and its own, weighted by the validation tokens; where that is no better
    there than the nested probe, it is that.  A kind that joins all layers stands beside the layer whose
    nested probe is the best there.  columns [J]: where those of the joint control are among the kind's.
    """
    n_sites, before = each.scored.scores.shape[1], beside.final.penalty
    assert before is not None
    parts = _nothing_added(1 + n_sites, len(columns), n_layers)
    penalty = before[:1].expand(1 + n_sites, -1).clone()
    for j, k in enumerate(columns.tolist()):
        asked = nested.valid[:, j].nonzero()[:, 0]
        of_nested, of_kind = (scored.scores[asked, :, at].T.double() for scored, at in ((nested, j), (each.scored, k)))
        for s, own in enumerate(_weigh(of_nested, of_kind, nested.targets[asked, j]), 1):
            parts["nested"][s, j, 1 + own.layer] = own.nested
            parts["own"][s, j], parts["bias"][s, j] = own.kind, own.bias
            penalty[s, j] = before[1 + own.layer, j]
            if own.kind and penalty[s, j].isinf():
                penalty[s, j] = 0  # it is not the control itself
    sites, tensors = [*beside.feed.sites[:1], *each.bank.sites], {name: part.float() for name, part in parts.items()}
    bank = KindBank(Mixed(), sites, beside.final.bank.columns, tensors, solver=each.bank.solver)
    bank = bank.to(each.bank.bias.device)
    bank.threshold = torch.full(bank.bias.shape, math.nan, dtype=torch.float64)
    norm = beside.final.gradient_norm
    norm = norm if n_sites == n_layers else torch.cat([norm[:1], norm[1:].amax(0, keepdim=True)])
    known = {"half": torch.zeros(len(columns)), "best_pass": torch.zeros(norm.shape, dtype=torch.int64)}
    return FinalProbes(bank.solver, f"{NESTED} {each.bank.kind}", bank, gradient_norm=norm, penalty=penalty, **known)


def _nothing_added(n_sites: int, n_columns: int, n_layers: int) -> dict[str, Tensor]:
    """The parts of mixed probes that are the control at the first site, and 0 at all others."""
    wide = (n_sites, n_columns)
    parts = {
        "nested": torch.zeros(*wide, 1 + n_layers, dtype=torch.float64),
        "own": torch.zeros(wide, dtype=torch.float64),
        "bias": torch.zeros(wide, dtype=torch.float64),
    }
    parts["nested"][0, :, 0] = 1
    return parts


class _Weights(NamedTuple):
    """Of the logits of one probe that mixes them."""

    layer: int  # of the nested one, among the layers
    nested: float
    kind: float
    bias: float


def _weigh(of_nested: Tensor, of_kind: Tensor, targets: Tensor) -> list[_Weights]:
    """The weights of the nested [L + 1, n] and own [S, n] logits for each site of a kind."""
    losses = mean_loss(of_nested, targets)[1:]
    layers = torch.arange(len(losses), device=losses.device) if len(of_kind) == len(losses) else losses.argmin()[None]
    fitted = mix(torch.stack([of_nested[1 + layers], of_kind], 1), targets, near=(1.0, 0.0))
    found = []
    for s, layer in enumerate(layers.tolist()):
        better = bool(fitted.loss[s] < losses[layer])
        weights = [*fitted.weight[s].tolist(), float(fitted.offset[s])] if better else [1.0, 0.0, 0.0]
        found.append(_Weights(layer, *weights))
    return found
