"""The loop and nothing else.

Shapes: N tokens, L layers, K columns.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

from streamprobe.activations.batch import TokenBatch
from streamprobe.activations.store import ActivationMemory
from streamprobe.evaluation.metrics import measure
from streamprobe.evaluation.scores import Scored, Share, evaluate
from streamprobe.probes.early_stopping import BestProbes
from streamprobe.probes.linear import ProbeBank
from streamprobe.reporting.tensorboard.writer import Tracker
from streamprobe.solvers.base import Solver

LOG_TOKENS = 65_536  # training tokens between two points of a loss curve; a pass ends with one too
Source = Callable[[], Iterable[TokenBatch]]


class Fit(NamedTuple):
    """A solver, the best probes that it has found so far, and what both are fed."""

    solver: Solver
    best: BestProbes
    share: Share

    @property
    def name(self) -> str:
        """One of a kind."""
        return f"{self.solver.name}-{self.share.name}"


def train(
    fits: Sequence[Fit],
    memory: ActivationMemory,
    source: Callable[[int], Iterator[TokenBatch]],
    validation: Source,
    tracker: Tracker,
    save: Callable[[int, int], None],
    max_passes: int,
    batch_size: int,
    seed: int,
    done: tuple[int, int] = (0, 0),
) -> int:
    """Trains until all probes are final or `max_passes` are over; returns the number of passes.

    Every pass feeds all solvers.  `source(n)` is pass n over the training chains, `validation()` one trip over the
    validation tokens, `save(n, tokens)` the checkpoint after pass n.  `done` is what the checkpoint resumed from told
    `save`.
    """
    number, tokens = done
    if number and not finished(fits, number, max_passes):
        forgetful = [fit for fit in fits if fit.solver.forgetful]
        recall(forgetful, memory, partial(source, 1), batch_size, seed + 1)
    while not finished(fits, number, max_passes):
        number += 1
        live = [fit for fit in fits if not fit.best.stopped.all()]
        for batch in memory.shuffled(partial(source, number), batch_size, seed + number):
            for solver, _, share in live:
                solver.step(*share.of(batch))
            tokens += len(batch.chain)
            if tokens % LOG_TOKENS < len(batch.chain):
                log_losses(tracker, live, tokens)
        log_losses(tracker, live, tokens)
        for fit in live:
            fit.solver.end_pass()
        banks = [(fit.solver.bank(), fit.share) for fit in live]
        for fit, (bank, _), scored in zip(live, banks, evaluate(banks, validation()), strict=True):
            judge(fit, bank, scored, number, tracker, tokens)
        tracker.maps(tokens)
        tracker.number("progress/pass", number, tokens)
        tracker.write()  # what is logged lies there before the checkpoint that a resumed run goes on from
        save(number, tokens)
        tracker.flush()
    return number


def judge(fit: Fit, bank: ProbeBank, scored: Scored, number: int, tracker: Tracker, tokens: int) -> None:
    """Takes the probes of `bank` that are the best so far, by their validation scores after pass `number`."""
    solver, best, _ = fit
    metrics = measure(*scored[:3])
    best.update(metrics["f1_at_half"], number, bank, solver.converged)
    for name in ("auroc", "average_precision", "f1", "f1_at_half"):
        tracker.probes(f"val_{name}", solver, metrics[name], tokens)
    tracker.probes("gradient_norm", solver, solver.gradient_norm, tokens)
    tracker.number(f"progress/final_probes/{fit.name}", int(best.stopped.sum()), tokens)


def recall(fits: Sequence[Fit], memory: ActivationMemory, first: Source, batch_size: int, seed: int) -> None:
    """The first pass once more, for a resumed run: it fills the memory, and gives solvers what no checkpoint holds."""
    if not (memory.keep or fits):
        return
    for batch in memory.shuffled(first, batch_size, seed):
        for solver, _, share in fits:
            solver.step(*share.of(batch))
    for solver, _, _ in fits:
        solver.end_pass()
        solver.loss()


def log_losses(tracker: Tracker, fits: Sequence[Fit], tokens: int) -> None:
    """A point on every loss curve."""
    for solver, _, _ in fits:
        tracker.probes("train_loss", solver, solver.loss(), tokens)


def finished(fits: Sequence[Fit], number: int, max_passes: int) -> bool:
    """Whether nothing is left to train after pass `number`."""
    return number >= max_passes or all(bool(fit.best.stopped.all()) for fit in fits)
