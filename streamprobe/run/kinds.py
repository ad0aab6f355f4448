"""Probes of other kinds than linear: trained behind the linear ones, on which they build, and compared with them.

Running means and all layers side by side are trained by Newton's method beside the linear probes: here they are taken
over.  Others begin at the linear probes' logits and are trained on a sample of the stream's tokens.

Shapes: N tokens, L layers, S sites of a kind (L, or 1 that joins all layers), K columns of the data (with F folds: fold
by fold).
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from streamprobe.activations.drawn import Counts, SampledTokens, sample_tokens
from streamprobe.activations.feed import PROBED
from streamprobe.activations.segments import Segments, sample_segments
from streamprobe.activations.store import ActivationMemory, Part
from streamprobe.probes import attention, network, quadratic
from streamprobe.probes.base import Probes
from streamprobe.probes.kind_bank import KindBank
from streamprobe.probes.kinds import form_of, split_name
from streamprobe.probes.linear import LINEAR, ProbeBank
from streamprobe.reporting.tracking.tracker import Tracker
from streamprobe.run.inputs import Inputs
from streamprobe.run.kind_sizes import most_segments
from streamprobe.run.setup import Setup
from streamprobe.solvers.look_back import Scaling, fit_attention
from streamprobe.solvers.newton import NewtonSolver
from streamprobe.solvers.pointwise import PointwiseKind, PointwiseTokens, fit_pointwise, linear_logits
from streamprobe.solvers.pointwise_kinds import network_kind, quadratic_kind
from streamprobe.solvers.residual import Fitted
from streamprobe.solvers.sparse import Linear, sparse_probes
from streamprobe.system.console import say, shows_progress
from streamprobe.trainer import Job


class TrainedKind(NamedTuple):
    """The probes of one kind, of the data's own columns, as training left them: class-weighted logits, as linear ones.

    A kind without an own scale (`meandiff`) is given one by the validation chains, as all are given a threshold.
    """

    bank: Probes
    best_pass: Tensor  # [S, K]: or the best epoch of those that are trained on a sample
    gradient_norm: Tensor  # [S, K], NaN where there is none
    losses: Tensor | None = None  # [S, K, 2, E] on training and validation tokens, by epoch: see `residual.Fitted`

    @property
    def kind(self) -> str:
        """Its name."""
        return self.bank.kind

    def __str__(self) -> str:
        n = self.best_pass.numel()
        adding = "" if self.losses is None else f", {int((self.best_pass > 0).sum())} of them add to the linear ones"
        return f"{n} probes{adding}"


class Drawn(NamedTuple):
    """Drawn tokens of both splits, with the linear logits."""

    training: PointwiseTokens
    validation: PointwiseTokens


class Splits(NamedTuple):
    """This rank's training and validation tokens in their order, read anew by each call."""

    training: Callable[[], Iterable[Part]]
    validation: Callable[[], Iterable[Part]]


class LinearProbes:
    """The converged linear probes of a run's own columns, and what others need of the solver that found them."""

    def __init__(self, job: Job, inputs: Inputs):
        """`job` is that of the probed layers."""
        assert isinstance(job.solver, NewtonSolver), "others build on converged probes"
        own = [k for k, column in enumerate(job.solver.columns) if not column.control]
        index = torch.tensor(own, device=job.solver.device)
        feed, bank = job.feed, _linear_bank(job)
        self.solver, self.own, self.inputs = job.solver, index, inputs
        folds = None if feed.folds is None else feed.folds[index]
        self.feed = feed._replace(columns=feed.columns[index], folds=folds)
        self.bank = bank.choose(own, torch.full_like(bank.bias[:, index], torch.nan))
        self.positive_weight = inputs.positive_weight_of(self.feed)
        self.best_pass = job.best.best_pass[:, index.cpu()]

    @property
    def mean(self) -> Tensor:
        """Of features [L, D]."""
        return self.solver.mean

    @property
    def scale(self) -> Tensor:
        """Their deviation [L, K, D], over what trains each column's fold."""
        return self.solver.scale[:, self.solver.fold[self.own]]

    def counts(self, split: str) -> Counts:
        """How many tokens of a split each column has, and how many positives, [K] each."""
        columns = self.feed.columns.cpu()
        folds = torch.zeros_like(columns) if self.feed.folds is None else self.feed.folds.cpu()
        censuses = [own[split] for own in self.inputs.fold_censuses]
        valid, positive = (torch.stack([getattr(own, name) for own in censuses]) for name in ("valid", "positive"))
        return Counts(valid[folds, columns], positive[folds, columns])


class KindTrainer:
    """Trains the kinds of a run, each sample of tokens drawn once for all that need it."""

    def __init__(
        self, linear: LinearProbes, splits: Splits, kinds: Sequence[str], *, dtype: torch.dtype, l2: float, seed: int
    ):
        """`kinds` are all that will be asked for; `dtype` is that of the activations."""
        self.kinds = kinds
        self.linear, self.splits, self.dtype, self.l2, self.seed = linear, splits, dtype, l2, seed

    def train(self, kind: str) -> TrainedKind:
        """The probes of a kind that is not trained in the passes over all tokens."""
        family, number = split_name(kind)
        makers = {"meandiff": self._mean_difference, "mlp": self._network, "quad": self._quadratic}
        makers |= {"attn": self._attention, "top_k": self._fewest}
        return makers[family](kind, number)

    def _mean_difference(self, kind: str, number: int) -> TrainedKind:
        """The difference of the means of both classes, which Newton's first gradient is."""
        linear = self.linear
        weight = linear.solver.mean_difference[:, linear.own].clone()
        return self._linear_in_form(kind, weight, -torch.einsum("lkd,ld->lk", weight, linear.mean))

    def _fewest(self, kind: str, number: int) -> TrainedKind:
        """The features that matter most."""
        found = self._sparse[number]
        return self._linear_in_form(kind, found.weight.float(), found.bias.float())

    def _linear_in_form(self, kind: str, weight: Tensor, bias: Tensor) -> TrainedKind:
        bank = self.linear.bank
        made = ProbeBank(bank.sites, bank.columns, weight, bias, solver=NewtonSolver.name, kind=kind)
        return TrainedKind(made, torch.zeros_like(self.linear.best_pass), torch.full(bias.shape, torch.nan))

    def _network(self, kind: str, width: int) -> TrainedKind:
        """A small network beside the linear logit."""
        n_features = self.linear.feed.n_features
        fitted = self._fit_pointwise(network_kind(n_features, width, self.seed), learning_rate=1e-3)
        return self._residual(kind, network.to_raw(fitted.parts, self.linear.mean, self.linear.scale), fitted)

    def _quadratic(self, kind: str, rank: int) -> TrainedKind:
        """A few squares beside the linear logit."""
        fitted = self._fit_pointwise(quadratic_kind(self._tokens.training, rank), learning_rate=1e-2)
        return self._residual(kind, quadratic.to_raw(fitted.parts, self.linear.mean, self.linear.scale), fitted)

    def _attention(self, kind: str, heads: int) -> TrainedKind:
        """A few heads that look back, beside the linear logit."""
        linear = self.linear
        scaling = Scaling(linear.mean, linear.solver.scale.mean(1))
        training, validation = self._segments
        fitted = fit_attention(training, validation, linear.bank, scaling, n_heads=heads, l2=self.l2, seed=self.seed)
        raw = attention.to_raw(fitted.parts, scaling.mean, scaling.scale[:, None])
        return self._residual(kind, raw, fitted)

    def _residual(self, kind: str, raw: dict[str, Tensor], fitted: Fitted) -> TrainedKind:
        """The linear probes with what was found beside them, of raw activations."""
        bank = self.linear.bank
        added = raw.pop("bias", torch.zeros_like(bank.bias))
        parts = {"weight": bank.weight.clone(), "bias": bank.bias + added, **raw}
        made = KindBank(form_of(kind), bank.sites, bank.columns, parts, solver=NewtonSolver.name)
        norm = torch.full(bank.bias.shape, torch.nan)
        return TrainedKind(made, fitted.best_epoch.cpu(), norm, fitted.losses.cpu())

    @cached_property
    def _sparse(self) -> Mapping[int, Linear]:
        """Probes of a few features, of all numbers that are asked for."""
        linear = self.linear
        sizes = [name.number for name in map(split_name, self.kinds) if name.family == "top_k"]
        point = linear.solver.ended[:, linear.own]
        converged, n_valid = Linear(point[..., :-1], point[..., -1]), linear.counts("train").valid
        known: dict[str, Any] = {"n_valid": n_valid, "l2": self.l2, "n_folds": linear.feed.n_folds}
        return sparse_probes(self._tokens.training, converged, sizes, **known)

    def _fit_pointwise(self, kind: PointwiseKind, *, learning_rate: float) -> Fitted:
        training, validation = self._tokens
        options: dict[str, Any] = {"l2": self.l2, "max_epochs": 20, "patience": 2}
        return fit_pointwise(kind, training, validation, learning_rate=learning_rate, seed=self.seed, **options)

    @cached_property
    def _tokens(self) -> Drawn:
        """Drawn tokens of training and of validation, with the linear logits."""
        linear, found = self.linear, []
        for split, parts in (("train", self.splits.training), ("validation", self.splits.validation)):
            rates = linear.counts(split).rates()
            sample: SampledTokens = sample_tokens(
                parts(), linear.feed, rates, positive_weight=linear.positive_weight, shift=self._shift
            )
            base = linear_logits(linear.bank, sample.acts)
            found.append(PointwiseTokens(sample, base, linear.mean, linear.scale))
        return Drawn(*found)

    @property
    def _shift(self) -> float:
        """By which the chances of tokens are moved on: other tokens for another seed."""
        return float(torch.rand((), generator=torch.Generator().manual_seed(self.seed)))

    @cached_property
    def _segments(self) -> tuple[Segments, Segments]:
        """Segments of training and of validation chains."""
        linear = self.linear
        most = most_segments(len(linear.bank.sites), linear.feed.n_features, self.dtype)
        device = linear.bank.bias.device
        options: dict[str, Any] = {"dtype": self.dtype, "device": device, "most": most}
        training, validation = (
            sample_segments(parts(), linear.feed, linear.positive_weight, **options) for parts in self.splits
        )
        return training, validation


def train_kinds(
    setup: Setup, jobs: Sequence[Job], memory: ActivationMemory, held_out: ActivationMemory, *, tracker: Tracker
) -> list[TrainedKind]:
    """The probes of every kind of a run but the linear ones, which the job of the probed layers holds."""
    kinds = [kind for kind in setup.config.probes.kinds if kind not in (LINEAR, "stack")]
    if not kinds:
        return []
    by_feed = {job.feed.name: job for job in jobs if isinstance(job.solver, NewtonSolver)}
    linear, training = linear_probes(jobs, setup.inputs), setup.config.training
    splits = Splits(
        partial(memory.every_in_order, partial(setup.read_pass, 1)),
        partial(held_out.every_in_order, setup.read_validation),
    )
    trainer = KindTrainer(linear, splits, kinds, dtype=memory.sizes.dtype, l2=training.l2, seed=training.seed)
    found = []
    with tqdm(total=len(kinds), unit="kind", leave=False, disable=not shows_progress()) as bar:
        for kind in kinds:
            started, own = time.monotonic(), by_feed.get(kind)
            bar.set_description(kind)
            found.append(_of_job(own, kind, linear) if own else trainer.train(kind))
            if found[-1].losses is not None:
                tracker.epochs(found[-1].bank, found[-1].losses)
                tracker.flush()
            bar.clear()
            say(f"{kind:<9}{time.monotonic() - started:>9.1f} s   {found[-1]}")
            bar.update()
    return found


def linear_probes(jobs: Sequence[Job], inputs: Inputs) -> LinearProbes:
    """The converged probes of the layers."""
    return next(
        LinearProbes(job, inputs) for job in jobs if job.feed.name == PROBED and isinstance(job.solver, NewtonSolver)
    )


def _linear_bank(job: Job) -> ProbeBank:
    """The best probes of a job whose probes are linear."""
    assert isinstance(job.best.bank, ProbeBank)
    return job.best.bank


def _of_job(job: Job, kind: str, linear: LinearProbes) -> TrainedKind:
    """The probes that Newton's method trained on features of their own, as probes of what the layers hold."""
    bank = _linear_bank(job)
    weight, sites = bank.weight, linear.bank.sites
    if form_of(kind).joined:
        weight = weight.unflatten(2, (len(sites), -1))
    made = KindBank(form_of(kind), sites, bank.columns, {"weight": weight, "bias": bank.bias}, solver=job.solver.name)
    return TrainedKind(made, job.best.best_pass, job.solver.gradient_norm.cpu())
