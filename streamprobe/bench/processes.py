"""What it costs to share a pass among several processes, on the processors of this machine.

Each number of processes has as many threads in all.  What counts is the work: the seconds of all processes together on
the processors, beside those of one.  Numbers of processes are measured in turn, so that a drift of the machine meets
them all.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from statistics import median
from typing import Any

from streamprobe.errors import InputError
from streamprobe.system.console import warn


def measure_processes(shape: str, chains: int, sizes: Sequence[int], repeats: int) -> dict[str, Any]:
    """Every measurement of `one_pass`, for each number of processes.  Raises InputError for what cannot be measured."""
    cores = len(os.sched_getaffinity(0))
    for name, values, most in (("processes", sizes, cores), ("chains", [chains], 10**6), ("repeats", [repeats], 10**3)):
        wrong = [value for value in values if not 1 <= value <= most]
        if wrong:
            raise InputError(f"{name} {wrong[0]}", f"1 to {most:,}", f"correct --{name}")
    found: dict[int, list[Any]] = {size: [] for size in sizes}
    for _ in range(repeats):
        for size in sizes:
            found[size].append(_run(shape, chains, size, cores // size))
            warn(f"{found[size][-1]['pass']['seconds']:>10.2f} s  first pass, {size} processes")
    return {"shape": shape, "chains": chains, "cores": cores, "runs": found}


def _run(shape: str, chains: int, size: int, threads: int) -> Any:
    """What `one_pass` prints in so many processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}"]
    command = [sys.executable, *launcher, "-m", "streamprobe.bench.one_pass", shape, str(chains)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise InputError(f"a launcher that ended with {done.returncode}", "0", done.stderr.strip()[-2000:])
    return json.loads(done.stdout)


def table(result: dict[str, Any]) -> str:
    """The medians for a person, beside those of the first number of processes."""
    lines = [f"{result['shape']}, {result['chains']} chains, {result['cores']} cores", ""]
    lines += [f"{'processes':>9}{'seconds':>9}{'CPU s':>8}{'x first':>9}{'x its forward':>15}{'GB moved':>10}"]
    first = None
    for size, runs in result["runs"].items():
        seconds, work, moved = (
            median(run["pass"][name] for run in runs) for name in ("seconds", "cpu_seconds", "moved_bytes")
        )
        ratio = median(run["pass"]["cpu_seconds"] / run["forward"]["cpu_seconds"] for run in runs)
        first = first or work
        lines.append(f"{size:>9}{seconds:>9.2f}{work:>8.2f}{work / first:>9.3f}{ratio:>15.3f}{moved / 1e9:>10.3f}")
    return "\n".join(lines)
