"""What a run ends with: its probes judged on the held-out chains, its files, and what the terminal says."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from streamprobe.activations.batch import TokenBatch
from streamprobe.activations.store import ActivationMemory
from streamprobe.evaluation.results import TestResults, judge, score
from streamprobe.evaluation.scored_probes import ScoredProbes
from streamprobe.evaluation.texts import labels_of_texts, text_rows
from streamprobe.evaluation.verdict import verdicts
from streamprobe.probes.kept import KeptProbes
from streamprobe.probes.kinds import is_kind
from streamprobe.probes.linear import LINEAR
from streamprobe.reporting import terminal
from streamprobe.reporting.files import write_files
from streamprobe.reporting.tracking.tracker import Tracker
from streamprobe.run.cost import Cost
from streamprobe.run.final import choose_thresholds, final_probes, probes_to_keep
from streamprobe.run.final_kinds import Ended, final_kinds, layer_norms
from streamprobe.run.kinds import TrainedKind, linear_probes, train_kinds
from streamprobe.run.memory_plan import RunPlan
from streamprobe.run.nested import NestedJob, Validation, final_nested
from streamprobe.run.provenance import sizes_of
from streamprobe.run.setup import Setup
from streamprobe.system.console import say
from streamprobe.system.distributed import is_main
from streamprobe.system.hardware import send
from streamprobe.system.wrapping import columns
from streamprobe.trainer import Done, Job


class Trained(NamedTuple):
    """A run behind its last pass."""

    setup: Setup
    jobs: Sequence[Job]
    nested: Sequence[NestedJob]
    memory: ActivationMemory  # of the training chains
    held_out: ActivationMemory  # of the validation chains
    plan: RunPlan
    done: Done


def end_run(trained: Trained, folder: Path, cost: Cost, tracker: Tracker) -> TestResults | None:
    """Trains what builds on the probes, judges all, and writes that; None on other ranks than the first."""
    setup, _, nested, memory, held_out, plan, done = trained
    validation = partial(held_out.all_chunks, setup.read_validation)
    kinds = train_kinds(setup, trained.jobs, memory, held_out, tracker=tracker)
    jobs = [job for job in trained.jobs if not is_kind(job.feed.name)]
    thresholds = choose_thresholds(jobs, setup.inputs, validation(), tracker=tracker, done=done)
    final = final_probes(setup, jobs, thresholds, [final_nested(each, validation) for each in nested])
    feeds = [job.feed for job in jobs] + [each.feed for each in nested]
    for each in judge_kinds(setup, jobs, kinds, validation, beside=Ended(final[-1], feeds[-1]) if nested else None):
        final.append(each.final)
        feeds.append(each.feed)
    kept = probes_to_keep(setup, final)
    batches = held_out_batches(setup, memory, held_out)
    probes = score(kept.final, feeds, batches, of_folds=[each.bank for each in final])
    cost.add_other_ranks()
    if not is_main():
        return None  # nobody waits for the intervals
    cost_once = cache(partial(describe_cost, cost, plan, done, nested))  # the same in every file and in the terminal
    results = judge_held_out(setup, folder, kept, probes, cost=cost_once, more=norms_of_layers(setup, jobs, kept))
    write_files(results)
    return results


def judge_kinds(
    setup: Setup,
    jobs: Sequence[Job],
    trained: Sequence[TrainedKind],
    validation: Validation,
    *,
    beside: Ended | None,
) -> list[Ended]:
    """The probes of kinds that are not linear as the run ends with them; none in a run of linear ones alone."""
    kinds = setup.config.probes.kinds
    if kinds == [LINEAR]:
        return []
    linear = linear_probes(jobs, setup.inputs)
    return final_kinds(linear, trained, validation, inputs=setup.inputs, kinds=kinds, beside=beside)


def norms_of_layers(setup: Setup, jobs: Sequence[Job], kept: KeptProbes) -> dict[str, Any]:
    """How much of the probes that read all layers is each layer's, where there are such kinds."""
    if setup.config.probes.kinds == [LINEAR]:
        return {}
    scale = linear_probes(jobs, setup.inputs).solver.scale.mean(1)
    found = layer_norms(kept.final, scale)
    return {"layer_norms": found} if found else {}


def held_out_batches(setup: Setup, memory: ActivationMemory, held_out: ActivationMemory) -> Iterator[TokenBatch]:
    """One trip over this rank's test chains; where they are those of training and validation, from memory if that kept
    all.
    """
    chains, kept = setup.inputs.dataset.splits, memory.keep and held_out.keep
    if setup.inputs.dataset.folds == 1 or not kept:
        yield from (batch.to(setup.backbone.device) for batch in setup.reader.read("test"))
        return
    number = {chain.row: i for i, chain in enumerate(chains["test"])}
    trips = {
        "train": memory.all_chunks(partial(setup.read_pass, 1)),
        "validation": held_out.all_chunks(setup.read_validation),
    }
    for split, batches in trips.items():
        numbers = send(torch.tensor([number[chain.row] for chain in chains[split]]), setup.backbone.device)
        yield from (batch._replace(chain=numbers[batch.chain]) for batch in batches)


def judge_held_out(
    setup: Setup,
    folder: Path,
    kept: KeptProbes,
    probes: Sequence[ScoredProbes],
    *,
    cost: Callable[[], Mapping[str, Any]],
    more: Mapping[str, Any],
) -> TestResults:
    """Judges the probes of a run by how they scored the held-out chains; `more` is said of them in summary.json."""
    inputs, training = setup.inputs, setup.config.training
    chains = inputs.dataset.splits["test"]
    say(f"test      {len(chains):,} chains, resampled {training.bootstrap:,} times for the intervals")
    judged = judge(probes, len(chains), training.bootstrap, training.seed, tolerance=training.tolerance)
    described = {
        "counts": inputs.dataset.counts.as_dict(),
        "splits": sizes_of(inputs.dataset.splits),
        "verdicts": verdicts(judged, training.tolerance, labels_of_texts(probes)),
        "preflight": inputs.preflight,
        **more,
    }
    return TestResults(
        folder=folder,
        probes=probes,
        judged=judged,
        kept=kept,
        chains=chains,
        labels=setup.config.probes.labels,
        tokenizer=setup.tokenizer,
        facts=setup.facts,
        described=described,
        cost=cost,
        resamples=training.bootstrap,
        seed=training.seed,
        texts=text_rows(probes, len(chains), training.bootstrap, training.seed),
    )


def describe_cost(cost: Cost, plan: RunPlan, done: Done, nested: Sequence[NestedJob]) -> dict[str, Any]:
    """What the run took so far, as summary.json holds it."""
    kept = plan.kept
    found: dict[str, Any] = {
        "passes": done.passes,
        **({"nested_passes": sum(int(each.solver.passes) for each in nested)} if nested else {}),
        "activations": f"{kept.rows} tokens on {plan.home}, {'kept' if kept.train else 'streamed'}",
        **cost.as_dict(plan.device),
    }
    if plan.matrices:
        found["newton_matrices"] = "one per layer" if kept.shared else "one per layer and column"
    return found


def finish(results: TestResults, tracker: Tracker) -> None:
    """What a run ends with in the terminal and where its curves went: the verdicts last."""
    verdicts, width = results.described["verdicts"], columns()
    cost = terminal.describe_cost(results.cost())
    say(f"\n{terminal.table(results.rows, results.texts, width)}\n{cost}")
    first, *_ = results.facts["config"]["solvers"]
    kept = f"{terminal.table(results.rows, results.texts)}\n{cost}"
    tracker.outcome("\n\n".join([*verdicts, kept]), terminal.headline(results.rows, first))
    tracker.close()
    say(terminal.describe_files(results.folder, width))
    say(f"\n{terminal.describe_outcome(verdicts, results.folder, width)}")
