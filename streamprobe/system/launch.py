"""What a launcher says of this process, in its environment.  Nothing here needs torch."""

import os
from typing import NamedTuple


class World(NamedTuple):
    """Which process this is, of how many; and of those on this machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1


def launched() -> World:
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
    return launched().size > 1


def restarts() -> int:
    """How often a launcher has started this process anew, after one of the ranks had failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def was_restarted() -> bool:
    """Whether a launcher has started this process anew."""
    return restarts() > 0


def own_devices(world: World, n: int, visible: str | None) -> str:
    """The part of the machine's n GPUs that is this process's, as CUDA_VISIBLE_DEVICES names them.

    `visible` is what that says of all.
    """
    names = visible.split(",")[:n] if visible else [str(number) for number in range(n)]
    each = n // world.local_size
    return ",".join(names[world.local_rank * each : (world.local_rank + 1) * each])
