"""The chains that a finished run's probes are judged on: all of other data, or the run's own test chains.

Shapes: K columns.
"""

from collections.abc import Collection, Sequence
from dataclasses import replace

from streamprobe.config.load import RunConfig
from streamprobe.controls.permuted import relabel
from streamprobe.data import preflight
from streamprobe.data.census import Census, count_tokens
from streamprobe.data.counts import Counts
from streamprobe.data.dataset import Dataset, Division
from streamprobe.data.overlap import count_seen, problem_hashes
from streamprobe.errors import InputError
from streamprobe.lags import ONSET, Column
from streamprobe.model.blocks import check_vocabulary
from streamprobe.model.chunks import check_chunks
from streamprobe.probes.kept import KeptProbes
from streamprobe.run.inputs import Inputs, Texts, chains_of, choose_controls, must_chunk
from streamprobe.system.console import say

EVERY = Division(test_share=1.0)  # all chains are test chains


def read_chains(
    config: RunConfig, texts: Texts, own: bool, bad: Collection[int] = (), *, section_labels: Sequence[str]
) -> Dataset:
    """The chains of the data: split as in the run where they are its `own`, else all of them as test chains.

    The rows `bad` are refused; `section_labels` are the run's, whatever labels the data have.  Raises InputError where
    no chain is left.
    """
    found = chains_of(config, texts, bad, None if own else EVERY, section_labels=section_labels)
    if not found.splits["test"]:
        counts = found.counts
        reasons = f" ({counts.n_refused} refused: {preflight.refusals(counts)})" if counts.refused else ""
        raise InputError(
            f"data {config.data.data} without a chain that can be used{reasons}",
            "at least one",
            "fix the data, or give the keys that say how they are read, such as --format and --response_column",
        )
    return found


def columns_of(kept: KeptProbes) -> list[Column]:
    """What is asked of each token [K]: the columns of the probes, and those of controls that change labels."""
    probed = next(each for each in kept.final if each.shared)
    return [column for column in probed.bank.columns if column.control or not column.seed]


def make_inputs(config: RunConfig, texts: Texts, plain: Dataset, columns: list[Column]) -> Inputs:
    """The test chains of `plain` with the labels of controls, and how many tokens each column has.

    Raises InputError where no probe can be judged by them, and for a model that cannot read them.
    """
    labels, training = config.probes.labels, config.training
    controls = choose_controls(config.probes.controls, columns, len(labels), plain)
    dataset = relabel(plain, controls.relabelled, training.seeds, training.seed)
    dataset = replace(dataset, splits={"test": dataset.splits["test"]})
    if not {column.array for column in columns} <= set(dataset.labels):
        raise InputError("a config.yaml that asks for other labels than the probes", "the run's own", "put it back")
    chains = dataset.splits["test"]
    census = count_tokens(chains, columns, dataset.labels)
    check_vocabulary(texts.model_config, max(int(chain.ids.max()) for chain in chains))
    if must_chunk(config, dataset):
        check_chunks(texts.model_config, **config.model.code)
    lines = [f"format    {texts.format}", *preflight.describe_chains(dataset, labels)]
    lines += check_classes(census, columns, labels, plain.counts)
    if any((chain.codes[:, 0] == ONSET).any() for chain in chains):
        lines += ["", preflight.example(chains, labels, texts.tokenizer)]
    return Inputs(dataset, plain.fingerprint(), columns, {"test": census}, [], controls, "\n".join(lines))


def check_classes(census: Census, columns: Sequence[Column], labels: Sequence[str], counts: Counts) -> list[str]:
    """Lines on the probes that cannot be judged, since the data lack a class for them.

    Raises InputError where that are all.
    """
    real = [k for k, column in enumerate(columns) if not column.control]
    lacking = [k for k in real if not 0 < int(census.positive[k]) < int(census.valid[k])]
    never = [label for label in labels if not counts.labels[label]]
    known = ", ".join(name for name, _ in counts.labels.most_common()) or "none"
    if len(lacking) == len(real):
        k = real[0]
        raise InputError(
            f"data in which no probe can be judged: {columns[k]} has {int(census.positive[k])} positive tokens of "
            f"{int(census.valid[k])}",
            f"tokens of both classes of the label {' or '.join(map(repr, labels))} (the data's labels: {known})",
            "give other data, or --label_names NAME=LABEL where the label has another name there",
        )
    lines = [f"label     {label!r} never occurs (the data's labels: {known})" for label in never]
    if lacking:
        lines.append(f"nan       {len(lacking)} of {len(real)} columns lack a class here: their rows hold nan")
    return lines


def count_overlap(kept: KeptProbes, texts: Texts, inputs: Inputs) -> int:
    """How many of the chains have a problem that the run has seen, with a warning where there are any."""
    chains = inputs.dataset.splits["test"]
    n = count_seen(problem_hashes(texts.records, chains), kept.seen)
    if n:
        say(
            f"overlap   {n:,} of {len(chains):,} chains have a problem that trained the probes or chose their "
            "thresholds: on these, a good score says nothing of transfer"
        )
    return n
