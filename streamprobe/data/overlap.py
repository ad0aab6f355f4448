"""Whether other data hold problems that a run has seen, told by hashes, so that its own data are not needed.

Shapes: C chains, P problems that were seen.
"""

from collections.abc import Sequence
from hashlib import blake2b

import torch
from torch import Tensor

from streamprobe.data.records import Record, Refused
from streamprobe.data.splits import same_problem
from streamprobe.data.tokenize import Chain


def problem_hashes(records: Sequence[Record | Refused], chains: Sequence[Chain]) -> Tensor:
    """[C] int64: the problem of each chain, or its response where it has none, as a hash that twins share.

    `records` are those that the chains are made of, in the order of their rows.
    """
    return torch.tensor([hash_of(records[chain.row]) for chain in chains], dtype=torch.int64)


def hash_of(record: Record | Refused) -> int:
    """The problem of a record as a number that twins share, of 64 bits with a sign."""
    assert isinstance(record, Record), "a chain is made of a record"
    plain = str(same_problem(record.origin, record.row)).encode(errors="surrogatepass")
    return int.from_bytes(blake2b(plain, digest_size=8).digest(), "big", signed=True)


def count_seen(hashes: Tensor, seen: Tensor) -> int:
    """How many chains [C] have a problem among those [P] that were seen."""
    return int(torch.isin(hashes, seen).sum())
