"""What streamprobe costs beside the limit, the bare forward pass of the truncated model, all measured in one run.

python -m streamprobe.bench.measurements      # SmolLM2-135M's shape on a CPU, else Llama-3.1-8B's
python -m streamprobe.bench.measurements --json bench.json      # every number, with the hardware and the versions
python -m streamprobe.bench.measurements --peer probelab        # one more row, where that package is installed

Each repeat reads the training chains nine times, so a bare forward that takes half a minute makes a run of a quarter of
an hour.  Weights, token ids and labels are random: time does not depend on them, but for the number of passes to
convergence.  The offline way is measured on a few chains, and there for one epoch of one probe; what follows from that
for all of them is marked as extrapolated.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from streamprobe.bench import timings as clockwork
from streamprobe.bench.synthetic import SHAPES, Workbench, count
from streamprobe.bench.timings import JOB, OFFLINE, PASSES, Ledger
from streamprobe.errors import InputError
from streamprobe.run.provenance import device_name, git_commit, versions
from streamprobe.system.console import guard, say
from streamprobe.system.files import check_output, write_output


def facts(bench: Workbench, options: dict[str, Any]) -> dict[str, Any]:
    """What was measured, and on what."""
    grid = bench.grids[1]
    tokens = {
        "train": count(grid.train), "validation": count(grid.validation),
        "train_samples": grid.n_train, "validation_samples": grid.n_validation,
    }  # fmt: skip
    return {
        "device": device_name(bench.device), "cpu": cpu_name(), "threads": torch.get_num_threads(),
        "versions": versions(), "git_commit": git_commit(), "model": bench.shape._asdict(),
        "blocks_run": max(bench.layers) + 1, "options": options, "tokens": tokens,
    }  # fmt: skip


def cpu_name() -> str:
    """The processor, as Linux calls it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text("utf-8", "replace").splitlines() if path.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def headlines(rows: list[dict[str, Any]], tokens: dict[str, int]) -> dict[str, float]:
    """The ratios that matter, by what they say."""
    ratio = {row["what"]: row["ratio"] for row in rows}
    firsts = {f"{name}, x bare forward": ratio[name] for name in PASSES}
    return firsts | {
        "whole job, x bare forward": ratio[JOB],
        "share of the whole job that is the bare forward (of training and validation chains)":
            (1 + tokens["validation"] / tokens["train"]) / ratio[JOB],
        "whole job, times faster than the offline way (extrapolated)": ratio[OFFLINE] / ratio[JOB],
    }  # fmt: skip


def table(result: dict[str, Any]) -> str:
    """The result for a person, ratios first."""
    model, tokens = result["model"], result["tokens"]
    lines = [
        f"{result['device']}; {result['cpu']}; {result['threads']} threads; torch {result['versions']['torch']}",
        f"hidden {model['hidden']}, blocks {result['blocks_run']} of {model['blocks']}, layers "
        f"{' '.join(map(str, model['layers']))}, {model['dtype']}; {tokens['train']:,} training and "
        f"{tokens['validation']:,} validation tokens",
        "",
        *(f"{value:>9.3f}  {name}" for name, value in result["headlines"].items()),
        "",
        f"{'x forward':>9}{'seconds':>12}{'peak GB':>9}  what",
    ]
    for row in result["rows"]:
        peak = f"{row['peak_memory_gb']:.2f}" if "peak_memory_gb" in row else ""
        mark = " (extrapolated)" if row["kind"] == "extrapolated" else ""
        lines.append(f"{row['ratio']:>9.3f}{row['seconds']:>12.3f}{peak:>9}  {row['what']}{mark}")
    lines += ["", f"the whole job took {result['passes']} passes; {result['converged']} probes converged"]
    return "\n".join(lines)


def measure_all(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Every measurement, in one process."""
    ledger = Ledger(device)
    bench = Workbench(SHAPES[options.shape], options.chains, options.max_batch_tokens, device)
    job = clockwork.measure_passes(bench, ledger, options.repeats)
    grid = bench.grids[1]
    memory, held = bench.memories(grid)
    memory.fill(partial(bench.read, grid, grid.train))
    held.fill(partial(bench.read, grid, grid.validation))
    clockwork.measure_replays(bench, ledger, options.repeats, memory)
    clockwork.measure_validation(bench, ledger, options.repeats, held)
    if options.peer:
        clockwork.measure_peer(bench, ledger, memory)
    del memory, held
    clockwork.measure_offline(bench, ledger, options.offline_chains, options.offline_epochs)
    about, rows = facts(bench, {k: v for k, v in vars(options).items() if k != "json"}), ledger.rows()
    return {**about, **job, "headlines": headlines(rows, about["tokens"]), "rows": rows}


def parse(argv: Sequence[str] | None, cuda: bool) -> argparse.Namespace:
    """The command line.  Raises InputError for what is wrong with it."""
    parser = argparse.ArgumentParser(
        prog="python -m streamprobe.bench.measurements", description=__doc__.splitlines()[0]
    )
    add = partial(parser.add_argument, metavar="N", type=int)
    shape = "llama-3.1-8b" if cuda else "smollm2-135m"
    parser.add_argument("--shape", choices=list(SHAPES), default=shape, help=f"the model's size (default {shape})")
    add("--chains", default=1000 if cuda else 60, help="made-up chains, a tenth of them for validation (%(default)s)")
    add("--max_batch_tokens", default=8192, help="most tokens in one forward pass, padding included (%(default)s)")
    add("--repeats", default=3, help="readings of each pass, of which the median counts (%(default)s)")
    add("--offline_chains", default=20, help="chains on which the offline way is measured (%(default)s)")
    add("--offline_epochs", default=5, help="epochs of the offline way; one is measured (%(default)s)")
    parser.add_argument("--peer", choices=["probelab"], help="another package to measure, where it is installed")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write every number")

    def refuse(message: str) -> None:
        raise InputError(message, "options that --help lists", "mend the command line")

    parser.error = refuse  # type: ignore[method-assign, assignment]
    options = parser.parse_args(argv)
    for name in ("chains", "max_batch_tokens", "repeats", "offline_chains", "offline_epochs"):
        least = {"chains": 2, "max_batch_tokens": 900}.get(name, 1)  # no chain is longer than 900
        if getattr(options, name) < least:
            raise InputError(f"{name} {getattr(options, name)}", f"at least {least}", f"mend --{name}")
    if options.json:
        check_output(options.json, "json")
    return options


def run(argv: Sequence[str] | None) -> None:
    """The command line; raises InputError for what the user can fix."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    options = parse(argv, device.type == "cuda")
    result = measure_all(options, device)
    if options.json:
        write_output(options.json, (json.dumps(result, indent=1, default=str) + "\n").encode(), "json")
    say(table(result))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status: 0, or 2 where the user can fix what went wrong."""
    return guard(lambda: run(argv), smaller="lower --chains")


if __name__ == "__main__":
    sys.exit(main())
