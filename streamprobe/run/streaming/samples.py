"""What is kept of a stream's chains: a bounded sample of each split, and how often each class came.

Shapes: K columns.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple
from zlib import crc32

import numpy as np
import torch
from torch import Tensor

from streamprobe.config.load import RunConfig
from streamprobe.data.reservoir import Reservoir
from streamprobe.data.splits import number_of
from streamprobe.data.tokenize import Chain

MOST_JUDGED = 4  # test tokens by which probes are judged for each that they are trained on: see `Samples.tested`
FEW = 100  # training chains, of fewer of which a control of the text and a chain's own rate learns too little
AT_ONCE = 4_096  # of them that wait to be sorted in
MOST_SEEN = 2**20  # hashes of problems that are kept, by which other data are told to hold the same ones


class Arrived(NamedTuple):
    """A chain of the stream, and where it belongs."""

    chain: Chain
    split: str
    problem: int  # a hash that twins share


class Hashes:
    """Different numbers of 64 bits, the first MOST_SEEN that came, in 8 bytes each."""

    def __init__(self) -> None:
        self._kept = np.empty(0, np.int64)  # rising
        self._new: set[int] = set()  # none of these

    def __len__(self) -> int:
        return len(self._kept) + len(self._new)

    def add(self, number: int) -> None:
        """Takes one up, unless it is there or there is no room."""
        place = int(np.searchsorted(self._kept, number))
        if len(self) < MOST_SEEN and self._kept[place : place + 1].tolist() != [number]:
            self._new.add(number)
            if len(self._new) >= AT_ONCE:
                self._sort()

    def _sort(self) -> None:
        self._kept = np.union1d(self._kept, np.array(sorted(self._new), np.int64))
        self._new.clear()

    @property
    def tensor(self) -> Tensor:
        """All of them, [P] int64, rising."""
        self._sort()
        return torch.from_numpy(self._kept.copy())

    @tensor.setter
    def tensor(self, numbers: Tensor) -> None:
        """Holds these instead, [P] int64, rising."""
        self._kept = numbers.numpy().copy()
        self._new.clear()


class Samples:
    """The chains of a stream that are kept: of training, validation and test."""

    def __init__(self, reservoir_tokens: int, test_tokens: int, seed: int, *, validate_on_test: bool = False):
        """So many tokens of training and of test chains, and half as many for validation; `seed` of the sampling."""
        self.seed, self.validate_on_test = seed, validate_on_test
        self.reservoirs = {
            "train": Reservoir(reservoir_tokens),
            "validation": Reservoir(max(1, test_tokens // 2)),
            "test": Reservoir(test_tokens),
        }
        self.seen = Hashes()  # of problems of training and validation

    def add(self, arrived: Arrived) -> None:
        """Takes up what belongs into a sample."""
        name = f"{arrived.chain.id}/{crc32(arrived.chain.ids.numpy().tobytes())}"  # ids may come again
        number = number_of(name, seed=self.seed, purpose="reservoir")
        self.reservoirs[arrived.split].add(arrived.chain, number)
        if arrived.split != "test" or self.validate_on_test:
            self.seen.add(arrived.problem)

    def splits(self) -> dict[str, Sequence[Chain]]:
        """The chains of every split that are kept."""
        found: dict[str, Sequence[Chain]] = {name: own.chains for name, own in self.reservoirs.items()}
        found["test"] = self.tested()
        return found | ({"validation": found["test"]} if self.validate_on_test else {})

    def tested(self) -> list[Chain]:
        """The test chains that probes are judged by: all that are kept, unless few are kept for training.

        What intervals over test chains know nothing of is how the few training chains were drawn.  With very many test
        chains they would be so narrow that what a control has not learnt of its few looks like what a layer foresees.
        """
        train, test = self.reservoirs["train"], self.reservoirs["test"]
        return test.chains if train.holds_all else test.least(MOST_JUDGED * train.tokens)

    @property
    def cautions(self) -> list[str]:
        """Lines that a report begins with where few chains are kept for training; none where many, or all, are."""
        train, lines = self.reservoirs["train"], []
        used, kept = sum(len(chain.ids) for chain in self.tested()), self.reservoirs["test"].tokens
        if used < kept:
            most = f"at most {MOST_JUDGED} for each that is kept for training (--reservoir_tokens)"
            lines.append(f"judged    by {used:,} of {kept:,} test tokens: {most}")
        if not train.holds_all and len(train.chains) < FEW:
            few = f"{len(train.chains)} chains are kept for training, and {FEW} are few (--reservoir_tokens)"
            lines.append(f"WARNING   {few}: what a control does not learn of so few may look like foresight")
        return lines

    @property
    def seen_hashes(self) -> Tensor:
        """Of the problems that were seen, [P] int64, rising."""
        return self.seen.tensor

    def state(self) -> dict[str, dict[str, Tensor]]:
        """All that `load` needs, by part."""
        return {name: own.state() for name, own in self.reservoirs.items()} | {"seen": {"hashes": self.seen_hashes}}

    def load(self, states: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Holds what those that gave `states` held."""
        for name, own in self.reservoirs.items():
            own.load(states[name])
        self.seen.tensor = states["seen"]["hashes"]


def make_samples(config: RunConfig) -> Samples:
    """Those of a run of this config, still empty."""
    stream, on_test = config.stream, config.data.validation == "test"
    seed = config.data.split_seed
    return Samples(stream.reservoir_tokens, stream.test_tokens, seed, validate_on_test=on_test)


class ClassCounts:
    """How many tokens of the stream's training chains each of K columns has had, and how many positives."""

    def __init__(self, n_columns: int):
        self.valid, self.positive = torch.zeros(2, n_columns, dtype=torch.int64)

    def add(self, valid: Tensor, positive: Tensor) -> None:
        """Adds [K] each."""
        self.valid, self.positive = self.valid + valid, self.positive + positive

    @property
    def positive_weight(self) -> Tensor:
        """Negatives over positives so far [K] float32, as if each had come at least once."""
        negative = (self.valid - self.positive).clamp_min(1)
        return (negative / self.positive.clamp_min(1)).float()
