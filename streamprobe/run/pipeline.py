"""A RunConfig, put together from the parts into a finished run."""

import json
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from streamprobe.config.load import RunConfig
from streamprobe.errors import InputError
from streamprobe.evaluation import results
from streamprobe.evaluation.metrics import measure
from streamprobe.evaluation.scores import evaluate
from streamprobe.probes.linear import ProbeBank
from streamprobe.reporting import files as report
from streamprobe.reporting import terminal as table
from streamprobe.reporting import transcripts
from streamprobe.reporting.tensorboard.writer import Tracker
from streamprobe.run.checkpoint import STATE, Checkpoint, load_run, save_run
from streamprobe.run.dry_run import _dry_run
from streamprobe.run.folder import claim_folder, holds_results
from streamprobe.run.jobs import make_fits, standing
from streamprobe.run.lab import Lab, Memories
from streamprobe.run.provenance import peak_memory, read_config, write_config
from streamprobe.system.console import say
from streamprobe.system.files import check_room
from streamprobe.system.privacy import without_secrets
from streamprobe.trainer import Fit, train

FREE_ON_RESUME = (
    "output_dir", "resume", "dry_run", "max_passes", "memory_gb", "bootstrap", "bad_chains",
    "config", "git_commit", "device"
)  # fmt: skip


def run(config: RunConfig) -> Path | None:
    """Trains, tests and writes one run; returns its folder, or None after a dry run, which only prints what that needs.

    Raises InputError for what the user can mend.
    """
    if not config.output.dry_run:
        return _run(config)
    _dry_run(config)
    return None


def _run(config: RunConfig) -> Path:
    output = config.output
    with claim_folder(output.output_dir, config.name, output.resume) as folder:
        _run_in(folder, config)
    return folder


def _run_in(folder: Path, config: RunConfig) -> None:
    began = time.perf_counter()
    checkpoint = find_checkpoint(config, folder) if config.output.resume else None
    lab = Lab(config)
    say(lab.preflight)
    lab.load_model()
    facts = lab.facts()
    if checkpoint:
        check_resume(facts, checkpoint.facts)
    memories = lab.memories(checkpoint.plan if checkpoint else None)
    fits, thresholds, passes, tracker = fit(lab, folder, memories, checkpoint, facts)
    judged = test(lab, folder, fits, thresholds, facts)
    rows, verdicts = [each.row for each in judged], results.verdicts(judged)
    plan = f"{memories[0].rows} tokens on {memories[0].home}, {'kept' if memories[0].keep_train else 'streamed'}"
    cost = {"passes": passes, "seconds": round(time.perf_counter() - began, 1), "activations": plan, **lab.cost()}
    if "newton" in config.training.solvers:
        cost["newton_matrices"] = "one per layer" if lab.shared else "one per layer and column"
    told = {"counts": lab.counts.as_dict(), "verdicts": verdicts, "preflight": lab.preflight}
    report.write_summary(folder, rows, {**facts, **cost, **told})
    report.write_report(folder)
    printed = f"{table.table(rows, verdicts)}\n{table.describe_cost(cost)}"
    say(f"\n{printed}\n{table.describe_files(folder)}")
    tracker.text("1 verdict", printed)
    tracker.outcome(facts["config"], table.headline(rows))
    tracker.close()


def find_checkpoint(config: RunConfig, folder: Path) -> Checkpoint | None:
    """What to go on from, or None where the run in `folder` has not come to its first checkpoint.

    Raises InputError where that run is another one, or is finished and its checkpoint is gone: it would be replaced.
    """
    checkpoint = load_run(folder)
    if not checkpoint and holds_results(folder):
        raise InputError(
            f"--resume in {folder}, which holds results but no {STATE}",
            "a checkpoint to go on from",
            "put it back, or start a new run without --resume in another folder",
        )
    if checkpoint or (folder / "config.yaml").exists():
        then = checkpoint.facts["config"] if checkpoint else read_config(folder)
        config.data.chat_date = config.data.chat_date or then.get("chat_date")
        check_resume(without_secrets(config.flat()), without_secrets(then))
    if not checkpoint:
        say(f"nothing to resume in {folder}: starting at the first pass")
    return checkpoint


def needed_room(fits: Sequence[Fit], folder: Path) -> tuple[int, int]:
    """Bytes that the run still needs on the disk, and those of its largest file."""
    checkpoint = sum(t.nbytes for fit in fits for owner in (fit.solver, fit.best) for t in owner.state().values())
    probes = sum(fit.best.bank.weight.nbytes for fit in fits if fit.share.name == "layers")
    before = folder / STATE
    return 2 * checkpoint + probes - (before.stat().st_size if before.exists() else 0), checkpoint


def fit(
    lab: Lab, folder: Path, memories: Memories, checkpoint: Checkpoint | None, facts: dict[str, Any]
) -> tuple[list[Fit], list[Tensor], int, Tracker]:
    """Trains the banks; returns the solvers' best probes, their thresholds [L, K], the passes made, and the tracker."""
    training = lab.config.training
    plan, memory, held_out = memories
    fits, done = make_fits(lab, checkpoint)
    check_room(folder, *needed_room(fits, folder))
    write_config(folder, facts)
    tracker = Tracker(folder, [fit.solver for fit in fits], done[1] + 1 if lab.config.output.resume else None)
    tracker.text("2 preflight", lab.preflight)
    tracker.text("3 config", json.dumps(facts, indent=1))
    lap, seen = time.perf_counter(), done[1]

    def save(number: int, tokens: int) -> None:
        nonlocal lap, seen
        seen = tokens
        states = {fit.name: fit.solver.state() for fit in fits}
        states |= {f"{fit.name}-best": fit.best.state() for fit in fits}
        save_run(folder, Checkpoint(states, facts, number, tokens, [*plan[:3], lab.shared]))
        seconds, lap = time.perf_counter() - lap, time.perf_counter()
        tracker.number("progress/tokens_per_second", tokens / number / seconds, tokens)
        tracker.number("progress/memory_gb", peak_memory(lab.device) / 1e9, tokens)
        say(f"pass {number:<4}{seconds:>8.1f} s   {standing(fits)}")

    validation = partial(held_out.in_order, lambda: lab.read("validation"))
    passes = train(
        fits, memory, lambda n: lab.read("train", training.seed + n, f"pass {n}"), validation, tracker, save,
        training.max_passes, training.batch_size, training.seed, done,
    )  # fmt: skip
    scored = evaluate([(natural(lab, fit), fit.share) for fit in fits], validation())
    metrics = [measure(*each[:3]) for each in scored]
    for each, own, found in zip(fits, scored, metrics, strict=True):
        tracker.curves(each.solver, own, found["auroc"], seen)
    return fits, [found["threshold"] for found in metrics], passes, tracker


def test(
    lab: Lab, folder: Path, fits: list[Fit], thresholds: list[Tensor], facts: dict[str, Any]
) -> list[results.Judged]:
    """Scores the held-out chains once with the best probes; writes all but the summary and the report."""
    training = lab.config.training
    banks = [natural(lab, fit) for fit in fits]
    batches = (batch.to(lab.device) for batch in lab.read("test"))
    scored = evaluate([(bank, fit.share) for bank, fit in zip(banks, fits, strict=True)], batches)
    halves = [-lab.positive_weight[fit.share.columns.cpu()].log() for fit in fits]
    parts = [
        results.Part(
            fit.solver.name, bank.layers, bank.columns, own, threshold, half, fit.best.best_pass,
            fit.solver.gradient_norm,
        )
        for fit, bank, own, threshold, half in zip(fits, banks, scored, thresholds, halves, strict=True)
    ]  # fmt: skip
    say(f"test      {len(lab.splits['test']):,} chains, resampled {training.bootstrap:,} times for the intervals")
    judged = results.judge(parts, len(lab.splits["test"]), training.bootstrap, training.seed)
    about = {name: facts[name] for name in ("data_fingerprint", "model_fingerprint")}
    about["config"] = {name: value for name, value in facts["config"].items() if name not in FREE_ON_RESUME}
    probes = {
        fit.solver.name: without_controls(bank, threshold)
        for fit, bank, threshold in zip(fits, banks, thresholds, strict=True)
        if fit.share.name == "layers"
    }
    report.write_probes(folder, probes, about)
    report.write_rows(folder / "results.csv", results.FIELDS, [each.row for each in judged])
    shown = (parts, [each.row for each in judged], lab.splits["test"], lab.config.probes.labels, lab.tokenizer)
    report.write_transcripts(folder, transcripts.collect(*shown))
    categories = [chain.category for chain in lab.splits["test"]]
    for name, rows in (
        ("categories.csv", results.by_category(parts, categories, training.bootstrap, training.seed)),
        ("differences.csv", results.differences(judged)),
        ("reliability.csv", results.reliability(parts)),
    ):
        if rows:
            report.write_rows(folder / name, list(rows[0]), rows)
    return judged


def natural(lab: Lab, fit: Fit) -> ProbeBank:
    """The best probes with their class weighting undone, so that the sigmoid of a logit is the probability they mean.

    Training counts each positive `positive_weight` times, which adds the logarithm of that to the logits.
    """
    bank = fit.best.bank
    added = lab.positive_weight.to(bank.bias)[fit.share.columns.to(bank.bias.device)].log()
    return ProbeBank(bank.layers, bank.columns, bank.weight, bank.bias - added)


def without_controls(bank: ProbeBank, threshold: Tensor) -> ProbeBank:
    """The probes that are no controls, of the first seed, with their thresholds."""
    real = [k for k, column in enumerate(bank.columns) if not (column.control or column.seed)]
    columns = [bank.columns[k] for k in real]
    return ProbeBank(bank.layers, columns, bank.weight[:, real], bank.bias[:, real], threshold[:, real])


def check_resume(now: dict[str, Any], then: dict[str, Any]) -> None:
    """Raises InputError for a key or fact whose change would make the resumed run another one."""
    for name, value in now.items():
        if name not in FREE_ON_RESUME and value != then.get(name):
            raise InputError(
                f"--resume with {name} {value}",
                f"{then.get(name)}, as the run began",
                "give the same, or start a new run without --resume",
            )
