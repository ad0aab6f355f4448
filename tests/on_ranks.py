"""Work done by several processes that know of each other, forked from this one."""

import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from forked import FORK
from launched import free_port

from streamprobe.system.distributed import joined


def _work(rank: int, size: int, port: int, given: tuple[Callable[[], Any], Path]) -> None:
    known = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size}
    known |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in known.items()})
    work, folder = given
    status = 1
    try:
        with joined(timeout=60.0):
            torch.save(work(), folder / f"{rank}.pt")
        status = 0
    except BaseException:
        traceback.print_exc()
    os._exit(status)


def on_ranks(work: Callable[[], Any], size: int, folder: Path) -> list[Any]:
    """What `work` gives on each of so many ranks; `folder` is an empty one to hand that over in."""
    folder.mkdir()
    port = free_port()
    children = [FORK.Process(target=_work, args=(rank, size, port, (work, folder))) for rank in range(size)]
    for child in children:
        child.start()
    for child in children:
        child.join(100)
        if child.is_alive():
            child.kill()
    assert [child.exitcode for child in children] == [0] * size
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(size)]
