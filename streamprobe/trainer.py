"""The loop and nothing else.

Shapes: N tokens, L layers, K columns.
"""

from collections.abc import Callable, Iterable, Iterator
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


def evaluate(bank: ProbeBank, batches: Iterable[TokenBatch]) -> Scored:
    """Every probe's logit for every token.  Raises InputError where one is not a number."""
    parts = [(bank.scores(b.acts).cpu(), b.targets.cpu(), b.valid.cpu(), b.chain.cpu()) for b in batches]
    scored = Scored(*(torch.cat(column) for column in zip(*parts, strict=True)))
    if scored.scores.isnan().any():
        raise InputError(
            "scores that are not numbers", "finite activations and weights", "lower --learning_rate, or --dtype"
        )
    return scored


def train(
    solver: Solver,
    best: BestProbes,
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
    """Trains until all probes are stopped or `max_passes` are over; returns the number of passes.

    `source(n)` is pass n over the training chains, `validation()` one trip over the validation tokens,
    `save(n, tokens)` the checkpoint after pass n.  `done` is what the checkpoint resumed from told `save`.
    """
    number, tokens = done
    if number and memory.keep and not finished(best, number, max_passes):
        memory.fill(partial(source, 1))
    while not finished(best, number, max_passes):
        number += 1
        for batch in memory.shuffled(partial(source, number), batch_size, seed + number):
            solver.step(batch.acts, batch.targets, batch.valid)
            tokens += len(batch.chain)
            if tokens % LOG_TOKENS < len(batch.chain):
                tracker.probes("train_loss", solver.loss(), tokens)
        tracker.probes("train_loss", solver.loss(), tokens)
        bank = solver.bank()
        metrics = measure(*evaluate(bank, validation())[:3])
        best.update(metrics["f1_at_half"], number, bank)
        for name in ("auroc", "average_precision", "f1", "f1_at_half"):
            tracker.probes(f"val_{name}", metrics[name], tokens)
        tracker.number("progress/pass", number, tokens)
        tracker.number("progress/stopped_probes", int(best.stopped.sum()), tokens)
        save(number, tokens)
        tracker.flush()
    return number


def finished(best: BestProbes, number: int, max_passes: int) -> bool:
    """Whether nothing is left to train after pass `number`."""
    return number >= max_passes or bool(best.stopped.all())
