"""The loop and nothing else.

Shapes: N tokens, L layers, K columns.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from streamprobe.checkpoint import BestProbes
from streamprobe.errors import InputError
from streamprobe.metrics import measure
from streamprobe.probes import ProbeBank
from streamprobe.solvers import Solver
from streamprobe.stream import ActivationMemory, TokenBatch
from streamprobe.tracking import Tracker

LOG_TOKENS = 65_536  # training tokens between two points of a loss curve; a pass ends with one too
Source = Callable[[], Iterable[TokenBatch]]


class Scored(NamedTuple):
    """A split as the probes see it, on the CPU."""

    scores: Tensor  # [N, L, K] logits, float32
    targets: Tensor  # [N, K] bool
    valid: Tensor  # [N, K] bool
    chain: Tensor  # [N] int64


class Fit(NamedTuple):
    """A solver, and the best probes that it has found so far."""

    solver: Solver
    best: BestProbes


def evaluate(banks: Sequence[ProbeBank], batches: Iterable[TokenBatch]) -> list[Scored]:
    """Every probe's logit for every token, for each bank.  Raises InputError where one is not a number."""
    scores: list[list[Tensor]] = [[] for _ in banks]
    rest = []
    for batch in batches:
        for bank, own in zip(banks, scores, strict=True):
            own.append(bank.scores(batch.acts).cpu())
        rest.append((batch.targets.cpu(), batch.valid.cpu(), batch.chain.cpu()))
    targets, valid, chain = (torch.cat(part) for part in zip(*rest, strict=True))
    result = [Scored(torch.cat(own), targets, valid, chain) for own in scores]
    if any(scored.scores.isnan().any() for scored in result):
        raise InputError(
            "scores that are not numbers", "finite activations and weights", "lower --learning_rate, or --dtype"
        )
    return result


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
        forgetful = [fit.solver for fit in fits if fit.solver.forgetful]
        recall(forgetful, memory, partial(source, 1), batch_size, seed + 1)
    while not finished(fits, number, max_passes):
        number += 1
        live = [fit for fit in fits if not fit.best.stopped.all()]
        for batch in memory.shuffled(partial(source, number), batch_size, seed + number):
            for solver, _ in live:
                solver.step(batch.acts, batch.targets, batch.valid)
            tokens += len(batch.chain)
            if tokens % LOG_TOKENS < len(batch.chain):
                log_losses(tracker, live, tokens)
        log_losses(tracker, live, tokens)
        for solver, _ in live:
            solver.end_pass()
        banks = [solver.bank() for solver, _ in live]
        for (solver, best), bank, scored in zip(live, banks, evaluate(banks, validation()), strict=True):
            metrics = measure(*scored[:3])
            best.update(metrics["f1_at_half"], number, bank, solver.converged)
            for name in ("auroc", "average_precision", "f1", "f1_at_half"):
                tracker.probes(f"val_{name}", solver.name, metrics[name], tokens)
            tracker.probes("gradient_norm", solver.name, solver.gradient_norm, tokens)
            tracker.number(f"progress/final_probes/{solver.name}", int(best.stopped.sum()), tokens)
        tracker.number("progress/pass", number, tokens)
        save(number, tokens)
        tracker.flush()
    return number


def recall(solvers: Sequence[Solver], memory: ActivationMemory, first: Source, batch_size: int, seed: int) -> None:
    """The first pass once more, for a resumed run: it fills the memory, and gives solvers what no checkpoint holds."""
    if not (memory.keep or solvers):
        return
    for batch in memory.shuffled(first, batch_size, seed):
        for solver in solvers:
            solver.step(batch.acts, batch.targets, batch.valid)
    for solver in solvers:
        solver.end_pass()
        solver.loss()


def log_losses(tracker: Tracker, fits: Sequence[Fit], tokens: int) -> None:
    """A point on every loss curve."""
    for solver, _ in fits:
        tracker.probes("train_loss", solver.name, solver.loss(), tokens)


def finished(fits: Sequence[Fit], number: int, max_passes: int) -> bool:
    """Whether nothing is left to train after pass `number`."""
    return number >= max_passes or all(bool(best.stopped.all()) for _, best in fits)
