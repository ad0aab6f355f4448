"""What is learnt of every round as it comes: class means of all tokens for Newton, and Adam's steps.

Shapes: K columns.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from streamprobe.activations.feed import Feed
from streamprobe.activations.store import ActivationMemory, Sizes
from streamprobe.config.load import RunConfig
from streamprobe.controls.permuted import relabel
from streamprobe.data.census import count_tokens
from streamprobe.data.counts import Counts
from streamprobe.data.tokenize import Chain
from streamprobe.model.backbone import pick_dtype
from streamprobe.reporting.tracking.tracker import Tracker
from streamprobe.run.cost import Cost
from streamprobe.run.jobs import make_adam_job
from streamprobe.run.reader import make_reader
from streamprobe.run.streaming.drift import Drift
from streamprobe.run.streaming.opening import Reading, dataset_of
from streamprobe.run.streaming.samples import ClassCounts
from streamprobe.solvers.adam import AdamSolver
from streamprobe.solvers.class_means import ClassMeans
from streamprobe.solvers.newton import NewtonSolver
from streamprobe.system.distributed import is_main
from streamprobe.trainer import Fed, train_pass


class Learners(NamedTuple):
    """All that a round is fed to."""

    means: list[Fed]  # of each feed, where Newton is asked for
    adam: list[Fed]  # of each feed, where Adam is
    drift: Drift
    rates: ClassCounts

    @property
    def fed(self) -> list[Fed]:
        """Those that tokens are fed to."""
        return [*self.means, *self.adam, Fed(self.drift, self.drift.feed)]

    def state(self) -> dict[str, dict[str, Tensor]]:
        """All that `load` needs: all ranks call it."""
        states = {f"means-{each.feed.name}": each.solver.state() for each in self.means}
        states |= {f"adam-{each.feed.name}": each.solver.state() for each in self.adam}
        states["drift"] = {name: tensor.to("cpu", copy=True) for name, tensor in self.drift.state().items()}
        return states | {"rates": {"valid": self.rates.valid.clone(), "positive": self.rates.positive.clone()}}

    def load(self, states: dict[str, dict[str, Tensor]]) -> None:
        """Goes on where those that gave `states` stood."""
        for each in self.means:
            each.solver.load(states[f"means-{each.feed.name}"], is_first=is_main())
        for each in self.adam:
            each.solver.load(states[f"adam-{each.feed.name}"])
        self.drift.load(states["drift"])
        self.rates.valid, self.rates.positive = states["rates"]["valid"], states["rates"]["positive"]


def make_learners(config: RunConfig, reading: Reading) -> Learners:
    """New ones, that have seen nothing."""
    device, inputs, training = reading.backbone.device, reading.inputs, config.training
    means, adam = [], []
    for feed in reading.feeds:
        own = _of_data(feed, inputs.n_real).to(device)
        columns = [inputs.columns[k] for k in own.columns.tolist()]
        if NewtonSolver.name in training.solvers:
            means.append(Fed(ClassMeans(feed.sites, columns, feed.n_features, device), own))
        if AdamSolver.name in training.solvers:
            rates = torch.ones(len(inputs.columns))
            job = make_adam_job(inputs, feed, training, device, positive_weight=rates)
            adam.append(Fed(job.solver, job.feed))
    return Learners(means, adam, Drift(reading.feeds[0].to(device), inputs), ClassCounts(len(inputs.columns)))


def _of_data(feed: Feed, n_real: int) -> Feed:
    """A feed without the columns of controls, whose labels are others in every reading."""
    return feed._replace(columns=feed.columns[feed.columns < n_real])


def learn(
    learners: Learners,
    chains: Sequence[Chain],
    config: RunConfig,
    reading: Reading,
    *,
    number: int,
    step: int,
    tracker: Tracker,
    cost: Cost,
) -> None:
    """Feeds the training chains of round `number` to all learners; `step`: tokens of training chains with these."""
    inputs, training = reading.inputs, config.training
    plain = dataset_of(config, {"train": chains}, Counts(), inputs.dataset.section_labels)
    labelled = relabel(plain, inputs.controls.relabelled, training.seeds, training.seed + number)
    census = count_tokens(labelled.splits["train"], inputs.columns, labelled.labels)
    learners.rates.add(census.valid, census.positive)
    for each in learners.adam:
        weight = learners.rates.positive_weight.to(each.feed.columns.device)
        each.solver.positive_weight = weight[each.feed.columns]
    reader = make_reader(config, replace(inputs, dataset=labelled), reading.backbone, cost, embedded=reading.embedded)
    memory = _make_memory(config, reading, census.tokens, keep=bool(learners.adam))
    if census.tokens:
        trip = partial(reader.trip, "train", training.seed + number, f"round {number}")
        shuffle = partial(memory.shuffled, multiple=training.batch_size, seed=training.seed + number)
        order, before = (shuffle if learners.adam else memory.in_order), step - sum(len(c.ids) for c in chains)
        train_pass(learners.fed, order(trip), tracker, before)
    learners.drift.log(tracker, census, step)


def _make_memory(config: RunConfig, reading: Reading, tokens: int, *, keep: bool) -> ActivationMemory:
    """Room for the tokens of a round, where they are to be shuffled."""
    inputs, backbone = reading.inputs, reading.backbone
    n_layers = len(backbone.widths) + len(inputs.controls.embedded)
    dtype = pick_dtype(config.model.dtype)
    sizes = Sizes(n_layers, backbone.hidden_size, len(inputs.columns), inputs.controls.width, dtype)
    return ActivationMemory(tokens, keep, sizes, backbone.device, n_shards=config.training.shards, tokens=tokens)
