"""The loop and nothing else.

Shapes: N tokens, L sites, K columns.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

from streamprobe.activations.batch import TokenBatch
from streamprobe.activations.feed import Feed
from streamprobe.activations.store import ActivationMemory
from streamprobe.evaluation.metrics import measure
from streamprobe.evaluation.scores import Scored, evaluate
from streamprobe.probes.base import Probes
from streamprobe.probes.early_stopping import BestProbes
from streamprobe.reporting.tracking.tracker import Tracker
from streamprobe.solvers.base import Solver

LOG_TOKENS = 65_536  # training tokens between two points of a loss curve; a pass ends with one too
Source = Callable[[], Iterable[TokenBatch]]


class Job(NamedTuple):
    """A solver at work: the best probes that it has found so far, and what it is fed."""

    solver: Solver
    best: BestProbes
    feed: Feed

    @property
    def name(self) -> str:
        """Of its state in a checkpoint."""
        return f"{self.solver.name}-{self.feed.name}"


class Done(NamedTuple):
    """How far training has come."""

    passes: int = 0
    tokens: int = 0  # seen in them


NOTHING_DONE = Done()


def train(
    jobs: Sequence[Job],
    memory: ActivationMemory,
    source: Callable[[int], Iterator[TokenBatch]],
    validation: Source,
    *,
    tracker: Tracker,
    save: Callable[[Done], None],
    max_passes: int,
    batch_size: int,
    seed: int,
    done: Done = NOTHING_DONE,
) -> Done:
    """Trains until all probes are final or `max_passes` are over; returns how far that was.

    Every pass feeds all solvers.  `source(n)` is pass n over the training chains, `validation()` one trip over the
    validation tokens, `save(done)` what is done after a pass.  `done` is what the checkpoint resumed from was given.
    """
    number, tokens = done
    if number and not finished(jobs, number, max_passes):
        needy = [job for job in jobs if job.solver.needs_first_pass]
        recall(needy, memory, partial(source, 1), batch_size=batch_size, seed=seed + 1)
    while not finished(jobs, number, max_passes):
        number += 1
        live = [job for job in jobs if not job.best.stopped.all()]
        batches = memory.shuffled(partial(source, number), batch_size, seed + number)
        tokens = train_pass(live, batches, tracker, tokens)
        banks = [(job.solver.bank(), job.feed) for job in live]
        for job, (bank, _), scored in zip(live, banks, evaluate(banks, validation()), strict=True):
            judge(job, bank, scored, done=Done(number, tokens), tracker=tracker)
        tracker.compare(tokens)
        tracker.number("progress/pass", number, tokens)
        tracker.number("progress/final_probes", sum(int(job.best.stopped.sum()) for job in jobs), tokens)
        save(Done(number, tokens))
    return Done(number, tokens)


def train_pass(jobs: Sequence[Job], batches: Iterable[TokenBatch], tracker: Tracker, tokens: int) -> int:
    """Feeds every solver all of the batches; returns the tokens seen in all passes, `tokens` before this one."""
    for batch in batches:
        for job in jobs:
            job.solver.step(*job.feed.of(batch))
        tokens += len(batch.chain)
        if tokens % LOG_TOKENS < len(batch.chain):
            log_losses(tracker, jobs, tokens)
    log_losses(tracker, jobs, tokens)
    for job in jobs:
        job.solver.end_pass()
    return tokens


def judge(job: Job, bank: Probes, scored: Scored, *, done: Done, tracker: Tracker) -> None:
    """Takes the probes of `bank` that are the best so far, by their validation scores after a pass."""
    solver, best = job.solver, job.best
    metrics = measure(scored.scores, scored.targets, scored.valid)
    best.update(metrics["f1_at_half"], done.passes, bank, solver.converged)
    for name in ("auroc", "average_precision", "f1", "f1_at_half"):
        tracker.probes(f"{name}/validation", solver, metrics[name], done.tokens)
    tracker.probes("gradient_norm", solver, solver.gradient_norm, done.tokens)


def recall(jobs: Sequence[Job], memory: ActivationMemory, first: Source, *, batch_size: int, seed: int) -> None:
    """The first pass once more, for a resumed run: it fills the memory, and gives solvers what no checkpoint holds."""
    if not (memory.keep or jobs):
        return
    for batch in memory.shuffled(first, batch_size, seed):
        for job in jobs:
            job.solver.step(*job.feed.of(batch))
    for job in jobs:
        job.solver.end_pass()
        job.solver.loss()


def log_losses(tracker: Tracker, jobs: Sequence[Job], tokens: int) -> None:
    """A point on the curves of the loss."""
    for job in jobs:
        tracker.probes("train_loss", job.solver, job.solver.loss(), tokens)


def finished(jobs: Sequence[Job], number: int, max_passes: int) -> bool:
    """Whether nothing is left to train after pass `number`."""
    return number >= max_passes or all(bool(job.best.stopped.all()) for job in jobs)
