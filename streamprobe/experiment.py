"""A RunConfig, put together from the parts into a finished run."""

import json
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from streamprobe import backbone, chains, preflight, report
from streamprobe.checkpoint import BestProbes, load_run, save_run
from streamprobe.config import RunConfig
from streamprobe.errors import InputError
from streamprobe.lags import make_columns
from streamprobe.metrics import measure
from streamprobe.newton import NewtonSolver, curvature_bytes
from streamprobe.provenance import (
    choose_folder,
    device_name,
    git_commit,
    model_fingerprint,
    peak_memory,
    versions,
    write_config,
)
from streamprobe.reading import read_rows
from streamprobe.solvers import AdamSolver, Solver
from streamprobe.stream import ActivationMemory, Plan, TokenBatch, memory_room, plan_memory, stream
from streamprobe.tracking import Tracker
from streamprobe.trainer import Fit, evaluate, train

FREE_ON_RESUME = (
    "output_dir", "resume", "dry_run", "max_passes", "memory_gb", "bootstrap", "config", "git_commit", "device"
)  # fmt: skip
Memories = tuple[Plan, ActivationMemory, ActivationMemory]  # train, validation
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


class Lab:
    """The chains, the grid and the frozen model of one run, and a count of what the model was asked to do."""

    def __init__(self, config: RunConfig):
        """Reads and checks everything that needs no weights."""
        self.config = config
        data, probes, model = config.data, config.probes, config.model
        self.source = {
            "revision": model.revision, "gguf_file": model.gguf_file, "trust_remote_code": model.trust_remote_code
        }  # fmt: skip
        model_config = self.model_config = backbone.read_config(model.model, **self.source)
        backbone.check_layers(model_config, probes.layers)
        fields = (data.id_column, data.problem_column, data.response_column, data.annotation_column)
        rows = read_rows(data.data, data.data_split, fields, data.data_sha256)
        if data.max_chains and data.max_chains < len(rows):
            rows = [rows[i] for i in np.linspace(0, len(rows) - 1, data.max_chains).astype(int)]
        tokenizer = backbone.load_tokenizer(model.model, **self.source)
        self.splits, self.counts = chains.load_chains(
            rows, fields, tokenizer, probes.labels, backbone.context(model_config), data.prompt, data.support,
            data.unlabelled, (data.test_share, data.validation_share), data.split_seed,
        )  # fmt: skip
        self.columns = make_columns(probes.labels, probes.targets, probes.lags)
        self.census = preflight.take_census(self.splits, self.columns, probes.labels, self.counts)
        highest = max(int(c.ids.max()) for split in self.splits.values() for c in split)
        backbone.check_vocabulary(model_config, highest)
        if max(len(c.ids) for split in self.splits.values() for c in split) > model.max_batch_tokens:
            backbone.make_cache(model_config)  # so that a model that cannot be read in chunks is told before it loads
        self.preflight = preflight.describe(
            self.counts, self.splits, self.census, self.columns, probes.labels, tokenizer
        )
        self.forwards = self.tokens = self.padded = 0
        self.seconds = 0.0

    def load_model(self) -> None:
        """Puts the truncated model into memory."""
        c = self.config.model
        self.model = backbone.load_backbone(
            c.model,
            self.config.probes.layers,
            c.dtype,
            c.attn_implementation,
            c.quantization,
            c.device_map,
            **self.source,
        )
        self.device: torch.device = self.model.device  # type: ignore[assignment]
        self.hidden_size: int = self.model.config.get_text_config().hidden_size  # type: ignore[union-attr, operator, assignment]

    def stream(self, chosen: list[chains.Chain], *order: Any) -> Iterator[TokenBatch]:
        """One trip over chains through the model; `order`: seed and on_forward of `stream`."""
        probes, most = self.config.probes, self.config.model.max_batch_tokens
        return stream(chosen, self.model, probes.layers, self.columns, probes.labels, most, *order)

    def read(self, split: str, seed: int | None = None, title: str = "") -> Iterator[TokenBatch]:
        """One trip over a split through the model, with a progress bar in a terminal."""
        total = sum(len(c.ids) for c in self.splits[split])
        with tqdm(total=total, desc=title or split, unit="tok", unit_scale=True, disable=None, leave=False) as bar:

            def count(tokens: int, padded: int) -> None:
                self.forwards, self.tokens, self.padded = self.forwards + 1, self.tokens + tokens, self.padded + padded
                bar.update(tokens)

            start = time.perf_counter()
            for batch in self.stream(self.splits[split], seed, count):
                self.seconds += time.perf_counter() - start
                yield batch
                start = time.perf_counter()

    def plan(self, before: list[int] | None) -> tuple[Plan, tuple[int, int, int], torch.dtype]:
        """Where the train and validation tokens will lie, with their shape (L, D, K) and dtype; prints it.

        `before` is the plan of the run that is resumed.
        """
        probes = self.config.probes
        n_train, n_validation = self.census["train"][0], self.census["validation"][0]
        dtype = backbone.pick_dtype(self.config.model.dtype)
        shape = (len(probes.layers), self.hidden_size, len(self.columns))
        token_bytes = shape[0] * shape[1] * dtype.itemsize + 2 * shape[2] + 8
        cap = self.config.training.memory_cap
        self.shared, curvature = self._curvature(memory_room(cap, self.device))
        plan = plan_memory(
            cap, token_bytes, n_train, n_validation, self.config.training.batch_size, self.device, curvature
        )
        if before and [*plan[:3], self.shared] != before:  # the plan decides the order of the tokens
            raise InputError(
                f"room for {plan.rows:,} training tokens",
                f"{before[0]:,}, as when the run began",
                "give the --memory_gb that it then had, or start a new run",
            )
        kept = n_validation * plan.keep_validation
        print(
            f"memory    {(plan.rows + kept) * token_bytes / 1e9:.2f} GB on {plan.home} for "
            + (f"all {plan.rows + kept:,} training and validation tokens: the model reads them once" if plan.keep_train
               else f"a pool of {plan.rows:,} of {n_train:,} training tokens: the model reads them in every pass"),
            flush=True,
        )  # fmt: skip
        return plan, shape, dtype

    def memories(self, before: list[int] | None) -> Memories:
        """Room for the train and the validation tokens, as planned."""
        plan, shape, dtype = self.plan(before)
        kept = self.census["validation"][0] * plan.keep_validation
        train = ActivationMemory(plan.rows, plan.keep_train, shape, dtype, self.device, plan.home)
        return plan, train, ActivationMemory(kept, plan.keep_validation, shape, dtype, self.device, plan.home)

    def _curvature(self, room: int) -> tuple[bool, int]:
        """Whether Newton's columns must share a matrix per layer (else they would take over a quarter), and bytes."""
        if "newton" not in self.config.training.solvers:
            return False, 0
        n_layers, n_columns = len(self.config.probes.layers), len(self.columns)
        all_columns, one = (curvature_bytes(n_layers, n, self.hidden_size) for n in (n_columns, 1))
        shared = all_columns > room / 4
        taken = one if shared else all_columns + one
        kind = f"one per layer: {all_columns / 1e9:.2f} GB would be too much" if shared else "one per layer and column"
        print(f"curvature {taken / 1e9:.2f} GB on {self.device}, {kind}", flush=True)
        return shared, taken

    def facts(self) -> dict[str, Any]:
        """What defines the numbers of this run."""
        return {
            "config": self.config.flat(), "versions": versions(), "git_commit": git_commit(),
            "data_fingerprint": chains.fingerprint(self.splits), "model_fingerprint": model_fingerprint(self.model),
            "device": device_name(self.device), "dtype": str(backbone.pick_dtype(self.config.model.dtype)),
        }  # fmt: skip

    def cost(self) -> dict[str, Any]:
        """What the model was asked to do and what that took, since this process began."""
        return {
            "model_forwards": self.forwards, "model_tokens": self.tokens,
            "padding": f"{1 - self.tokens / max(1, self.padded):.1%}", "model_seconds": round(self.seconds, 1),
            "tokens_per_second": round(self.tokens / max(self.seconds, 1e-9)),
            "peak_memory_gb": round(peak_memory(self.device) / 1e9, 2),
        }  # fmt: skip


def start(lab: Lab, checkpoint: Checkpoint | None) -> tuple[list[Fit], tuple[int, int]]:
    """The solvers with their best probes so far, and the passes and tokens behind them: new, or from the checkpoint."""
    training, layers = lab.config.training, lab.config.probes.layers
    _, valid, positive = lab.census["train"]
    positive_weight = (valid - positive) / positive
    solvers: dict[str, Solver] = {
        "adam": AdamSolver(
            layers, lab.columns, lab.hidden_size, positive_weight, training.learning_rate,
            training.l2, training.batch_size, training.standardize, training.seed, lab.device,
        ),
        "newton": NewtonSolver(
            layers, lab.columns, lab.hidden_size, positive_weight, training.l2, training.tolerance,
            training.standardize, lab.shared, lab.device,
        ),
    }  # fmt: skip
    patience = {"adam": training.patience, "newton": None}
    fits = [Fit(solvers[name], BestProbes(solvers[name].bank(), patience[name])) for name in training.solvers]
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
