"""One command line in several processes that work together, as a launcher starts them."""

import os
import socket
from collections.abc import Callable, Sequence
from typing import Any

from forked import Done, forked, nothing


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
