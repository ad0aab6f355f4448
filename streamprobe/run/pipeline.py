"""A config becomes a finished run: read, load, plan, train, test, write."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from streamprobe.activations.batch import TokenBatch
from streamprobe.activations.store import ActivationMemory
from streamprobe.config.load import RunConfig
from streamprobe.evaluation.results import TestResults, judge, score
from streamprobe.evaluation.scored_probes import ScoredProbes
from streamprobe.evaluation.texts import labels_of_texts, text_rows
from streamprobe.evaluation.verdict import verdicts
from streamprobe.probes.kept import KeptProbes
from streamprobe.probes.kinds import is_kind, trained_in_epochs
from streamprobe.probes.linear import LINEAR
from streamprobe.reporting import terminal
from streamprobe.reporting.files import write_files
from streamprobe.reporting.tracking.opened import check_backends, open_backends
from streamprobe.reporting.tracking.tracker import Tracker
from streamprobe.run.checkpoint import STATE, Checkpoint, Checkpoints
from streamprobe.run.cost import Cost
from streamprobe.run.dry_run import describe_run
from streamprobe.run.final import choose_thresholds, final_probes, probes_to_keep
from streamprobe.run.final_kinds import Ended, final_kinds, layer_norms
from streamprobe.run.folder import claim_shared_folder
from streamprobe.run.jobs import make_jobs, states_of, take_up
from streamprobe.run.kinds import TrainedKind, linear_probes, train_kinds
from streamprobe.run.memory_plan import RunPlan, make_memories, plan_run
from streamprobe.run.nested import NestedJob, Validation, final_nested, make_nested, train_nested
from streamprobe.run.pass_end import PassEnd
from streamprobe.run.provenance import sizes_of, write_config
from streamprobe.run.resume import NOTHING, find_shared_earlier
from streamprobe.run.setup import Setup, set_up
from streamprobe.run.solver_sizes import NestedSize
from streamprobe.solvers.newton import NewtonSolver
from streamprobe.system.console import say
from streamprobe.system.distributed import is_main
from streamprobe.system.files import check_room
from streamprobe.system.hardware import exact_float32, send
from streamprobe.system.start import no_collections
from streamprobe.system.wrapping import columns
from streamprobe.trainer import Done, Job, train


def run(config: RunConfig) -> Path | None:
    """Trains, tests and writes one run; returns its folder, or None after a dry run, which only prints what that needs.

    Raises InputError for what the user can fix.
    """
    check_backends(config.output.report_to)
    if config.output.dry_run:
        describe_run(config)
        return None
    output = config.output
    with claim_shared_folder(output.output_dir, config.name, output.resume) as folder:
        run_in(folder, config)
    return folder


@exact_float32()
def run_in(folder: Path, config: RunConfig) -> None:
    """The whole run, from the config to the last file in `folder`."""
    cost, earlier = Cost(), NOTHING
    if config.output.resume:
        earlier, config = find_shared_earlier(config, folder)
    with no_collections():
        setup = set_up(config, earlier, cost)
    config, backbone, checkpoint = setup.config, setup.backbone, earlier.checkpoint
    before, shards = checkpoint.kept if checkpoint else None, setup.reader.shards
    plan = plan_run(config, setup.inputs, backbone, setup.feeds, shards=shards, before=before)
    memory, held_out = make_memories(plan, config.training.shards)
    jobs = make_jobs(setup.inputs, setup.feeds, config.training, kept=plan.kept, device=backbone.device)
    done = take_up(jobs, checkpoint)
    if is_main():
        check_room(folder, *needed_room(jobs, folder))
        write_config(folder, setup.facts)
    tracker = make_tracker(folder, setup, jobs, done)
    validation = partial(held_out.all_chunks, setup.read_validation)
    with Checkpoints(folder) as checkpoints:
        save = PassEnd(checkpoints, setup.facts, plan.kept, jobs, tracker, backbone.device, begun=done)
        done, nested = train_all(setup, jobs, memory, validation, save=save, checkpoint=checkpoint)
        save.finish()
    trained = train_kinds(setup, jobs, memory, held_out, tracker=tracker)
    jobs = [job for job in jobs if not is_kind(job.feed.name)]
    thresholds = choose_thresholds(jobs, setup.inputs, validation(), tracker=tracker, done=done)
    final = final_probes(setup, jobs, thresholds, [final_nested(each, validation) for each in nested])
    feeds = [job.feed for job in jobs] + [each.feed for each in nested]
    for each in judge_kinds(setup, jobs, trained, validation, beside=Ended(final[-1], feeds[-1]) if nested else None):
        final.append(each.final)
        feeds.append(each.feed)
    kept = probes_to_keep(setup, final)
    batches = held_out_batches(setup, memory, held_out)
    probes = score(kept.final, feeds, batches, of_folds=[each.bank for each in final])
    cost.add_other_ranks()
    if not is_main():
        return  # nobody waits for the intervals
    cost_once = cache(partial(describe_cost, cost, plan, done, nested))  # the same in every file and in the terminal
    results = judge_held_out(setup, folder, kept, probes, cost=cost_once, more=norms_of_layers(setup, jobs, kept))
    write_files(results)
    finish(results, tracker)


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


def train_all(
    setup: Setup,
    jobs: Sequence[Job],
    memory: ActivationMemory,
    validation: Validation,
    *,
    save: PassEnd,
    checkpoint: Checkpoint | None,
) -> tuple[Done, list[NestedJob]]:
    """Trains all jobs, and then the nested probes that begin where these end; how far it came, and these."""
    training, read = setup.config.training, setup.read_pass
    done = train(
        jobs,
        memory,
        read,
        validation,
        tracker=save.tracker,
        save=save,
        max_passes=training.max_passes,
        batch_size=training.batch_size,
        seed=training.seed,
        done=save.begun,
    )
    save.print_line()
    nested = make_nested(jobs, training, validation)
    states = checkpoint.states if checkpoint and checkpoint.passes == done.passes else {}
    for each in nested:
        state = states.get(each.feed.name)
        train_nested(each, memory, read, begun=done, max_passes=training.max_passes, state=state)
        save.keep(done, each.feed.name, each.solver)
    return done, nested


def make_tracker(folder: Path, setup: Setup, jobs: Sequence[Job], done: Done) -> Tracker:
    """What logs the run, from `done` on."""
    output = setup.config.output
    purge_step = done.tokens + 1 if output.resume else None
    report_to = output.report_to if is_main() else ["none"]
    backends = open_backends(report_to, folder, setup.facts["config"], purge_step)
    shown = [job.solver for job in jobs if not is_kind(job.feed.name)]
    in_epochs = trained_in_epochs(setup.config.probes.kinds)
    tracker = Tracker(backends, shown, every=output.log_probes == "all", in_epochs=in_epochs)
    tracker.text("2 preflight", setup.inputs.preflight)
    tracker.text("3 config", json.dumps(setup.facts, indent=1))
    return tracker


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


def needed_room(jobs: Sequence[Job], folder: Path) -> tuple[int, int]:
    """Bytes that the run still needs on the disk, and those of its largest file."""
    checkpoint = sum(tensor.nbytes for state in states_of(jobs).values() for tensor in state.values())
    probes = sum(tensor.nbytes for job in jobs for tensor in job.best.bank.tensors().values())
    nested = NestedSize.of([job.feed for job in jobs if isinstance(job.solver, NewtonSolver)])
    checkpoint, probes = checkpoint + nested.state_bytes(), probes + nested.file_bytes()
    before = folder / STATE
    return 2 * checkpoint + probes - (before.stat().st_size if before.exists() else 0), checkpoint


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
