"""A config becomes a finished run: read, load, plan, train, test, write."""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from streamprobe.activations.store import ActivationMemory
from streamprobe.config.load import RunConfig
from streamprobe.probes.kinds import is_kind, trained_in_epochs
from streamprobe.reporting.tracking.opened import check_backends, open_backends
from streamprobe.reporting.tracking.tracker import Tracker
from streamprobe.run.checkpoint import STATE, Checkpoint, Checkpoints
from streamprobe.run.cost import Cost
from streamprobe.run.dry_run import describe_run
from streamprobe.run.ending import Trained, end_run, finish
from streamprobe.run.folder import claim_shared_folder
from streamprobe.run.jobs import make_jobs, states_of, take_up
from streamprobe.run.memory_plan import make_memories, plan_run
from streamprobe.run.nested import NestedJob, Validation, make_nested, train_nested
from streamprobe.run.pass_end import PassEnd
from streamprobe.run.provenance import write_config
from streamprobe.run.resume import NOTHING, find_shared_earlier
from streamprobe.run.setup import Setup, set_up
from streamprobe.run.solver_sizes import NestedSize
from streamprobe.solvers.newton import NewtonSolver
from streamprobe.system.distributed import is_main
from streamprobe.system.files import check_room
from streamprobe.system.hardware import exact_float32
from streamprobe.system.start import no_collections
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
        most = config.training.max_passes
        done = train_jobs(setup, jobs, memory, validation, save=save, begun=done, max_passes=most)
        nested = train_beside(setup, jobs, memory, validation, save=save, done=done, checkpoint=checkpoint)
        save.finish()
    results = end_run(Trained(setup, jobs, nested, memory, held_out, plan, done), folder, cost, tracker)
    if results:
        finish(results, tracker)


def train_jobs(
    setup: Setup,
    jobs: Sequence[Job],
    memory: ActivationMemory,
    validation: Validation,
    *,
    save: PassEnd,
    begun: Done,
    max_passes: int,
) -> Done:
    """Trains all jobs until they are final, or so many passes are over; how far it came."""
    training = setup.config.training
    done = train(
        jobs,
        memory,
        setup.read_pass,
        validation,
        tracker=save.tracker,
        save=save,
        max_passes=max_passes,
        batch_size=training.batch_size,
        seed=training.seed,
        done=begun,
    )
    save.print_line()
    return done


def train_beside(
    setup: Setup,
    jobs: Sequence[Job],
    memory: ActivationMemory,
    validation: Validation,
    *,
    save: PassEnd,
    done: Done,
    checkpoint: Checkpoint | None,
) -> list[NestedJob]:
    """Trains the nested probes that begin where the jobs have ended."""
    training = setup.config.training
    nested = make_nested(jobs, training, validation)
    states = checkpoint.states if checkpoint and checkpoint.passes == done.passes else {}
    for each in nested:
        state = states.get(each.feed.name)
        train_nested(each, memory, setup.read_pass, begun=done, max_passes=training.max_passes, state=state)
        save.keep(done, each.feed.name, each.solver)
    return nested


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


def needed_room(jobs: Sequence[Job], folder: Path) -> tuple[int, int]:
    """Bytes that the run still needs on the disk, and those of its largest file."""
    checkpoint = sum(tensor.nbytes for state in states_of(jobs).values() for tensor in state.values())
    probes = sum(tensor.nbytes for job in jobs for tensor in job.best.bank.tensors().values())
    nested = NestedSize.of([job.feed for job in jobs if isinstance(job.solver, NewtonSolver)])
    checkpoint, probes = checkpoint + nested.state_bytes(), probes + nested.file_bytes()
    before = folder / STATE
    return 2 * checkpoint + probes - (before.stat().st_size if before.exists() else 0), checkpoint
