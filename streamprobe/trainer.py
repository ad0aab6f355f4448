"""The loop and nothing else.

Shapes: N tokens, L sites, K columns.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor

from streamprobe.activations.batch import TokenBatch
from streamprobe.activations.feed import Feed
from streamprobe.activations.shards import Trip
from streamprobe.activations.store import ActivationMemory, Part
from streamprobe.evaluation.metrics import measure
from streamprobe.evaluation.scores import evaluate
from streamprobe.probes.early_stopping import BestProbes
from streamprobe.reporting.tracking.tracker import Tracker
from streamprobe.solvers.base import Solver
from streamprobe.system.distributed import each, least, owner

NO_PART = 2**31  # the number of the first part of a rank that has none
LOG_TOKENS = 65_536  # training tokens between two points of a loss curve; a pass ends with one too
Source = Callable[[], Iterable[TokenBatch]]


class Fed(NamedTuple):
    """What is fed the tokens of a pass, and what of them."""

    solver: Any  # a Solver, or what is fed like one
    feed: Feed


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
    source: Callable[[int], Trip],
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

    Every pass feeds all solvers.  `source(n)` is pass n over the training chains, `validation()` one trip over this
    rank's validation tokens, `save(done)` what is done after a pass.  `done` is what the checkpoint resumed from was
    given.
    """
    number, tokens = done
    if number and memory.keep and not finished(jobs, number, max_passes):
        memory.fill(partial(source, 1))
    while not finished(jobs, number, max_passes):
        number += 1
        live = [job for job in jobs if not job.best.stopped.all()]
        shuffles = any(job.solver.shuffles for job in live)
        order = partial(memory.shuffled, multiple=batch_size, seed=seed + number) if shuffles else memory.in_order
        tokens = train_pass(live, order(partial(source, number)), tracker, tokens)
        judge(live, validation, done=Done(number, tokens), tracker=tracker)
        tracker.number("progress/pass", number, tokens)
        tracker.number("progress/final_probes", sum(int(job.best.stopped.sum()) for job in jobs), tokens)
        save(Done(number, tokens))
    return Done(number, tokens)


def train_pass(jobs: Sequence[Job | Fed], parts: Iterable[Part], tracker: Tracker, tokens: int) -> int:
    """Feeds every solver the tokens of a pass; returns those seen in all passes, `tokens` before this one.

    A solver that sums is fed the parts of this rank; one that takes a step after another is fed all, on every rank.
    """
    stepping = [job for job in jobs if job.solver.shuffles]
    seen, begun = 0, False
    for part in parts:
        fed = jobs if part.is_own else stepping
        for batch in part.chunks:
            if not begun:
                begin(jobs, batch, part.number)
                begun = True
            for job in fed:
                job.solver.step(*job.feed.of(batch))
            seen += len(batch.chain)
            if stepping and (tokens + seen) % LOG_TOKENS < len(batch.chain):
                log_losses(tracker, stepping, tokens + seen)
        for job in fed:
            job.solver.end_part()
    if not begun:
        begin(jobs, None, NO_PART)
    tokens += seen if stepping else sum(each(seen))
    for job in jobs:
        job.solver.end_pass()
    log_losses(tracker, jobs, tokens)
    return tokens


def begin(jobs: Sequence[Job | Fed], batch: TokenBatch | None, part: int) -> None:
    """Tells every solver of the first tokens of a pass, which are those of one rank; `batch` and `part` are this one's.

    All ranks take part, also one without a token.
    """
    source = owner(least(part))
    for job in jobs:
        job.solver.begin(None if batch is None else job.feed.features(batch), source)


def judge(jobs: Sequence[Job], validation: Source, *, done: Done, tracker: Tracker) -> None:
    """Takes the best probes so far after a pass, and shows how they do.

    Those that stop by their validation score are judged after each pass; others, to be looked at, after passes 1, 2, 4,
    8 and so on, and once more when a run ends.
    """
    banks = [(job, job.solver.bank()) for job in jobs]
    judged = [(job, bank) for job, bank in banks if is_looked_at(job, done)]
    scored = evaluate([(bank, job.feed) for job, bank in judged], validation()) if judged else []
    scores = {}
    for (job, _), own in zip(judged, scored, strict=True):
        metrics = measure(own.scores, own.targets, own.valid)
        scores[job.name] = metrics["f1_at_half"]
        log_metrics(tracker, job, metrics, done.tokens)
    for job, bank in banks:
        job.best.update(done.passes, bank, job.solver.converged, scores.get(job.name))
        tracker.probes("gradient_norm", job.solver, job.solver.gradient_norm, done.tokens)
    if judged:
        tracker.compare(done.tokens)


def is_looked_at(job: Job, done: Done) -> bool:
    """Whether the validation scores of a job are looked at after this pass."""
    return job.best.patience is not None or done.passes & (done.passes - 1) == 0


def log_metrics(tracker: Tracker, job: Job, metrics: Mapping[str, Tensor], tokens: int) -> None:
    """A point on the curves of validation metrics [L, K]."""
    for name in ("auroc", "average_precision", "f1", "f1_at_half"):
        tracker.probes(f"{name}/validation", job.solver, metrics[name], tokens)


def log_losses(tracker: Tracker, jobs: Sequence[Job | Fed], tokens: int) -> None:
    """A point on the curves of the loss."""
    for job in jobs:
        tracker.probes("train_loss", job.solver, job.solver.loss(), tokens)


def finished(jobs: Sequence[Job], number: int, max_passes: int) -> bool:
    """Whether nothing is left to train after pass `number`."""
    return number >= max_passes or all(bool(job.best.stopped.all()) for job in jobs)
