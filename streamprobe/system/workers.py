"""Workers: processes that share one copy of a model that is too large for a device (tensor parallelism).

W processes form W / T workers of T, of ranks that follow each other.  The first rank of a worker takes part in the run,
as a process with the whole model would: to distributed.py these are all processes that there are.  The others follow:
each holds its shard of every matrix, and does with it what its first rank tells it to do, until that one is done.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

from streamprobe.errors import InputError
from streamprobe.system.distributed import Group, World, group, world

if TYPE_CHECKING:
    from torch import Tensor

PATIENCE = timedelta(days=365)  # how long a follower waits to be told something; signs of life say who is gone
DONE = 0  # what the last order says; other numbers are the users' own
DIMENSIONS = ("worker", "pp", "fsdp", "tp")  # of the mesh: transformers asks for the last three
LENGTH = 4  # numbers in an order


class Worker(NamedTuple):
    """The processes that share this one's copy of the model."""

    size: int
    leads: bool  # whether this is the first of them
    mesh: Any  # torch's DeviceMesh of all processes, with `DIMENSIONS`
    orders: Any  # the process group by which the first one tells the others what to do
    joined: Group

    def order(self, *numbers: int) -> list[int]:
        """What the first process tells the others to do, as numbers; these are given by that one alone."""
        import torch

        sent = torch.tensor([*numbers, *[0] * (LENGTH - len(numbers))])
        self.joined.call("broadcast", sent, group=self.orders, group_src=0)
        return sent.tolist()

    def order_bytes(self, content: bytes, length: int) -> bytes:
        """Bytes that go with an order, from the first process to the others."""
        import torch

        room = torch.frombuffer(bytearray(content or length), dtype=torch.uint8)
        self.joined.call("broadcast", room, group=self.orders, group_src=0)
        return room.numpy().tobytes()

    def pass_on(self, tensor: "Tensor") -> "Tensor":
        """The first process's tensor, written into those of the others, on the devices of the model."""
        self.joined.call("broadcast", tensor, group=self.mesh.get_group("tp"), group_src=0)
        return tensor

    def describe(self) -> str:
        """How many processes share a copy of the model, as a line for the terminal."""
        n = world().size
        return f"one copy on {self.size} processes each, {n} worker{'s' * (n > 1)}"


_worker: Worker | None = None


def worker() -> Worker | None:
    """The processes that share this one's copy of the model, where there are others."""
    return _worker


@contextmanager
def in_workers(size: int) -> Iterator[bool]:
    """The processes that a launcher has started form workers of `size`, in this context; for good, once formed.

    Yields whether this is the first of its worker; when that one is done it tells the others.  Raises InputError where
    there are not as many processes as several workers have.
    """
    global _worker
    if size == 1:
        yield True
        return
    found = group()
    n = found.world.size if found else 1
    if not found or n % size:
        raise InputError(
            f"tp_size {size} with {n} process{'es' * (n > 1)}",
            f"a launcher that starts {size} processes, or a multiple of that",
            f"start it by `torchrun --nproc-per-node {size}`, or change --tp_size",
        )
    _worker = formed = _form(found, size)
    try:
        yield formed.leads
        if formed.leads:
            formed.order(DONE)
    finally:
        _worker = None


def _form(found: Group, size: int) -> Worker:
    """Makes workers of the processes."""
    import torch
    from torch import distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    rank, n, *local = found.world
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(0)  # of those left to this process: else the mesh would take that of its local rank
        torch.cuda.init()
    mesh = init_device_mesh("cuda" if cuda else "cpu", (n // size, 1, 1, size), mesh_dim_names=DIMENSIONS)
    every = [range(first, first + size) for first in range(0, n, size)]
    orders = [dist.new_group(list(ranks), timeout=PATIENCE, backend="gloo") for ranks in every]
    peers = dist.new_group(list(range(0, n, size)), timeout=timedelta(seconds=found.timeout))
    found.world, found.ranks_each, found.peers = World(rank // size, n // size, *local), size, peers
    leads = rank % size == 0
    if not leads:
        found.heart.calls = math.nan
    return Worker(size, leads, mesh, orders[rank // size], found)
