"""The chains of a finished stream, for what is done with its probes: its checkpoint holds them; no data are read."""

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from streamprobe.config.load import RunConfig
from streamprobe.data.counts import Counts
from streamprobe.data.dataset import NOT_FINITE, Dataset
from streamprobe.errors import InputError
from streamprobe.run.checkpoint import STATE, load_run
from streamprobe.run.inputs import Texts, open_texts
from streamprobe.run.opened import check_chains
from streamprobe.run.streaming.opening import dataset_of
from streamprobe.run.streaming.samples import make_samples
from streamprobe.run.streaming.sources import Format, Opened
from streamprobe.run.streaming.state import read_reached


class KeptChains(NamedTuple):
    """The chains that the last report of a stream was made of, by split, and what reads them."""

    dataset: Dataset
    texts: Texts  # without records
    config: RunConfig  # with what the model settles

    def read(self, bad: Collection[int] = ()) -> Dataset:
        """The chains, but for the rows `bad`, whose activations are infinite or not numbers."""
        counts = Counts.of(self.dataset.counts.as_dict())
        for chain in self.dataset.chains():
            if chain.row in bad:
                counts.take_back(chain.id, NOT_FINITE)
        splits = {
            name: [chain for chain in chains if chain.row not in bad] for name, chains in self.dataset.splits.items()
        }
        return replace(self.dataset, splits=splits, counts=counts)


def open_kept_chains(folder: Path, config: RunConfig) -> KeptChains:
    """Those of the stream in `folder`, whose `config` is that of its config.yaml; its data are not read.

    Raises InputError where the folder has lost them, or holds those of another report.
    """
    checkpoint = load_run(folder)
    if checkpoint is None:
        raise InputError(
            f"{folder}, a stream without {STATE}, which holds the chains that it has kept",
            "the folder as the run wrote it",
            "put it back",
        )
    reached, samples = read_reached(checkpoint), make_samples(config)
    samples.load(checkpoint.states)
    kept = Format(config.data.format, "the chains that the stream has kept", {})
    texts, settled, _ = open_texts(config, lambda _: Opened(kept))
    dataset = dataset_of(config, samples.splits(), Counts.of(reached.counts), reached.section_labels)
    check_chains(folder, dataset)
    return KeptChains(dataset, texts, settled)
