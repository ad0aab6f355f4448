"""A run over chains that come without an end: round after round, with a report now and then and at last."""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from streamprobe.config.load import RunConfig
from streamprobe.data import preflight
from streamprobe.data.counts import Counts
from streamprobe.data.dataset import NOT_FINITE, Dataset
from streamprobe.errors import InputError
from streamprobe.evaluation.results import TestResults
from streamprobe.lags import ONSET
from streamprobe.reporting.tracking.opened import check_backends, open_backends
from streamprobe.reporting.tracking.tracker import Tracker
from streamprobe.run.checkpoint import Checkpoint, Checkpoints
from streamprobe.run.cost import Cost
from streamprobe.run.ending import finish
from streamprobe.run.folder import claim_shared_folder
from streamprobe.run.inputs import Inputs, inputs_of
from streamprobe.run.provenance import facts_of, write_config
from streamprobe.run.reader import find_bad_rows, load_model
from streamprobe.run.resume import NOTHING, Earlier, check_same_run, find_shared_earlier
from streamprobe.run.streaming.curves import log_report, watch_drift
from streamprobe.run.streaming.learning import Learners, learn, make_learners
from streamprobe.run.streaming.opening import (
    OpenStream,
    ask_of_stream,
    controls_of_stream,
    dataset_of,
    make_reading,
    open_stream,
)
from streamprobe.run.streaming.report import Kept, make_report, with_rates
from streamprobe.run.streaming.rounds import Round
from streamprobe.run.streaming.samples import Arrived, make_samples
from streamprobe.run.streaming.state import read_reached
from streamprobe.run.streaming.underway import Underway
from streamprobe.system.console import say
from streamprobe.system.distributed import is_main
from streamprobe.system.files import Unwritable
from streamprobe.system.hardware import exact_float32
from streamprobe.system.stopping import Stopping

FIRST_LOOK = 8_192  # training tokens that a dry run looks at
QUIET = 1.0  # seconds between two lines of rounds, at least


def run_stream(config: RunConfig) -> Path | None:
    """Trains on a stream until it ends, or is asked to; returns the folder, or None after a dry run of its first round.

    Raises InputError for what the user can fix.
    """
    check_backends(config.output.report_to)
    if config.output.dry_run:
        describe_stream(config)
        return None
    output = config.output
    with claim_shared_folder(output.output_dir, config.name, output.resume) as folder, Stopping() as stopping:
        run_in(folder, config, stopping)
    return folder


@exact_float32()
def run_in(folder: Path, config: RunConfig, stopping: Stopping) -> None:
    """The whole run, from the config to the last report in `folder`."""
    cost, earlier = Cost(), NOTHING
    if config.output.resume:
        earlier, config = find_shared_earlier(config, folder)
    run = begin(folder, config, earlier, stopping, cost=cost)
    with Checkpoints(folder) as checkpoints:
        while not (run.ended or run.is_full):
            if run.is_report_due:
                run.reached.reports = run.reports_asked
                report_between(run)
            take_round(run, run.opened.rounds.next(run.room))
            run.ended = run.ended or stopping.anywhere()
            keep(checkpoints.offer, run)
        keep(checkpoints.write, run)
        keep(lambda _: checkpoints.wait(), run)
    end(run)


def begin(folder: Path, config: RunConfig, earlier: Earlier, stopping: Stopping, *, cost: Cost) -> Underway:
    """A stream behind its first round, or where the resumed run stood."""
    checkpoint = earlier.checkpoint
    reached = read_reached(checkpoint)
    opened = open_stream(config, asdict(reached) if checkpoint else {}, lambda: stopping.asked)
    config, labels = opened.config, opened.section_labels
    samples, first = make_samples(config), None
    if checkpoint:
        samples.load(checkpoint.states)
        dataset = dataset_of(config, samples.splits(), Counts.of(reached.counts), labels)
    else:
        first = opened.rounds.next(_first_room(config))
        dataset = dataset_of(config, first.splits(), Counts.of(first.about["counts"]), labels)
        describe(opened, dataset)
        reached.section_labels, reached.controls = list(labels), controls_of_stream(config, dataset)
    inputs = ask_of_stream(config, dataset, reached.controls)
    backbone = load_model(config, opened.texts, inputs, opened.writer)
    facts = facts_of(config, "a stream", backbone.model)
    check_earlier(facts, earlier)
    words = checkpoint.states.get("words", {}) if checkpoint else {}
    reading = make_reading(inputs, backbone, words)
    learners = make_learners(config, reading)
    if checkpoint:
        learners.load(checkpoint.states)
        say(f"resumed   at {reached.tokens:,} training tokens of the stream")
    if is_main():
        write_config(folder, facts)
    tracker = make_tracker(folder, config, learners, facts=facts, tokens=reached.tokens)
    run = Underway(opened, reading, learners, samples, reached, facts, folder, tracker, cost)
    if first:
        take_round(run, first)
    return run


def _first_room(config: RunConfig) -> int:
    usual = config.stream.round_tokens
    return min(usual, config.stream.max_tokens or usual)


def describe(opened: OpenStream, dataset: Dataset) -> None:
    """Prints what the first chains are like.  Raises InputError where none of them can be trained on."""
    preflight.check_train(dataset)
    stream = opened.config.stream
    say(f"format    {opened.texts.format}")
    say(f"stream    keeps {stream.reservoir_tokens:,} training and {stream.test_tokens:,} test tokens; it begins with:")
    labels = opened.config.probes.labels
    lines = preflight.describe_chains(dataset, labels)
    begun = [chain for chain in dataset.splits["train"] if (chain.codes[:, 0] == ONSET).any()]
    if begun:
        lines += ["", preflight.example(begun, labels, opened.texts.tokenizer)]
    say("\n".join(lines))


def check_earlier(facts: Mapping[str, Any], earlier: Earlier) -> None:
    """Raises InputError where the resumed run is another one."""
    if earlier.keys:
        check_same_run(facts["config"], earlier.keys)
    if earlier.checkpoint:
        check_same_run(facts, earlier.checkpoint.facts)


def make_tracker(
    folder: Path, config: RunConfig, learners: Learners, *, facts: Mapping[str, Any], tokens: int
) -> Tracker:
    """What logs the stream, behind so many tokens of it."""
    purge_step = tokens + 1 if config.output.resume else None
    backends = open_backends(config.output.report_to if is_main() else ["none"], folder, facts["config"], purge_step)
    tracker = Tracker(backends, [each.solver for each in learners.adam], every=config.output.log_probes == "all")
    tracker.text("3 config", json.dumps(facts, indent=1))
    return tracker


def take_round(run: Underway, found: Round) -> None:
    """Learns from a round, and keeps what belongs into the samples."""
    reached = run.reached
    arrived = without_bad(run, found)
    chains = [each.chain for each in arrived if each.split == "train"]
    reached.rounds += bool(arrived)  # not where a stream that had ended is resumed
    reached.tokens += sum(len(chain.ids) for chain in chains)
    number, step = reached.rounds, reached.tokens
    if chains:
        learn(
            run.learners, chains, run.config, run.reading, number=number, step=step, tracker=run.tracker, cost=run.cost
        )
    for each in arrived:
        run.samples.add(each)
    reached.counts, reached.names, reached.stream = (found.about[name] for name in ("counts", "names", "stream"))
    run.ended, now = found.ended, time.perf_counter()
    run.tracker.number("progress/kept_tokens", run.samples.reservoirs["train"].tokens, step)
    if found.ended or now - run.printed >= QUIET:
        run.printed = now
        kept, refused = run.samples.reservoirs["train"].tokens, Counts.of(reached.counts).n_refused
        lost = f"   {refused:,} chains refused" if refused else ""
        say(f"round {number:<5}{now - run.lap:>8.1f} s   {step:,} training tokens, {kept:,} kept{lost}")
    run.lap = now


def without_bad(run: Underway, found: Round) -> list[Arrived]:
    """What came in a round without chains whose activations are infinite or not numbers, if these are to be skipped."""
    arrived = list(found.arrived)
    if run.config.data.bad_chains != "skip" or not arrived:
        return arrived
    every = dataset_of(run.config, {"train": [each.chain for each in arrived]}, Counts(), run.opened.section_labels)
    bad = find_bad_rows(run.config, every, run.reading.backbone, cost=run.cost)
    for each in arrived:
        if each.chain.row in bad:
            run.opened.rounds.maker.counts.take_back(each.chain.id, NOT_FINITE)
    if bad and is_main():
        found.about["counts"] = run.opened.rounds.maker.counts.as_dict()
    return [each for each in arrived if each.chain.row not in bad]


def inputs_of_report(run: Underway) -> Inputs:
    """What the probes of a report work with.  Raises InputError, on every rank, where that does not suffice yet."""
    dataset, kept = run.dataset, run.samples.reservoirs["train"]
    whole = "all of them" if kept.holds_all else f"{kept.tokens:,} of them"
    say(f"\nreport    at {run.reached.tokens:,} training tokens of the stream: {whole} are kept")
    for line in run.samples.cautions:
        say(line)
    if dataset.counts.refused:
        say(f"refused   {preflight.refusals(dataset.counts)}")
    inputs = inputs_of(run.config, run.opened.texts, dataset, run.reached.controls)
    return inputs if kept.holds_all else with_rates(inputs, run.learners.rates, run.reading.inputs.columns)


def report(run: Underway, inputs: Inputs) -> TestResults | None:
    """Judges the probes as the stream stands; None on other ranks than the first."""
    kept = Kept(inputs, run.samples.seen_hashes, run.samples.reservoirs["train"].holds_all)
    results = make_report(
        kept,
        run.learners,
        config=run.config,
        texts=run.opened.texts,
        reading=run.reading,
        facts=run.facts,
        folder=run.folder,
        cost=run.cost,
    )
    if results:
        log_report(run.tracker, results, run.reached.tokens)
        watch_drift(run.learners.drift, results)
    return results


def report_between(run: Underway) -> None:
    """A report after which the stream goes on, also where the chains do not suffice for it, or it cannot be written."""
    try:
        inputs = inputs_of_report(run)
    except InputError as error:
        say(f"report    left out, the stream goes on: {error}")
        return
    try:
        results = report(run, inputs)
        if results:
            finish(results, Tracker([], []))
    except Unwritable as error:  # on the first rank alone, behind all that ranks do together
        say(f"disk      report not written, the stream goes on: {error}")
    run.learners.drift.share()


def keep(write: Callable[[Checkpoint], None], run: Underway) -> None:
    """Puts the curves and the state of a stream on disk; where that fails, it says so and goes on."""
    checkpoint = run.checkpoint()
    for what, work in (("curves", run.tracker.flush), ("checkpoint", partial(write, checkpoint))):
        try:
            work()
        except InputError as error:
            say(f"disk      {what} not written, the stream goes on: {error}")


def end(run: Underway) -> None:
    """The last report, behind which nothing comes."""
    results = report(run, inputs_of_report(run))
    if results:
        finish(results, run.tracker)


def describe_stream(config: RunConfig) -> None:
    """Prints what the first chains of a stream are like; where the model writes them, it is loaded and writes these."""
    opened = open_stream(config, {}, lambda: False)
    first = opened.rounds.next(min(FIRST_LOOK, _first_room(config)))
    counts = Counts.of(first.about["counts"])
    describe(opened, dataset_of(opened.config, first.splits(), counts, opened.section_labels))
