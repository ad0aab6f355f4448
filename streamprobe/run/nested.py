"""What every layer adds to the joint control: nested probes, trained when the probes and the controls are.

Shapes: N tokens, S = L + 1 sites, K columns.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

from streamprobe.activations.batch import TokenBatch
from streamprobe.activations.feed import PROBED, Feed
from streamprobe.activations.shards import Trip
from streamprobe.activations.store import ActivationMemory
from streamprobe.config.schema import TrainingConfig
from streamprobe.evaluation.calibration import recalibrate
from streamprobe.evaluation.rows import JOINT_CHAIN
from streamprobe.evaluation.scores import Scored, evaluate
from streamprobe.probes.kept import FinalProbes
from streamprobe.probes.nested import NESTED, Blocks, NestedProbes
from streamprobe.run.pass_end import QUIET
from streamprobe.solvers.block_matrices import Start
from streamprobe.solvers.nested import NestedSolver
from streamprobe.solvers.newton import NewtonSolver
from streamprobe.system.console import say
from streamprobe.trainer import Done, Job

Validation = Callable[[], Iterable[TokenBatch]]  # one trip over the validation tokens


class NestedJob(NamedTuple):
    """The solver of nested probes, and what it is fed."""

    solver: NestedSolver
    feed: Feed


def nested_feeds(feeds: Sequence[Feed]) -> list[Feed]:
    """What nested probes are fed: the control and the layers of each width; none in a run without that control."""
    controls = [feed for feed in feeds if feed.name == JOINT_CHAIN]
    return [_nested(control, layers) for control in controls for layers in feeds if layers.is_probed]


def _nested(control: Feed, layers: Feed) -> Feed:
    """What those that read the control and one of these layers are fed."""

    def features(batch: TokenBatch) -> Blocks:
        return Blocks(control.features(batch)[:, 0], layers.features(batch))

    sites = [*control.sites, *layers.sites]
    width = control.n_features + layers.n_features
    name = layers.name.replace(PROBED, NESTED, 1)
    return Feed(name, sites, width, features, control.columns, folds=control.folds)


def make_nested(jobs: Sequence[Job], training: TrainingConfig, validation: Validation) -> list[NestedJob]:
    """The jobs of nested probes, one for each width, once Newton's jobs are done, whose matrices are let go."""
    solvers = {job.feed.name: job.solver for job in jobs if isinstance(job.solver, NewtonSolver)}
    feeds = nested_feeds([job.feed for job in jobs if isinstance(job.solver, NewtonSolver)])
    if feeds:
        for done in solvers.values():
            done.factors.clear()
    return [_make_job(feed, solvers, training, validation) for feed in feeds]


def _make_job(
    feed: Feed, solvers: Mapping[str, NewtonSolver], training: TrainingConfig, validation: Validation
) -> NestedJob:
    """One of them."""
    control, layers = solvers[JOINT_CHAIN], solvers[feed.name.replace(NESTED, PROBED, 1)]

    def loss(probes: NestedProbes) -> Tensor:
        return balanced_loss(score_validation(probes, feed, validation), control.positive_weight)

    start, sites = Start.of(control, layers), feed.sites[1:]
    solver = NestedSolver(start, sites, control.columns, loss, tolerance=training.tolerance, seed=training.seed)
    return NestedJob(solver, feed)


def score_validation(probes: NestedProbes, feed: Feed, validation: Validation) -> Scored:
    """The logits of nested probes for the validation tokens."""
    (scored,) = evaluate([(probes, feed)], validation())
    return scored


def balanced_loss(scored: Scored, positive_weight: Tensor) -> Tensor:
    """Mean log-loss [S, K] (float64) of tokens whose positives count `positive_weight` [K] times, as in training."""
    columns = []
    for k, p in enumerate(positive_weight.double().unbind()):
        asked = scored.valid[:, k].nonzero()[:, 0]
        z, y = scored.scores[:, :, k].T.index_select(1, asked).double(), scored.targets[asked, k]
        columns.append((torch.where(y, softplus(-z) * p, softplus(z))).mean(1))
    return torch.stack(columns, 1)


def train_nested(
    job: NestedJob,
    memory: ActivationMemory,
    source: Callable[[int], Trip],
    *,
    begun: Done,
    max_passes: int,
    state: dict[str, Tensor] | None = None,
) -> None:
    """Trains until all nested probes are final or `max_passes` more are over, behind those of the other jobs.

    `source(n)` is pass n over the training chains; of these a memory that keeps tokens holds the first, in its order.
    `begun` is how far the other jobs have come; `state` that of nested probes that are final, of a checkpoint.
    """
    solver, printed = job.solver, time.monotonic()
    if state is not None:
        solver.load(state)
    while not solver.final and int(solver.passes) < max_passes:
        started, number = time.monotonic(), 1 if memory.keep else begun.passes + int(solver.passes) + 1
        for part in memory.in_order(partial(source, number)):
            for batch in part.chunks:
                solver.step(*job.feed.of(batch))
            solver.end_part()
        solver.end_pass()
        if solver.final or int(solver.passes) == max_passes or time.monotonic() - printed >= QUIET:
            printed = time.monotonic()
            say(f"{job.feed.name} {int(solver.passes):<2}{printed - started:>8.1f} s   {describe(solver)}")


def describe(solver: NestedSolver) -> str:
    """Where nested probes stand."""
    final, total, none = int(solver.converged.sum()), solver.converged.numel(), int((solver.chosen_level < 0).sum())
    return f"{final} of {total} nested probes final, {none} leaving the layer out"


def final_nested(job: NestedJob, validation: Validation) -> FinalProbes:
    """The nested probes as training left them, recalibrated on the validation tokens."""
    solver = job.solver
    scored = score_validation(solver.bank(), job.feed, validation)
    bank = solver.bank().mapped(*recalibrate(scored.scores, scored.targets, scored.valid))
    bank.solver = NewtonSolver.name
    bank.threshold = torch.full(bank.bias.shape, torch.nan, dtype=torch.float64)
    best_pass = torch.cat([torch.zeros_like(solver.chosen_pass[:1]), solver.chosen_pass]).cpu()
    half = torch.zeros(len(solver.columns))
    known = {"half": half, "best_pass": best_pass, "gradient_norm": solver.norm, "penalty": solver.penalty}
    return FinalProbes(bank.solver, job.feed.name, bank, **known)
