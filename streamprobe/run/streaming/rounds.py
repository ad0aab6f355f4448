"""A stream cut into rounds: so many tokens of training chains, with what came between them."""

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load, save

from streamprobe.data.dataset import SPLITS, ChainMaker
from streamprobe.data.overlap import hash_of
from streamprobe.data.records import Record, Refused
from streamprobe.data.reservoir import pack_chains, unpack_chains
from streamprobe.data.sources import Stream
from streamprobe.data.splits import split_of
from streamprobe.data.tokenize import Chain
from streamprobe.run.streaming.samples import Arrived
from streamprobe.system.distributed import is_main, share_bytes, world

FIRST_RECORDS = 64  # by which it is settled which labels beside the probed ones are known


class Shares(NamedTuple):
    """How chains are divided: by a hash of their problem, or of their id."""

    test: float
    validation: float
    seed: int
    by: str = "problem"  # or `chain`

    def split(self, record: Record) -> str:
        """The split of a record."""
        name = record.id if self.by == "chain" else f"{hash_of(record)}"
        return split_of(name, test_share=self.test, validation_share=self.validation, seed=self.seed)


class Round(NamedTuple):
    """What came of the stream in a round, in its order."""

    arrived: Sequence[Arrived]
    ended: bool  # whether the stream is at its end
    about: dict[str, Any]  # where the stream stands behind it, and what became of all that was read

    @property
    def tokens(self) -> int:
        """Of training chains."""
        return sum(len(each.chain.ids) for each in self.arrived if each.split == "train")

    def splits(self) -> dict[str, list[Chain]]:
        """The chains of every split."""
        return {name: [each.chain for each in self.arrived if each.split == name] for name in SPLITS}


class Rows(NamedTuple):
    """The records of a stream that are still to come, and the stream, which knows where it stands."""

    stream: Stream
    records: Iterator[Record | Refused]


class Given(NamedTuple):
    """A record that a stream has given, and where it then stood."""

    record: Record | Refused
    state: dict[str, Any]


class Rounds:
    """Reads a stream round by round: on rank 0, which tells the others, or on all ranks alike."""

    def __init__(
        self,
        source: Rows | None,
        maker: ChainMaker,
        shares: Shares,
        *,
        stopped: Callable[[], bool],
        first: Sequence[Given] = (),
        everywhere: bool = False,
    ):
        """`source` may be None on other ranks than the first; `maker` makes chains of records; `stopped` ends a round.

        `first` are records that it has given already, to be looked at, and that come now.  `everywhere`: all ranks
        read the same, and the stream itself ends where one of them is stopped.
        """
        self.source, self.maker, self.shares, self.stopped, self.everywhere = source, maker, shares, stopped, everywhere
        self.state: dict[str, Any] | None = None  # behind the last record; None: where the stream itself stands
        self.records = self._records(first)

    def _records(self, first: Sequence[Given]) -> Iterator[Record | Refused]:
        """The records that are to come."""
        for record, self.state in first:
            yield record
        self.state = None
        if self.source:
            yield from self.source.records

    def next(self, most: int) -> Round:
        """The next round: until it has `most` tokens of training chains."""
        found = self._read(most) if self.everywhere or is_main() else None
        return found if found and (self.everywhere or world().size == 1) else _shared(found)

    def _read(self, most: int) -> Round:
        assert self.source is not None
        arrived, tokens, ended = [], 0, True
        for record in self.records:
            made = self.maker.make(record)
            if made is not None:
                assert isinstance(record, Record)
                arrived.append(Arrived(made, self.shares.split(record), hash_of(record)))
                tokens += len(made.ids) * (arrived[-1].split == "train")
            ends = (
                self.state is None and not self.everywhere and self.stopped()
            )  # where all that was looked at has come
            if tokens >= most or ends:
                ended = False
                break
        names = sorted(self.maker.names)
        state = self.source.stream.state() if self.state is None else self.state
        about = {"stream": state, "counts": self.maker.counts.as_dict(), "names": names}
        return Round(arrived, ended, about)


def _shared(found: Round | None) -> Round:
    """The round of rank 0 on every rank."""
    content = share_bytes(b"" if found is None else pack_round(found))
    return found or unpack_round(content)


def pack_round(found: Round) -> bytes:
    """A round as the content of a safetensors file."""
    about = json.dumps({"splits": [each.split for each in found.arrived], "ended": found.ended, "about": found.about})
    tensors = pack_chains([each.chain for each in found.arrived])
    tensors["problems"] = torch.tensor([each.problem for each in found.arrived], dtype=torch.int64)
    tensors["round"] = torch.from_numpy(np.frombuffer(about.encode(), np.uint8).copy())
    return save(tensors)


def unpack_round(content: bytes) -> Round:
    """The round that `pack_round` was given."""
    tensors = load(content)
    known = json.loads(tensors["round"].numpy().tobytes())
    each = zip(unpack_chains(tensors), known["splits"], tensors["problems"].tolist(), strict=True)
    return Round([Arrived(*one) for one in each], known["ended"], known["about"])
