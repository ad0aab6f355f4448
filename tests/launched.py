"""One command line in several processes that work together, as a launcher starts them."""

import csv
import os
import re
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from forked import Done, forked, nothing

from streamprobe.run import memory_plan
from streamprobe.run.memory_plan import Kept, Plan

# What torch's own sockets say when one is closed:
NOISE = re.compile(r"\[rank|\[W|frame #|Exception raised from|<omitting|\s*$")


def free_port() -> int:
    """A port that nothing listens to."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def launched(
    argv: Sequence[str], size: int, *, prepare: Callable[[], Any] = nothing, only: int | None = None, restart: int = 0
) -> list[Done]:
    """What became of each rank of so many; `prepare` is called in each, or in the rank `only` alone, first."""
    port = free_port()

    def of(rank: int) -> Callable[[], None]:
        def prepared() -> None:
            known = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size}
            known |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RESTART_COUNT": restart}
            os.environ.update({name: str(value) for name, value in known.items()})
            if only in (None, rank):
                prepare()

        return prepared

    return forked(*[argv] * size, each=[of(rank) for rank in range(size)])


def said(done: Done) -> str:
    """What a process has said on standard error."""
    return "".join(line for line in done.err.splitlines(keepends=True) if not NOISE.match(line))


def pooled() -> None:
    """Lets nothing be kept, whatever there is room for: the model reads in every pass."""
    memory_plan.plan_memory = lambda tokens, rooms, **_: Plan(Kept(1_100, False, False), next(iter(rooms)))  # type: ignore[assignment]


def rows_of(folder: str) -> list[dict[str, str]]:
    """The rows of a run's results.csv."""
    return list(csv.DictReader(Path(folder, "results.csv").open()))
