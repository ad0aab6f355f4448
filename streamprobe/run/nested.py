"""What every layer adds to the joint control: nested probes, trained when the probes and the controls are.

Shapes: N tokens, S = L + 1 sites, K columns.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

from streamprobe.activations.batch import TokenBatch
from streamprobe.activations.feed import Feed
from streamprobe.activations.store import ActivationMemory
from streamprobe.config.schema import TrainingConfig
from streamprobe.evaluation.calibration import recalibrate
from streamprobe.evaluation.scores import Scored, evaluate
from streamprobe.probes.kept import NESTED, FinalProbes
from streamprobe.probes.nested import Blocks, NestedProbes
from streamprobe.run.jobs import PROBED
from streamprobe.solvers.block_matrices import Start
from streamprobe.solvers.nested import NestedSolver
from streamprobe.solvers.newton import NewtonSolver
from streamprobe.system.console import say
from streamprobe.trainer import Done, Job

CONTROL = "joint+chain"  # the control that layers are added to


class NestedJob(NamedTuple):
    """The solver of nested probes, and what it is fed."""

    solver: NestedSolver
    feed: Feed


def nested_feed(feeds: Sequence[Feed]) -> Feed | None:
    """What nested probes are fed: the control and the layers; None in a run without that control."""
    by_name = {feed.name: feed for feed in feeds}
    if CONTROL not in by_name:
        return None
    control, layers = by_name[CONTROL], by_name[PROBED]

    def features(batch: TokenBatch) -> Blocks:
        return Blocks(control.features(batch)[:, 0], layers.features(batch))

    sites = [*control.sites, *(site.nested for site in layers.sites)]
    return Feed(NESTED, sites, control.n_features + layers.n_features, features, control.columns)


def make_nested(
    jobs: Sequence[Job], feed: Feed, training: TrainingConfig, validation: Callable[[], Iterable[TokenBatch]]
) -> NestedJob | None:
    """The job of nested probes, once those of Newton's solver are done; None in a run without that solver."""
    solvers = {job.feed.name: job.solver for job in jobs if isinstance(job.solver, NewtonSolver)}
    if not solvers:
        return None
    control = solvers[CONTROL]
    feed = feed._replace(columns=feed.columns.to(control.device))

    def loss(probes: NestedProbes) -> Tensor:
        scored = score_validation(probes, feed, validation)
        return log_loss(scored, *recalibrate(scored.scores, scored.targets, scored.valid))

    start = Start.of(control, solvers[PROBED])
    options = {"tolerance": training.tolerance, "seed": training.seed}
    return NestedJob(NestedSolver(start, feed.sites[1:], control.columns, loss, **options), feed)


def score_validation(probes: NestedProbes, feed: Feed, validation: Callable[[], Iterable[TokenBatch]]) -> Scored:
    """The logits of nested probes for the validation tokens."""
    (scored,) = evaluate([(probes, feed)], validation())
    return scored


def log_loss(scored: Scored, slope: Tensor, offset: Tensor) -> Tensor:
    """Mean log-loss [S, K] (float64, nats a token) of the logits slope z + offset; slope, offset [S, K]."""
    columns = []
    for k in range(scored.targets.shape[1]):
        asked = scored.valid[:, k].nonzero()[:, 0]
        z = scored.scores[:, :, k].T.index_select(1, asked).double() * slope[:, k, None] + offset[:, k, None]
        columns.append((softplus(z) - scored.targets[asked, k] * z).mean(1))
    return torch.stack(columns, 1)


def train_nested(
    job: NestedJob,
    memory: ActivationMemory,
    source: Callable[[int], Iterator[TokenBatch]],
    *,
    begun: Done,
    max_passes: int,
) -> None:
    """Trains until all nested probes are final or `max_passes` more are over, behind those of the other jobs.

    `source(n)` is pass n over the training chains; `begun` is how far these had come.
    """
    solver, printed = job.solver, time.monotonic()
    while not solver.final and int(solver.passes) < max_passes:
        started = time.monotonic()
        for batch in memory.in_order(partial(source, begun.passes + int(solver.passes) + 1)):
            solver.step(*job.feed.of(batch))
        solver.end_pass()
        if solver.final or time.monotonic() - printed >= 1:
            printed = time.monotonic()
            say(f"nested {int(solver.passes):<2}{printed - started:>8.1f} s   {describe(solver)}")


def describe(solver: NestedSolver) -> str:
    """Where nested probes stand."""
    final, total, none = int(solver.converged.sum()), solver.converged.numel(), int((solver.chosen_level < 0).sum())
    return f"{final} of {total} nested probes final, {none} without the layer"


def final_nested(
    job: NestedJob, half: Tensor, validation: Callable[[], Iterable[TokenBatch]]
) -> FinalProbes:
    """The nested probes as training left them, recalibrated on the validation tokens; half [K] as in FinalProbes."""
    solver = job.solver
    scored = score_validation(solver.bank(), job.feed, validation)
    bank = solver.bank().mapped(*recalibrate(scored.scores, scored.targets, scored.valid))
    bank.solver = NewtonSolver.name
    bank.threshold = torch.full(bank.bias.shape, torch.nan, dtype=torch.float64)
    best_pass = torch.cat([torch.zeros_like(solver.chosen_pass[:1]), solver.chosen_pass]).cpu()
    known = {"half": half, "best_pass": best_pass, "gradient_norm": solver.norm, "penalty": solver.penalty}
    return FinalProbes(bank.solver, NESTED, bank, **known)
