"""A stream under way."""

import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from streamprobe.config.load import RunConfig
from streamprobe.data.counts import Counts
from streamprobe.data.dataset import Dataset
from streamprobe.reporting.tracking.tracker import Tracker
from streamprobe.run.checkpoint import Checkpoint
from streamprobe.run.cost import Cost
from streamprobe.run.streaming.learning import Learners
from streamprobe.run.streaming.opening import OpenStream, Reading, dataset_of
from streamprobe.run.streaming.samples import Samples
from streamprobe.run.streaming.state import Reached, make_checkpoint


@dataclass
class Underway:
    """A stream under way: what stays as it is, what grows, and how far it is."""

    opened: OpenStream
    reading: Reading
    learners: Learners
    samples: Samples
    reached: Reached
    facts: dict[str, Any]
    folder: Path
    tracker: Tracker
    cost: Cost
    ended: bool = False
    lap: float = field(default_factory=time.perf_counter)  # when the last round ended
    printed: float = -math.inf  # when a line of a round was

    @property
    def config(self) -> RunConfig:
        """With what the data and the model have settled."""
        return self.opened.config

    @property
    def room(self) -> int:
        """Tokens that the next round may have."""
        most = self.config.stream.max_tokens
        usual = self.config.stream.round_tokens
        return usual if most is None else min(usual, most - self.reached.tokens)

    @property
    def is_full(self) -> bool:
        """Whether it has as many tokens as were asked for."""
        return self.room <= 0

    @property
    def reports_asked(self) -> int:
        """How many reports should have been made by now."""
        every = self.config.stream.report_tokens
        return 0 if every is None else self.reached.tokens // every

    @property
    def is_report_due(self) -> bool:
        """Whether so many tokens have come since the last report."""
        return self.reports_asked > self.reached.reports

    @property
    def dataset(self) -> Dataset:
        """The chains that are kept, as those of a run."""
        counts = Counts.of(self.reached.counts)
        return dataset_of(self.config, self.samples.splits(), counts, self.opened.section_labels)

    def checkpoint(self) -> Checkpoint:
        """Where it stands, sharing no memory with what goes on: all ranks call it."""
        states = self.samples.state() | self.learners.state()
        return make_checkpoint(self.reached, states, self.reading.embedded, self.facts)
