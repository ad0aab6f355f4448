"""`streamprobe steer`: the model of a run is pushed along a probe's direction while it writes."""

import json
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamprobe.commands.shared import (
    add_probe,
    add_run,
    add_sampling,
    check_file,
    open_probes,
    place_of,
    refuse_data,
    sampling_of,
    write_file,
)
from streamprobe.errors import InputError
from streamprobe.system.console import say

if TYPE_CHECKING:
    from streamprobe.data.dataset import Dataset
    from streamprobe.run.opened import OpenedRun


def options(parser: ArgumentParser) -> None:
    """The options of `steer`."""
    add_run(parser)
    add = parser.add_argument
    add("--data", help="the run's data, if they are no longer where it found them, or its URL had a query")
    add("--strengths", type=float, nargs="+", default=[-8.0, -4.0, 0.0, 4.0, 8.0], help="in standard deviations")
    add("--problems", type=int, default=100, help="test problems to answer, at most (%(default)s)")
    add("--batch", type=int, default=50, help="problems answered at once (%(default)s)")
    add(
        "--marker",
        metavar="REGEX",
        help="what counts, whatever its case (default: words such as wait, hmm, actually; in the demo, returns)",
    )
    add("--json", type=Path, metavar="FILE", help="where to write every number and every response")
    add_probe(parser)
    add_sampling(parser)


def steer(given: Namespace) -> None:
    """Pushes the model of a run along a probe's direction, and writes the numbers that --json asks for."""
    from streamprobe.run import opened
    from streamprobe.tools import steer as steering

    sampling = sampling_of(given)
    _check_steering(given)
    run = open_probes(given, given.data)
    place, config = place_of(given, run), run.config
    steering.check_site(run.probes, place[0])
    refuse_data(config, given.data)
    chains = _chains_of(run)
    model, tokenizer = opened.load_whole(run)
    examples = steering.choose(chains.splits, config.probes.labels, given.problems)
    if chains.folds > 1:
        say(f"problems  of chains that trained the probe, too, since it is the mean over {chains.folds} folds")
    most = config.model.max_batch_tokens
    if config.data.bad_chains == "skip":
        examples = steering.leave_out_bad(examples, model, run.probes.layers, most)
    settings: dict[str, Any] = {"strengths": given.strengths, "marker": given.marker, "sampling": sampling}
    settings |= {"batch_size": given.batch, "max_batch_tokens": most}
    result = steering.experiment(model, tokenizer, run.probes, place, layer=given.layer, examples=examples, **settings)
    if given.json:
        write_file(given.json, "json", json.dumps(result, indent=1) + "\n")


def _chains_of(run: "OpenedRun") -> "Dataset":
    """The chains that the run was trained and tested on: of a stream those that it has kept.

    Raises InputError for other data than the run's.
    """
    from streamprobe.run import opened
    from streamprobe.run.streaming.kept_chains import open_kept_chains

    if run.config.stream.streaming:
        return open_kept_chains(run.folder, run.config).dataset
    chains = opened.chains_of_run(run.config)
    opened.check_chains(run.folder, chains)
    return chains


def _check_steering(given: Namespace) -> None:
    for name in ("problems", "batch"):
        if getattr(given, name) < 1:
            raise InputError(f"{name} {getattr(given, name)}", "at least 1", f"correct --{name}")
    if not all(abs(strength) <= 1e6 for strength in given.strengths):  # nan neither
        raise InputError(f"strengths {given.strengths}", "finite numbers of at most 1,000,000", "correct --strengths")
    check_file(given.json, "json", given.run)
