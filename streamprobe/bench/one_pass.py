"""A first pass of 70 probes in as many processes as a launcher starts: `python -m streamprobe.bench.one_pass SHAPE N`.

Rank 0 prints as JSON what that took; see `processes`.
"""

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from streamprobe.bench.shapes import SHAPES
from streamprobe.bench.synthetic import Workbench
from streamprobe.system.console import say
from streamprobe.system.distributed import add, joined, least, moved_bytes, world
from streamprobe.system.hardware import exact_float32


def measured(work: Callable[[], object]) -> dict[str, float]:
    """Seconds that work took on the rank that took longest, and those of all ranks on their processors."""
    least(0)  # all begin together
    started, used, before = time.perf_counter(), time.process_time(), moved_bytes()
    work()
    wall = -least(-round(1e6 * (time.perf_counter() - started))) / 1e6
    sums = torch.tensor([time.process_time() - used, moved_bytes() - before], dtype=torch.float64)
    add(sums)
    cpu, moved = sums.tolist()
    return {"seconds": wall, "cpu_seconds": cpu, "moved_bytes": moved}


@exact_float32()
def measure(shape: str, n_chains: int) -> dict[str, Any]:
    """The bare forward pass, and a first pass with Newton, over n chains of synthetic text."""
    bench = Workbench(SHAPES[shape], n_chains, 8192, torch.device("cpu"))
    grid = bench.grids[1]
    warm = grid._replace(train=grid.train[:2])
    bench.forward(warm.train)
    forward = measured(lambda: bench.forward(grid.train))
    solver, (memory, _) = bench.solver("newton", grid), bench.memories(grid)
    first = measured(lambda: bench.train_pass(grid, [solver], memory))
    return {"processes": world().size, "threads": torch.get_num_threads(), "forward": forward, "pass": first}


if __name__ == "__main__":
    with joined():
        say(json.dumps(measure(sys.argv[1], int(sys.argv[2]))))
