"""The processes that share the work of a run, on one machine or on many: the only file that knows of ranks.

`accelerate launch`, `torchrun` and Slurm start W processes of the same command line, each with a rank of 0 .. W - 1.
Chains lie in shards, and the shards s of a rank are those with s mod W equal to it: what a rank does is a part of what
one process does alone, and sums over all ranks differ from its sums by the order of float64 additions.  Rank 0 writes
and prints.  In one process alone every function here is a plain identity.  Nothing needs torch before it is asked for.
"""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

from streamprobe.errors import InputError, first_line, out_of_memory

if TYPE_CHECKING:
    from torch import Tensor

TIMEOUT = 1800.0  # seconds that a rank waits for the others
BEAT = 1.0  # seconds between two signs of life of a rank
SILENT = 40.0  # seconds without one after which a rank is taken for dead, though no connection has broken
GRACE = 15.0  # seconds that a rank has to end by itself once another has ended the run
UNSPOKEN = "the same command with --resume goes on from the last checkpoint"


class World(NamedTuple):
    """Which process this is, of how many; and of those on this machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1


class Ended(Exception):
    """Another rank has ended the run, and says why."""


class Terminated(BaseException):
    """The launcher, or the batch system, asks this process to end."""


class Group:
    """This process among the others, while they work on a run."""

    def __init__(self, world: World, timeout: float):
        import torch
        from torch import distributed as dist

        self.world, self.timeout = world, timeout
        self.calls = self.moved = 0  # collective operations that this rank has entered, and bytes that it gave to them
        self.last_words: Callable[[], None] = lambda: None  # what rank 0 still writes where no exception can end it
        if torch.cuda.is_available():
            _take_devices(world, torch.cuda.device_count())
            os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")  # so that a rank that is late is an exception
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=10))  # a line of its own
        self.store: Any = dist.PrefixStore(f"streamprobe/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        self.done = threading.Event()
        self.store.set(f"host/{world.rank}", socket.gethostname())
        self.thread = threading.Thread(target=self._beat, daemon=True)
        self.thread.start()

    def leave(self) -> None:
        """Ends the signs of life of a rank that needs the others no more."""
        self.done.set()

    def claim(self) -> bool:
        """Whether this is the rank that says why the run ends: the first one that asks."""
        try:
            return self.store.compare_set("ended", "", str(self.world.rank)).decode() == str(self.world.rank)
        except Exception:  # the rank that holds the store is gone: all that are left may speak
            return True

    def _beat(self) -> None:
        """Gives signs of life and looks for those of others, until this rank needs them no more."""
        watched = range(self.world.size) if self.world.rank == 0 else [0]
        seen = {rank: ("", time.monotonic()) for rank in watched if rank != self.world.rank}
        number, ended = 0, 0.0
        while not self.done.wait(BEAT):
            number, now = number + 1, time.monotonic()
            try:
                self.store.set(f"beat/{self.world.rank}", f"{number} {self.calls}")
                ended = ended or (now if self.store.check(["ended"]) else 0.0)
                for rank in list(seen):
                    if self.store.check([f"left/{rank}"]):
                        del seen[rank]
                    elif (beat := self._last_beat(rank)) != seen[rank][0]:
                        seen[rank] = beat, now
            except Exception:  # the rank that holds the store is gone
                ended = ended or now
            silent = [rank for rank, (_, last) in seen.items() if now - last > SILENT]
            if silent or (ended and now - ended > GRACE):
                self._end_here(silent)

    def _end_here(self, silent: list[int]) -> None:
        """Ends this process, whose main thread may wait for ever for a rank that is gone."""
        self.last_words()
        if self.claim() and silent:
            sys.stderr.write(f"streamprobe: {self.silence(silent)}\n")
            sys.stderr.flush()
        os._exit(2)

    def _last_beat(self, rank: int) -> str:
        return self.store.get(f"beat/{rank}").decode() if self.store.check([f"beat/{rank}"]) else ""

    def _beats(self) -> dict[int, str]:
        others = [rank for rank in range(self.world.size) if rank != self.world.rank]
        return {rank: self._last_beat(rank) for rank in others if not self.store.check([f"left/{rank}"])}

    def why(self, error: BaseException) -> InputError:
        """What is said where the others can be reached no more: which ranks are gone, or are late."""
        try:
            before = self._beats()
            time.sleep(4 * BEAT)
            after = self._beats()
        except Exception:
            return self.silence([0])
        silent = [rank for rank in after if after[rank] == before.get(rank)]
        late = [rank for rank, beat in after.items() if beat and int(beat.split()[1]) < self.calls]
        if silent:
            return self.silence(silent)
        if isinstance(error, Terminated):
            return InputError("SIGTERM, by which a launcher or a batch system ends a process", "no signal", UNSPOKEN)
        who = self._named(late) if late else "the other ranks"
        return InputError(
            f"{who}, which did not come to what all ranks do together ({first_line(error)})",
            f"every rank there within {self.timeout:g} s",
            f"see what keeps it; {UNSPOKEN}",
        )

    def silence(self, ranks: list[int]) -> InputError:
        """What is said of ranks that are gone."""
        return InputError(
            f"{self._named(ranks)}, which has ended without a word (killed, or its machine is gone)",
            "every rank to the end of the run",
            UNSPOKEN,
        )

    def _named(self, ranks: list[int]) -> str:
        hosts = []
        for rank in ranks[:4]:
            try:
                hosts.append(f"{rank} on {self.store.get(f'host/{rank}').decode()}")
            except Exception:
                hosts.append(str(rank))
        more = ", ..." if len(ranks) > 4 else ""
        return f"rank {', '.join(hosts)}{more} of {self.world.size}"


_group: Group | None = None


def _launched() -> World:
    """What a launcher says of this process, in its environment."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    try:
        rank, size, local_rank, local_size = (int(os.environ[name]) for name in names)
        int(os.environ["MASTER_PORT"]), os.environ["MASTER_ADDR"]
    except (KeyError, ValueError):
        return World()
    return World(rank, size, local_rank, local_size) if 0 <= rank < size else World()


def was_launched() -> bool:
    """Whether a launcher has started several processes of this command line."""
    return _launched().size > 1


def was_restarted() -> bool:
    """Whether a launcher has started this process anew, after one of the ranks had failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def _take_devices(world: World, n: int) -> None:
    """Leaves this process its own part of the machine's GPUs, before any is used."""
    each = max(1, n // world.local_size)
    names = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(n)))).split(",")
    first = world.local_rank * each % len(names)
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(names[first : first + each])


@contextmanager
def joined(timeout: float = TIMEOUT) -> Iterator[None]:
    """This process works with the others that a launcher has started, in this context; alone it works alone.

    Only rank 0 prints on standard output.  Where something goes wrong, the first rank that it happens to says so, and
    the others end without a word, by Ended.
    """
    global _group
    world = _launched()
    if world.size == 1:
        yield
        return
    before = signal.signal(signal.SIGTERM, _terminate)
    out = sys.stdout
    _group = group = Group(world, timeout)
    try:
        if world.rank:
            sys.stdout = open(os.devnull, "w", encoding="utf-8")
        yield
        group.store.set(f"left/{world.rank}", "")
    except BaseException as error:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # what ends is not to be ended
        if not group.claim():
            raise Ended from error
        if isinstance(error, Terminated | _Lost):
            raise group.why(error) from error
        raise
    finally:
        group.leave()
        sys.stdout, _group = out, None
        signal.signal(signal.SIGTERM, before)


def _terminate(*_: object) -> None:
    raise Terminated


class _Lost(Exception):
    """A collective operation that failed: a rank is gone, or late."""


def world() -> World:
    """Which process this is, of how many."""
    return _group.world if _group else World()


def is_main() -> bool:
    """Whether this is the process that writes and prints."""
    return world().rank == 0


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
        _group.last_words = work


def _together(name: str, tensor: "Tensor", *arguments: Any, **options: Any) -> None:
    """An operation of torch.distributed in which all ranks take part."""
    from torch import distributed as dist

    assert _group
    _group.calls, _group.moved = _group.calls + 1, _group.moved + tensor.nbytes
    try:
        getattr(dist, name)(*arguments, **options)
    except RuntimeError as error:
        if out_of_memory(error):
            raise
        raise _Lost(first_line(error)) from error


def add(*tensors: "Tensor") -> None:
    """Puts into each tensor the sum of all ranks'; contiguous ones of the same shape everywhere."""
    for tensor in tensors if _group else ():
        if tensor.numel():
            _together("all_reduce", tensor, tensor)


def add_at(tensor: "Tensor", rank: int) -> None:
    """Puts into the tensor of one rank the sum of all ranks'; what the others' hold then is not said."""
    if _group:
        _together("reduce", tensor, tensor, rank)


def share(tensor: "Tensor", source: int = 0) -> "Tensor":
    """The tensor of the rank `source`, written into those of the others, of the same shape."""
    if _group and tensor.numel():
        _together("broadcast", tensor, tensor, source)
    return tensor


def share_bytes(content: bytes) -> bytes:
    """The bytes that rank 0 has."""
    import torch

    if not _group:
        return content
    size = share(torch.tensor([len(content)]))
    room = torch.frombuffer(bytearray(content), dtype=torch.uint8) if is_main() and content else None
    room = torch.empty(int(size), dtype=torch.uint8) if room is None else room
    return share(room).numpy().tobytes()


def least(number: int) -> int:
    """The least of all ranks' numbers."""
    import torch

    if not _group:
        return number
    found = torch.tensor([number])
    _together("all_reduce", found, found, op=torch.distributed.ReduceOp.MIN)
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
                _together("all_gather", raw, received, raw)
            else:
                _together("gather", raw, raw, received or None, rank)
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
    """Raises InputError unless `value` is the same on every rank."""
    theirs = share_bytes(value.encode()).decode()
    if least(int(theirs == value)):
        return
    rank = least(world().size if theirs == value else world().rank)
    raise InputError(
        f"rank {rank} of {world().size} with another {what} than rank 0",
        "the same on every machine",
        "use the same versions, model and data everywhere",
    )
