"""Results while a stream goes on: probes are ended on the chains that are kept, and judged by the test chains."""

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from streamprobe.activations.feed import Feed
from streamprobe.activations.store import ActivationMemory
from streamprobe.config.load import RunConfig
from streamprobe.evaluation.results import TestResults
from streamprobe.lags import Column
from streamprobe.probes.early_stopping import BestProbes
from streamprobe.probes.kinds import half_lives_of, looks_back
from streamprobe.probes.linear import ProbeBank
from streamprobe.probes.sites import Site
from streamprobe.reporting.tracking.tracker import Tracker
from streamprobe.run.checkpoint import Unwritten
from streamprobe.run.cost import Cost
from streamprobe.run.ending import Trained, end_run
from streamprobe.run.inputs import Inputs, Texts
from streamprobe.run.jobs import make_feeds, make_jobs
from streamprobe.run.memory_plan import make_memories, plan_run
from streamprobe.run.pass_end import PassEnd
from streamprobe.run.pipeline import train_beside, train_jobs
from streamprobe.run.reader import make_reader
from streamprobe.run.setup import Setup
from streamprobe.run.streaming.learning import Learners
from streamprobe.run.streaming.opening import Reading
from streamprobe.run.streaming.samples import ClassCounts
from streamprobe.solvers.adam import AdamSolver
from streamprobe.solvers.class_means import ClassMeans
from streamprobe.solvers.newton import NewtonSolver
from streamprobe.solvers.reliance import Asked, reliance
from streamprobe.trainer import Done, Fed, Job


class Snapshot(NamedTuple):
    """Probes of a solver that goes on elsewhere, as they are: what judging asks of a solver."""

    name: str
    sites: list[Site]
    columns: list[Column]
    gradient_norm: Tensor  # [L, K] NaN


class Kept(NamedTuple):
    """The chains that a report is made of."""

    inputs: Inputs
    seen: Tensor  # hashes of the problems of training and validation
    holds_all: bool  # whether the training chains are all that the stream has given


def make_report(
    kept: Kept,
    learners: Learners,
    *,
    config: RunConfig,
    texts: Texts,
    reading: Reading,
    facts: Mapping[str, Any],
    folder: Path,
    cost: Cost,
) -> TestResults | None:
    """Ends and judges the probes of a stream as it stands, and writes that; None on other ranks than the first.

    Newton's probes are those of a finite run over the chains that are kept, anchored by the class means of all; Adam's
    are taken as they are.
    """
    inputs = kept.inputs
    setup = _set_up(kept, config=config, texts=texts, reading=reading, facts=facts, cost=copy(cost))
    if reading.backbone.device.type == "cuda":
        torch.cuda.empty_cache()  # so that the plan of memory sees what is free
    plan = plan_run(config, inputs, reading.backbone, setup.feeds, shards=setup.reader.shards, before=None)
    memory, held_out = make_memories(plan, config.training.shards)
    validation = partial(held_out.all_chunks, setup.read_validation)
    solvers = [name for name in config.training.solvers if name != AdamSolver.name]
    device, most = reading.backbone.device, config.training.max_passes
    jobs = make_jobs(inputs, setup.feeds, config.training, kept=plan.kept, device=device, solvers=solvers)
    tracker = Tracker([], [job.solver for job in jobs])
    save = PassEnd(Unwritten(), setup.facts, plan.kept, jobs, tracker, device, begun=Done())
    done = train_jobs(setup, jobs, memory, validation, save=save, begun=Done(), max_passes=most)
    if jobs and not kept.holds_all and config.training.l2 > 0:  # without a penalty a line may have no minimum
        jobs = anchored(jobs, learners.means, memory, setup=setup)
        save = PassEnd(Unwritten(), setup.facts, plan.kept, jobs, tracker, device, begun=done)
        done = train_jobs(setup, jobs, memory, validation, save=save, begun=done, max_passes=done.passes + most)
    nested = train_beside(setup, jobs, memory, validation, save=save, done=done, checkpoint=None)
    streamed = snapshots(learners.adam, setup.feeds, inputs)
    first = config.training.solvers[0] == AdamSolver.name
    jobs = [*streamed, *jobs] if first else [*jobs, *streamed]
    return end_run(Trained(setup, jobs, nested, memory, held_out, plan, done), folder, setup.reader.cost, tracker)


def with_rates(inputs: Inputs, rates: ClassCounts, columns: Sequence[Column]) -> Inputs:
    """The inputs with the class rates of all the stream, so that probes mean probabilities there.

    They are trained class-weighted, so that how often each class comes among the chains that are kept, by chance, is
    not in their logits: only what is added to these says it.  `rates` are those of the stream's `columns`.
    """
    place = {column: k for k, column in enumerate(columns)}
    own = [place[column] for column in inputs.columns]
    valid, positive, of_kept = rates.valid[own], rates.positive[own], inputs.census["train"]
    of_data = torch.tensor([not column.control for column in inputs.columns])  # others are drawn anew in every round
    train = of_kept._replace(
        valid=valid.where(of_data, of_kept.valid), positive=positive.where(of_data, of_kept.positive)
    )
    return replace(inputs, census={**inputs.census, "train": train})


def _set_up(
    kept: Kept,
    *,
    config: RunConfig,
    texts: Texts,
    reading: Reading,
    facts: Mapping[str, Any],
    cost: Cost,
) -> Setup:
    """What stands before the first pass over the chains that are kept."""
    inputs, kinds = kept.inputs, config.probes.kinds
    backbone, embedded = reading.backbone, reading.embedded
    every, half_lives = any(map(looks_back, kinds)), half_lives_of(kinds)
    reader = make_reader(config, inputs, backbone, cost, embedded=embedded, every=every, half_lives=half_lives)
    feeds = make_feeds(inputs, backbone, embedded.width if embedded else None, kinds=kinds)
    known = {**facts, "data_fingerprint": inputs.fingerprint}
    return Setup(config, texts.tokenizer, inputs, backbone, reader, feeds, known, kept.seen)


def anchored(jobs: Sequence[Job], means: Sequence[Fed], memory: ActivationMemory, *, setup: Setup) -> list[Job]:
    """The jobs, which go on: corrected by the class means of all tokens of the stream."""
    of_feed: dict[str, ClassMeans] = {each.feed.name: each.solver for each in means}
    own = [job for job in jobs if job.feed.name in of_feed]
    weights = [setup.inputs.positive_weight_of(job.feed) for job in own]
    asked = [Asked(cast(ProbeBank, job.solver.bank()), job.feed, w) for job, w in zip(own, weights, strict=True)]
    factors = reliance(asked, memory.in_order(partial(setup.read_pass, 1)))
    for job, factor in zip(own, factors, strict=True):
        solver, known = job.solver, of_feed[job.feed.name]
        assert isinstance(solver, NewtonSolver)
        place = {column: k for k, column in enumerate(known.columns)}
        difference = solver.mean_difference.double().clone()
        of_all = known.difference().to(difference)
        for k, column in enumerate(solver.columns):
            if column in place:
                difference[:, k] = of_all[:, place[column]]
        solver.anchor(difference, factor)
    return [job._replace(best=BestProbes(job.solver.bank(), None)) if job.feed.name in of_feed else job for job in jobs]


def snapshots(adam: Sequence[Fed], feeds: Sequence[Feed], inputs: Inputs) -> list[Job]:
    """Adam's probes as they are, of the columns that a report has."""
    by_name = {feed.name: feed for feed in feeds}
    found = []
    for each in adam:
        solver, feed = each.solver, by_name.get(each.feed.name)
        if feed is None:
            continue
        kept = {inputs.columns[k]: k for k in feed.columns.tolist()}
        own = [k for k, column in enumerate(solver.columns) if column._replace(seed=_seed(column)) in kept]
        bank = solver.bank().choose(own, torch.full_like(solver.bank().bias[:, own], torch.nan))
        columns = torch.tensor([kept[column._replace(seed=_seed(column))] for column in bank.columns])
        norm = torch.full_like(bank.bias, torch.nan)
        best = BestProbes(bank, None)
        best.best_pass.fill_(1)  # the stream itself
        solver_now: Any = Snapshot(solver.name, bank.sites, bank.columns, norm)
        found.append(Job(solver_now, best, feed._replace(columns=columns).to(norm.device)))
    return found


def _seed(column: Column) -> int:
    """The seed of a column's labels, which those of the data have none of: a seed is then where Adam starts."""
    return column.seed if column.control else 0
