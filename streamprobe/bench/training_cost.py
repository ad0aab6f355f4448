"""What training costs beside the limit, the bare forward pass of the truncated model, all measured in one run.

Each repeat runs over the training chains nine times, so a bare forward that takes half a minute makes a run of a
quarter of an hour.  Weights, token ids and labels are random: time does not depend on them, but for the number of
passes to convergence.  The offline way is measured on a few chains, and there for one epoch of one probe; what follows
from that for all of them is marked as extrapolated.
"""

from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from streamprobe.bench import timings
from streamprobe.bench.shapes import SHAPES
from streamprobe.bench.synthetic import Workbench, count
from streamprobe.bench.timings import JOB, OFFLINE, PASSES, Ledger
from streamprobe.bench.whole_run import BARE, WHOLE, measure_whole_run
from streamprobe.errors import InputError
from streamprobe.run.provenance import device_name, git_commit, versions


@dataclass(frozen=True)
class Options:
    """What is measured, and how often.  Raises InputError for what cannot be."""

    shape: str  # one of SHAPES
    chains: int  # synthetic ones, a tenth of them for validation
    max_batch_tokens: int  # most tokens in one forward pass, padding included
    repeats: int  # of each pass, of which the median counts
    offline_chains: int  # on which the offline way is measured
    offline_epochs: int  # of the offline way; one is measured
    peer: str | None = None  # another package to measure, where it is installed

    def __post_init__(self) -> None:
        least = {"chains": 2, "max_batch_tokens": 900}  # no chain is longer than 900
        for name in ("chains", "max_batch_tokens", "repeats", "offline_chains", "offline_epochs"):
            if getattr(self, name) < least.get(name, 1):
                expected = f"at least {least.get(name, 1)}"
                raise InputError(f"{name} {getattr(self, name)}", expected, f"correct --{name}")


def measure_training(options: Options, device: torch.device) -> dict[str, Any]:
    """Every measurement, in one process.  Raises InputError where the chains do not fit into memory."""
    ledger = Ledger(device)
    bench = Workbench(SHAPES[options.shape], options.chains, options.max_batch_tokens, device)
    job = timings.measure_passes(bench, ledger, options.repeats)
    grid, about = bench.grids[1], facts(bench, options)
    memory, held = bench.memories(grid)
    memory.fill(partial(bench.trip, grid, grid.train))
    held.fill(partial(bench.trip, grid, grid.validation))
    probes = timings.measure_replays(bench, ledger, options.repeats, memory)
    timings.measure_validation(bench, ledger, options.repeats, held)
    peer = timings.measure_peer(bench, ledger, memory, probes) if options.peer else {}
    del memory, held
    timings.measure_offline(bench, ledger, options.offline_chains, options.offline_epochs)
    shape, most = bench.shape, options.max_batch_tokens
    del bench.model, bench.grids
    whole = measure_whole_run(shape, ledger, options.chains, max_batch_tokens=most, repeats=options.repeats)
    rows = ledger.rows()
    return {
        **about,
        **job,
        "whole_run": whole,
        "peer": peer,
        "headlines": headlines(rows, about["tokens"]),
        "rows": rows,
    }


def facts(bench: Workbench, options: Options) -> dict[str, Any]:
    """What was measured, and on what."""
    grid = bench.grids[1]
    return {
        "device": device_name(bench.device),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "git_commit": git_commit(),
        "model": bench.shape._asdict(),
        "blocks_run": max(bench.layers) + 1,
        "options": asdict(options),
        "tokens": {
            "train": count(grid.train),
            "validation": count(grid.validation),
            "train_samples": grid.n_train,
            "validation_samples": grid.n_validation,
        },
    }


def cpu_name() -> str:
    """The processor, as Linux calls it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text("utf-8", "replace").splitlines() if path.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def headlines(rows: list[dict[str, Any]], tokens: dict[str, int]) -> dict[str, float]:
    """The ratios that matter, by what they say."""
    ratio = {row["what"]: row["ratio"] for row in rows}
    real = "whole run with two targets, all controls, metrics, intervals and files, x the bare forward of its chains"
    firsts = {f"{name}, x bare forward": ratio[name] for name in PASSES}
    of_all = "fraction of the whole job that is the bare forward (of training and validation chains)"
    return firsts | {
        real: ratio[WHOLE] / ratio[BARE],
        "whole job, x bare forward": ratio[JOB],
        of_all: (1 + tokens["validation"] / tokens["train"]) / ratio[JOB],
        "whole job, times faster than the offline way (extrapolated)": ratio[OFFLINE] / ratio[JOB],
    }


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
    whole = result["whole_run"]
    lines += [
        "",
        f"the whole job took {result['passes']} passes; {result['converged']} probes converged",
        f"the whole run: {whole['chains']} chains of {whole['tokens']:,} tokens in all, {whole['probes']} probes and "
        f"controls, {whole['passes']} passes",
        *(f"{name}: {value:.4f}" for name, value in result["peer"].items()),
    ]
    return "\n".join(lines)
