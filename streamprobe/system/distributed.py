"""The processes that share the work of a run, on one machine or on many: only this folder knows of ranks.

`accelerate launch` and `torchrun` (under Slurm, too) start W processes of the same command line, each with a rank of
0 .. W - 1.  Chains lie in shards, and the shards s of a rank are those with s mod W equal to it: what a rank does is a
part of what one process does alone, and sums over all ranks differ from its sums by the order of float64 additions.
Rank 0 writes and prints.  In one process alone every function here is a plain identity.  Nothing needs torch before it
is asked for.
Where several processes share one copy of the model, only the first of each such worker is meant (see workers.py).
"""

import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from streamprobe.errors import InputError, first_line, out_of_memory
from streamprobe.system.heartbeat import UNSPOKEN, Heartbeat
from streamprobe.system.launch import World, launched, own_devices, restarts

if TYPE_CHECKING:
    from torch import Tensor

TIMEOUT = 1800.0  # seconds that a rank waits for the others


class Ended(Exception):
    """Another rank has ended the run, and says why."""


class Terminated(BaseException):
    """The launcher, or the batch system, asks this process to end."""


class _Lost(Exception):
    """What all ranks do together has failed: one of them is gone, or late."""


class Group:
    """This process among the others, while they work on a run."""

    def __init__(self, world: World, timeout: float):
        import torch
        from torch import distributed as dist

        self.world, self.timeout, self.moved = world, timeout, 0  # bytes that this rank has given to the others
        self.ranks_each, self.peers = 1, None  # of a worker, and the process group of their first ranks (None: of all)
        n_devices = torch.cuda.device_count()  # which no driver is started for, that would not see what is left then
        cuda = n_devices > 0
        if cuda and world.local_size > n_devices:
            raise InputError(
                f"{world.local_size} processes on a machine with {n_devices} GPUs",
                "a GPU for each",
                "start as many as there are GPUs, or none but one",
            )
        if cuda:
            os.environ["CUDA_VISIBLE_DEVICES"] = own_devices(world, n_devices, os.environ.get("CUDA_VISIBLE_DEVICES"))
            os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")  # so that a rank that is late is an exception
        own = f"streamprobe/{restarts()}"  # a launcher may keep the store of processes that have failed
        wait, backend = timedelta(seconds=timeout), "cpu:gloo,cuda:nccl" if cuda else "gloo"
        met, rank, size = next(dist.rendezvous("env://", timeout=wait))
        known: dict[str, Any] = {"rank": rank, "world_size": size, "timeout": wait}
        dist.init_process_group(backend, store=dist.PrefixStore(f"{own}/start", met), **known)
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=10))  # a line of its own
        self.heart = Heartbeat(dist.PrefixStore(own, store), world.rank, world.size, socket.gethostname())

    def take_part(self, name: str, tensor: "Tensor", *arguments: Any, **options: Any) -> None:
        """An operation of torch.distributed in which all ranks take part, to which this one gives a tensor."""
        self.heart.calls, self.moved = self.heart.calls + 1, self.moved + tensor.nbytes
        self.call(name, *arguments, group=self.peers, **options)

    def call(self, name: str, *arguments: Any, **options: Any) -> None:
        """An operation of torch.distributed, whose failure says that another rank is gone, or late."""
        from torch import distributed as dist

        try:
            getattr(dist, name)(*arguments, **options)
        except RuntimeError as error:
            if out_of_memory(error):
                raise
            raise _Lost(first_line(error)) from error

    def reason(self, error: BaseException) -> BaseException:
        """What is said of what went wrong here."""
        cause = error.__cause__ if isinstance(error, InputError) else error
        in_model = self.ranks_each > 1 and isinstance(cause, RuntimeError)  # where ranks wait for each other too
        if not in_model and not isinstance(error, Terminated | _Lost):
            return error
        said = first_line(cause or error)
        found = self.heart.missing(said, self.timeout)
        if found is not None or in_model:
            return found or error
        what = "SIGTERM, by which a launcher or a batch system ends a process"
        if isinstance(error, _Lost):
            what = f"what all ranks do together, which failed ({said})"
        return InputError(what, "every rank to the end of the run", UNSPOKEN)


_group: Group | None = None


@contextmanager
def joined(timeout: float = TIMEOUT) -> Iterator[None]:
    """This process works with the others that a launcher has started, in this context; alone it works alone.

    Only rank 0 prints on standard output.  Where something goes wrong, the first rank that it happens to says so, and
    the others end without a word, by Ended.
    """
    global _group
    world = launched()
    if world.size == 1:
        yield
        return
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # its sockets would tell of each that is closed
    _group = group = _join(world, timeout)
    before, out, done = signal.signal(signal.SIGTERM, _terminate), sys.stdout, False
    try:
        if world.rank:
            sys.stdout = open(os.devnull, "w", encoding="utf-8")
        yield
        done = True
    except SystemExit as end:  # of --help
        done = not end.code
        raise
    except BaseException as error:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # what ends is not to be ended
        if not group.heart.claim():
            raise Ended from error
        raise group.reason(error) from error
    finally:
        group.heart.stop(left=done)
        sys.stdout, _group = out, None
        signal.signal(signal.SIGTERM, before)


def _join(world: World, timeout: float) -> Group:
    """Meets the other processes.  Raises InputError where they cannot be reached."""
    try:
        return Group(world, timeout)
    except InputError:
        raise
    except (RuntimeError, OSError) as error:
        raise InputError(
            f"rank {world.rank} of {world.size}, which cannot meet the others at {os.environ['MASTER_ADDR']}:"
            f"{os.environ['MASTER_PORT']} ({first_line(error)})",
            "an address that all reach, and a port that is free",
            "give the launcher another one",
        ) from error


def _terminate(*_: object) -> None:
    raise Terminated


def group() -> Group | None:
    """This process among the others, where there are some."""
    return _group


def world() -> World:
    """Which process this is, of how many."""
    return _group.world if _group else World()


def is_main() -> bool:
    """Whether this is the process that writes and prints."""
    return not _group or _group.heart.member == 0


def owner(number: int) -> int:
    """The rank that shard `number` belongs to, or any other piece of work that has a number."""
    return number % world().size


def is_own(number: int) -> bool:
    """Whether piece of work `number` is this rank's."""
    return owner(number) == world().rank


def moved_bytes() -> int:
    """Bytes that this rank has given to operations of all ranks so far."""
    return _group.moved if _group else 0


def before_dying(work: Callable[[], None]) -> None:
    """Has `work` done where this process must end while it waits for a rank that is gone."""
    if _group:
        _group.heart.last_words = work


def add(*tensors: "Tensor") -> None:
    """Puts into each tensor the sum of all ranks'; contiguous ones of the same shape everywhere."""
    for tensor in tensors:
        if _group and tensor.numel():
            _group.take_part("all_reduce", tensor, tensor)


def add_at(tensor: "Tensor", rank: int) -> None:
    """Puts into the tensor of one rank the sum of all ranks'; what the others' hold then is not said."""
    if _group:
        _group.take_part("reduce", tensor, tensor, group_dst=rank)


def share(tensor: "Tensor", source: int = 0) -> "Tensor":
    """The tensor of the rank `source`, written into those of the others, of the same shape."""
    if _group and tensor.numel():
        _group.take_part("broadcast", tensor, tensor, group_src=source)
    return tensor


def share_bytes(content: bytes, source: int = 0) -> bytes:
    """The bytes that the rank `source` has."""
    import torch

    if not _group:
        return content
    size = share(torch.tensor([len(content)]), source)
    own = world().rank == source and content
    room = torch.frombuffer(bytearray(content), dtype=torch.uint8) if own else None
    room = torch.empty(int(size), dtype=torch.uint8) if room is None else room
    return share(room, source).numpy().tobytes()


def least(number: int) -> int:
    """The least of all ranks' numbers."""
    import torch

    if not _group:
        return number
    found = torch.tensor([number])
    _group.take_part("all_reduce", found, found, op=torch.distributed.ReduceOp.MIN)
    return int(found)


def each(number: int) -> list[int]:
    """The number of every rank, by rank."""
    import torch

    found = torch.zeros(world().size, dtype=torch.int64)
    found[world().rank] = number
    add(found)
    return found.tolist()


def gather(tensors: Sequence["Tensor"], counts: Sequence[int], rank: int | None = None) -> list["Tensor"]:
    """Of each tensor [n, ...] those of all ranks, one behind the other, on every rank, or on one: [0, ...] elsewhere.

    counts: n of every rank.
    """
    import torch

    if not _group:
        return list(tensors)
    found = []
    for own in tensors:
        room = own.new_zeros((max(counts), *own.shape[1:]))
        room[: len(own)] = own
        to_here = rank is None or rank == world().rank
        others = [torch.empty_like(room) for _ in counts] if to_here else []
        if room.numel():
            raw, *received = [x.view(torch.uint8) for x in (room, *others)]  # bytes, whatever the numbers are
            if rank is None:
                _group.take_part("all_gather", raw, received, raw)
            else:
                _group.take_part("gather", raw, raw, received or None, group_dst=rank)
        found.append(torch.cat([other[:n] for other, n in zip(others, counts, strict=True)]) if to_here else room[:0])
    return found


@contextmanager
def local_main_first() -> Iterator[None]:
    """What is done here is done by the first process of every machine, and then by its others: what it has downloaded
    is there for them.
    """
    import torch

    first = world().local_rank == 0
    if not first:
        add(torch.zeros(1))
    yield
    if first:
        add(torch.zeros(1))


def agree(what: str, value: str) -> None:
    """Raises InputError unless `value`, of `what`, is the same on every rank."""
    theirs = share_bytes(value.encode()).decode()
    if not _group or least(int(theirs == value)):
        return
    rank, each = least(world().size if theirs == value else world().rank), _group.ranks_each
    raise InputError(
        f"{what} on rank {rank * each} of {world().size * each} that differ from those on rank 0",
        "the same on every machine",
        "use the same versions, model and data everywhere",
    )
