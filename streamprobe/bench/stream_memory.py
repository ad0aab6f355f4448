"""Whether the memory of a stream grows with its length: chains of the demo, piped into a run as they are made up.

Each length is a run of its own, from its first chain to its files, whose reservoirs are full long before it ends.
"""

import json
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from streamprobe.demo.task import make_problem, make_row
from streamprobe.errors import InputError
from streamprobe.system.console import warn
from streamprobe.system.shipped import shipped_configs

KEYS = (  # of a run that spends its time on the stream
    "--streaming true --data - --layers 1 --lags 8 --targets token --controls position --max_passes 8 --bootstrap 20 "
    "--reservoir_tokens 100000 --test_tokens 50000 --report_to none"
).split()
LEAST, MOST = 10_000, 10**9  # tokens of a run


def measure_streams(lengths: Sequence[int]) -> list[dict[str, Any]]:
    """Tokens, seconds and the peak of memory of a run over as many tokens of training chains as each length says.

    Raises InputError for a length that cannot be measured.
    """
    for length in lengths:
        if not LEAST <= length <= MOST:
            raise InputError(f"tokens {length}", f"{LEAST:,} to {MOST:,}", "correct --tokens")
    found = []
    for length in lengths:
        found.append(_run(length))
        warn(f"{found[-1]['seconds']:>10.1f} s  {length:,} tokens")
    return found


def made_up_chains(seed: int = 0) -> Iterator[dict[str, str]]:
    """Chains of the demo's task without an end."""
    rng = random.Random(seed)
    return (make_row(make_problem(rng), f"subset-sum_{number}") for number in count())


def _run(length: int) -> dict[str, Any]:
    """A run over so many tokens, in a process of its own that is fed as fast as it reads."""
    with TemporaryDirectory() as folder:
        keys = [*KEYS, "--max_tokens", str(length), "--output_dir", f"{folder}/run"]
        command = [sys.executable, "-m", "streamprobe", "train", str(shipped_configs()["demo"]), *keys]
        start, said = time.perf_counter(), Path(folder, "said")
        with said.open("w") as out, subprocess.Popen(command, stdin=subprocess.PIPE, stdout=out, stderr=out) as child:
            assert child.stdin
            with suppress(BrokenPipeError):  # once it has enough
                for row in made_up_chains():
                    child.stdin.write(json.dumps(row).encode() + b"\n")
            with suppress(BrokenPipeError):
                child.stdin.close()
        if child.returncode:
            raise InputError(f"a run that ended with {child.returncode}", "0", said.read_text()[-2000:])
        cost = json.loads(Path(folder, "run", "summary.json").read_text())["run"]
        seconds = time.perf_counter() - start
        return {"tokens": length, "seconds": seconds, "peak_memory_gb": cost["peak_memory_gb"]}


def table(found: Sequence[dict[str, Any]]) -> str:
    """The numbers for a person, beside those of the first length."""
    lines = [f"{'tokens':>12}{'seconds':>9}{'tokens/s':>10}{'peak GB':>9}{'x first':>9}"]
    first = found[0]["peak_memory_gb"]
    for each in found:
        peak, rate = each["peak_memory_gb"], each["tokens"] / each["seconds"]
        lines.append(f"{each['tokens']:>12,}{each['seconds']:>9.1f}{rate:>10,.0f}{peak:>9.2f}{peak / first:>9.3f}")
    return "\n".join(lines)
