"""A fair sample of the chains of a stream, however long that is, and chains as tensors that a file can hold.

Shapes: T tokens in a chain, N in all chains, C label arrays, A labels whose sections are known.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush

import numpy as np
import torch
from torch import Tensor

from streamprobe.data.tokenize import Chain

OF_TOKENS = ("ids", "codes", "support", "sections", "sentence_end")  # tensors of a chain, a row a token
OF_CHAIN = ("id", "category", "marker", "start", "row", "fold")


@dataclass(frozen=True, order=True)
class Kept:
    """A chain in a reservoir, by falling number: the first to be let go."""

    negative: int  # less its number
    row: int
    chain: Chain = field(compare=False)


class Reservoir:
    """Keeps the chains with the least numbers, as many as have a given number of tokens.

    The number of a chain is a hash of its name, so that the chains that are kept are a sample drawn without replacement
    which does not depend on the order in which they came, nor on who read them (bottom-k sampling: Cohen & Kaplan
    2007).  A chain is kept as long as those that were seen with numbers up to its own have no more tokens than that.
    """

    def __init__(self, most: int):
        """At most so many tokens."""
        self.most, self.tokens = most, 0
        self.least_gone = 2**63  # the least number of a chain that was let go
        self._kept: list[Kept] = []

    def add(self, chain: Chain, number: int) -> None:
        """Takes a chain up if it belongs into the sample; others then leave it."""
        if number >= self.least_gone:
            return
        heappush(self._kept, Kept(-number, chain.row, chain))
        self.tokens += len(chain.ids)
        while self.tokens > self.most:
            gone = heappop(self._kept)
            self.tokens -= len(gone.chain.ids)
            self.least_gone = min(self.least_gone, -gone.negative)

    @property
    def chains(self) -> list[Chain]:
        """Those that are kept, in the order of the stream."""
        return [kept.chain for kept in sorted(self._kept, key=lambda kept: kept.row)]

    def least(self, most: int) -> list[Chain]:
        """Those that a reservoir of at most so many tokens would keep, in the order of the stream."""
        smaller = Reservoir(min(most, self.most))
        for kept in self._kept:
            smaller.add(kept.chain, -kept.negative)
        return smaller.chains

    @property
    def holds_all(self) -> bool:
        """Whether no chain was let go."""
        return self.least_gone == 2**63

    def state(self) -> dict[str, Tensor]:
        """All that `load` needs."""
        kept = sorted(self._kept, key=lambda kept: kept.row)
        numbers = torch.tensor([-each.negative for each in kept], dtype=torch.int64)
        gone = torch.tensor([self.most, self.least_gone - 1], dtype=torch.int64)  # which fits into 63 bits
        return pack_chains([each.chain for each in kept]) | {"numbers": numbers, "gone": gone}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Holds what the reservoir that gave `state` held."""
        most, gone = state["gone"].tolist()
        self.most, self.least_gone, self.tokens, self._kept = most, gone + 1, 0, []
        for chain, number in zip(unpack_chains(state), state["numbers"].tolist(), strict=True):
            heappush(self._kept, Kept(-number, chain.row, chain))
            self.tokens += len(chain.ids)


def pack_chains(chains: Sequence[Chain]) -> dict[str, Tensor]:
    """Chains as tensors, one behind the other: rows of N tokens, and `about`, JSON in bytes."""
    about = [[len(chain.ids), *(getattr(chain, name) for name in OF_CHAIN)] for chain in chains]
    packed = {"about": torch.from_numpy(np.frombuffer(json.dumps(about).encode(), np.uint8).copy())}
    for name in OF_TOKENS if chains else ():
        packed[name] = torch.cat([getattr(chain, name) for chain in chains])
    return packed


def unpack_chains(packed: Mapping[str, Tensor]) -> list[Chain]:
    """The chains that `pack_chains` was given."""
    about = json.loads(packed["about"].numpy().tobytes())
    lengths = [length for length, *_ in about]
    parts = {name: packed[name].split(lengths) for name in OF_TOKENS} if about else {}
    return [
        Chain(**dict(zip(OF_CHAIN, rest, strict=True)), **{name: part[i].clone() for name, part in parts.items()})
        for i, (_, *rest) in enumerate(about)
    ]
