"""What stands before the first round of a stream: its source, the model, and what the first chains settle.

Shapes: K columns.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

from torch import Tensor

from streamprobe.activations.feed import Feed
from streamprobe.config.load import RunConfig
from streamprobe.controls.embedding import EmbeddingLayers, WordBasis
from streamprobe.controls.permuted import relabelled_columns
from streamprobe.data.counts import Counts
from streamprobe.data.dataset import ChainMaker, Dataset, choose_section_labels
from streamprobe.data.tokenize import Chain, text_options
from streamprobe.lags import INSIDE, make_columns
from streamprobe.model.blocks import context
from streamprobe.run.inputs import Inputs, Texts, choose_controls, fair_controls
from streamprobe.run.jobs import make_feeds
from streamprobe.run.reader import Backbone, embed_controls
from streamprobe.run.streaming.rounds import FIRST_RECORDS, Given, Rounds, Rows, Shares
from streamprobe.run.streaming.sources import open_records
from streamprobe.system.distributed import share_bytes


class OpenStream(NamedTuple):
    """A stream that can be read in rounds, and what is known of it before a chain is."""

    config: RunConfig  # with what the data and the model settle
    texts: Texts  # without records
    rounds: Rounds
    section_labels: Sequence[str]  # those that the control `joint` is given
    writer: Any  # the whole model, where it writes the stream; else None


def open_stream(config: RunConfig, about: Mapping[str, Any], stopped: Callable[[], bool]) -> OpenStream:
    """Opens the stream of a config where the resumed run left it: `about` is what that said, empty in a new run."""
    opened = open_records(config, stopped)
    stream, settled = opened.stream, opened.config
    if about and stream:
        stream.load(about["stream"])
    source = Rows(stream, iter(stream)) if stream else None
    first: list[Given] = []
    if source and not about:
        first = [Given(record, source.stream.state()) for record in islice(source.records, FIRST_RECORDS)]
    labels = about["section_labels"] if about else _section_labels(settled, [given.record for given in first])
    maker = make_maker(settled, opened.texts, labels)
    if about:
        maker.counts, maker.names = Counts.of(about["counts"]), set(about["names"])
    rounds = Rounds(
        source, maker, shares_of(settled), stopped=stopped, first=first, everywhere=opened.writer is not None
    )
    return OpenStream(settled, opened.texts, rounds, labels, opened.writer)


def _section_labels(config: RunConfig, first: Sequence[Any]) -> list[str]:
    """The labels beside the probed ones that the first records have, as rank 0 has read them."""
    found = choose_section_labels(first, config.probes.labels, text_options(vars(config.data)))
    labels: list[str] = json.loads(share_bytes(json.dumps(found).encode()))
    return labels


def make_maker(config: RunConfig, texts: Texts, section_labels: Sequence[str]) -> ChainMaker:
    """What makes the chains of a stream of its records."""
    return ChainMaker(
        texts.tokenizer,
        config.probes.labels,
        context=context(texts.model_config),
        text=text_options(vars(config.data)),
        section_labels=section_labels,
    )


def shares_of(config: RunConfig) -> Shares:
    """How the chains of a stream are divided."""
    data = config.data
    validation = 0.0 if data.validation == "test" else data.validation_share
    by = "problem" if config.stream.source == "generate" else data.split_by  # answers to one problem are twins
    return Shares(data.test_share, validation, data.split_seed, by)


def dataset_of(
    config: RunConfig, splits: Mapping[str, Sequence[Chain]], counts: Counts, section_labels: Sequence[str]
) -> Dataset:
    """Chains of a stream as those of a run."""
    every = {name: splits.get(name, []) for name in ("train", "validation", "test")}
    return Dataset(every, list(config.probes.labels), counts, section_labels)


def controls_of_stream(config: RunConfig, dataset: Dataset) -> list[str]:
    """The controls of a stream that do not know its labels, as its first chains tell.

    Where no label comes in any of them, they do not tell whether a label is there in whole texts alone: it is not.
    Raises InputError as `fair_controls` does.
    """
    positive = any(bool((chain.codes >= INSIDE).any()) for chain in dataset.chains())
    return fair_controls(config, dataset) if positive else list(config.probes.controls)


def ask_of_stream(config: RunConfig, dataset: Dataset, names: Sequence[str]) -> Inputs:
    """What is asked of every token of a stream with the controls of these names: not how often each class comes."""
    probes = config.probes
    real = make_columns(probes.labels, probes.targets, probes.lags)
    controls = choose_controls(names, real, len(probes.labels), dataset)
    columns = relabelled_columns(real, list(controls.relabelled), config.training.seeds)
    return Inputs(dataset, "", columns, {}, [], controls, "")


class Reading(NamedTuple):
    """What the chains of every round are read with."""

    inputs: Inputs
    backbone: Backbone
    embedded: EmbeddingLayers | None
    feeds: list[Feed]  # of linear probes and controls


def make_reading(inputs: Inputs, backbone: Backbone, words: Mapping[str, Tensor]) -> Reading:
    """The same for all rounds; `words` is the basis of embeddings that the resumed run had."""
    if words and inputs.controls.embedded:
        embedding = backbone.model.get_input_embeddings()
        basis = WordBasis(words["mean"].to(backbone.device), words["directions"].to(backbone.device))
        layers = EmbeddingLayers(embedding, basis, backbone.hidden_size, inputs.controls.embedded)
        embedded: EmbeddingLayers | None = layers
    else:
        embedded = embed_controls(inputs, backbone)
    return Reading(inputs, backbone, embedded, make_feeds(inputs, backbone, embedded.width if embedded else None))
