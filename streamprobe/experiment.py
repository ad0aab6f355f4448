"""A RunConfig, put together from the parts into a finished run."""

import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from streamprobe import backbone, preflight, report
from streamprobe.checkpoint import BestProbes, load_run, save_run
from streamprobe.config import RunConfig
from streamprobe.errors import InputError
from streamprobe.lab import Lab, Memories
from streamprobe.metrics import measure
from streamprobe.newton import NewtonSolver
from streamprobe.provenance import (
    choose_folder,
    peak_memory,
    write_config,
)
from streamprobe.solvers import AdamSolver, Solver
from streamprobe.tracking import Tracker
from streamprobe.trainer import Fit, evaluate, train

FREE_ON_RESUME = (
    "output_dir", "resume", "dry_run", "max_passes", "memory_gb", "bootstrap", "config", "git_commit", "device"
)  # fmt: skip
Checkpoint = tuple[dict[str, dict[str, Tensor]], dict[str, Any]]


def run(config: RunConfig) -> Path | None:
    """Trains, tests and writes one run; returns its folder, or None after a dry run, which only prints what that needs.

    Raises InputError for what the user can mend.
    """
    try:
        if not config.output.dry_run:
            return _run(config)
        _dry_run(config)
        return None
    except torch.OutOfMemoryError as error:
        raise InputError(
            f"too little device memory ({str(error).splitlines()[0]})",
            "room for the model, a batch and the activations",
            "lower --max_batch_tokens or --memory_gb, or use --quantization 8bit or 4bit",
        ) from error


def _run(config: RunConfig) -> Path:
    began = time.perf_counter()
    folder = choose_folder(config.output.output_dir, config.name, config.output.resume)
    checkpoint = load_run(folder) if config.output.resume else None
    if checkpoint:
        check_resume(config.flat(), checkpoint[1]["facts"]["config"])
    elif config.output.resume:
        print(f"nothing to resume in {folder}: starting at the first pass", flush=True)
    lab = Lab(config)
    print(lab.preflight, flush=True)
    lab.load_model()
    facts = lab.facts()
    if checkpoint:
        check_resume(facts, checkpoint[1]["facts"])
    memories = lab.memories(checkpoint[1]["plan"] if checkpoint else None)
    write_config(folder, facts)
    fits, thresholds, passes = fit(lab, folder, memories, checkpoint, facts)
    rows = test(lab, folder, fits, thresholds, facts)
    plan = f"{memories[0].rows} tokens on {memories[0].home}, {'kept' if memories[0].keep_train else 'streamed'}"
    cost = {"passes": passes, "seconds": round(time.perf_counter() - began, 1), "activations": plan, **lab.cost()}
    if "newton" in config.training.solvers:
        cost["newton_matrices"] = "one per layer" if lab.shared else "one per layer and column"
    report.write_summary(folder, rows, {**facts, **cost, "counts": lab.counts.as_dict()})
    lines = "\n".join(f"{name:<22}{value}" for name, value in cost.items())
    report.write_report(folder, rows, lab.preflight, lines)
    print(f"\n{report.table(rows)}{lines}\nwrote                 {folder}/", flush=True)
    return folder


def _dry_run(config: RunConfig) -> None:
    lab = Lab(config)
    model, training, layers = config.model, config.training, config.probes.layers
    sizes = backbone.weight_bytes(lab.model_config, layers, model.trust_remote_code)
    print(lab.preflight, preflight.describe_weights(sizes, max(layers)), sep="\n\n", flush=True)
    lab.load_model()
    plan, *_ = lab.plan(None)
    loaded = backbone.loaded_bytes(lab.model)
    timed = preflight.time_batch(lab.splits["train"], lab.stream, model.max_batch_tokens, training.seed + 1)
    needs = preflight.describe_needs(lab.splits, plan, training.max_passes, model.max_batch_tokens, loaded, timed)
    print(needs, flush=True)


def start(lab: Lab, checkpoint: Checkpoint | None) -> tuple[list[Fit], tuple[int, int]]:
    """The solvers with their best probes so far, and the passes and tokens behind them: new, or from the checkpoint."""
    training, layers = lab.config.training, lab.config.probes.layers
    _, valid, positive = lab.census["train"]
    positive_weight = (valid - positive) / positive
    about_probes = (layers, lab.columns, lab.hidden_size, positive_weight)
    fits = []
    for name in training.solvers:
        solver: Solver
        if name == "adam":
            solver = AdamSolver(
                *about_probes, training.learning_rate, training.l2, training.batch_size, training.standardize,
                training.seed, lab.device,
            )  # fmt: skip
        else:
            solver = NewtonSolver(
                *about_probes, training.l2, training.tolerance, training.standardize, lab.shared, lab.device
            )
        fits.append(Fit(solver, BestProbes(solver.bank(), training.patience if name == "adam" else None)))
    if not checkpoint:
        return fits, (0, 0)
    parts, about = checkpoint
    for solver, best in fits:
        solver.load(parts[solver.name])
        best.load(parts[f"{solver.name}-best"])
    print(f"resumed   after pass {about['pass']}", flush=True)
    return fits, (about["pass"], about["tokens"])


def fit(
    lab: Lab, folder: Path, memories: Memories, checkpoint: Checkpoint | None, facts: dict[str, Any]
) -> tuple[list[Fit], list[Tensor], int]:
    """Trains the banks; returns the solvers' best probes, their thresholds [L, K] and the passes made."""
    training, probes = lab.config.training, lab.config.probes
    plan, memory, held_out = memories
    fits, done = start(lab, checkpoint)
    purge_step = done[1] + 1 if lab.config.output.resume else None
    tracker = Tracker(folder, training.solvers, probes.layers, lab.columns, purge_step)
    tracker.text("preflight", lab.preflight)
    tracker.text("run", json.dumps(facts, indent=1))
    lap = time.perf_counter()

    def save(number: int, tokens: int) -> None:
        nonlocal lap
        about = {"facts": facts, "pass": number, "tokens": tokens, "plan": [*plan[:3], lab.shared]}
        states = {solver.name: solver.state() for solver, _ in fits}
        save_run(folder, states | {f"{solver.name}-best": best.state() for solver, best in fits}, about)
        seconds, lap = time.perf_counter() - lap, time.perf_counter()
        tracker.number("progress/tokens_per_second", tokens / number / seconds, tokens)
        tracker.number("progress/memory_gb", peak_memory(lab.device) / 1e9, tokens)
        print(f"pass {number:<4}{seconds:>8.1f} s   {'   '.join(map(standing, fits))}", flush=True)

    validation = partial(held_out.in_order, lambda: lab.read("validation"))
    passes = train(
        fits, memory, lambda n: lab.read("train", training.seed + n, f"pass {n}"), validation, tracker, save,
        training.max_passes, training.batch_size, training.seed, done,
    )  # fmt: skip
    tracker.close()
    scored = evaluate([best.bank for _, best in fits], validation())
    return fits, [measure(*each[:3])["threshold"] for each in scored], passes


def standing(fit: Fit) -> str:
    """A solver's place on the line that ends a pass."""
    solver, best = fit
    f1, final = best.score, f"{int(best.stopped.sum())} of {best.stopped.numel()} probes"
    if solver.name == "newton":
        return f"newton: validation F1 {f1.min():.3f} .. {f1.max():.3f}, {final} converged"
    return f"adam: best validation F1 {f1.min():.3f} .. {f1.max():.3f}, {final} stopped"


def test(lab: Lab, folder: Path, fits: list[Fit], thresholds: list[Tensor], facts: dict[str, Any]) -> list[report.Row]:
    """Scores the held-out chains once with the best probes; writes probes.safetensors and results.csv."""
    training = lab.config.training
    banks = {solver.name: best.bank for solver, best in fits}
    rows: list[report.Row] = []
    scores = evaluate(list(banks.values()), (batch.to(lab.device) for batch in lab.read("test")))
    for (solver, best), threshold, scored in zip(fits, thresholds, scores, strict=True):
        metrics = measure(*scored[:3], threshold) | report.intervals(
            *scored, len(lab.splits["test"]), training.bootstrap, training.seed
        )
        norms = solver.gradient_norm
        rows += report.make_rows(solver.name, best.bank, metrics, best.best_pass, norms, *scored[1:])
    about = {name: facts[name] for name in ("data_fingerprint", "model_fingerprint")}
    about["config"] = {name: value for name, value in facts["config"].items() if name not in FREE_ON_RESUME}
    report.write_probes(folder, banks, dict(zip(banks, thresholds, strict=True)), about)
    report.write_results(folder, rows)
    return rows


def check_resume(now: dict[str, Any], then: dict[str, Any]) -> None:
    """Raises InputError for a key or fact whose change would make the resumed run another one."""
    for name, value in now.items():
        if name not in FREE_ON_RESUME and value != then.get(name):
            raise InputError(
                f"--resume with {name} {value}",
                f"{then.get(name)}, as the run began",
                "give the same, or start a new run without --resume",
            )
