"""What each subcommand of `streamprobe` puts together, of what the user gave it.

What needs torch is imported within a command, so that `--help` answers at once.
"""

import json
import os
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamprobe.bench.shapes import default_shape
from streamprobe.config.load import check_text, load_config
from streamprobe.errors import InputError
from streamprobe.system.console import say
from streamprobe.system.files import check_output, write_output
from streamprobe.system.shipped import shipped_configs

if TYPE_CHECKING:
    from streamprobe.run.opened import OpenedRun
    from streamprobe.tools.generation import Sampling


def train(argv: Sequence[str], command: str) -> None:
    """Trains the probes of a config; `command` is what was typed before `argv`."""
    config = load_config(argv, f"{command} [CONFIG]")
    from streamprobe.run.pipeline import run

    run(config)


def demo(argv: Sequence[str]) -> None:
    """Trains the probes of the demo, with the keys of `argv`."""
    if argv and not argv[0].startswith("-"):
        raise InputError(f"{argv[0]!r}", "keys alone", f"streamprobe train {argv[0]}, for another config")
    config = load_config([str(shipped_configs()["demo"]), *argv], "streamprobe demo")
    from streamprobe.run.pipeline import run

    run(config)


def watch(given: Namespace) -> None:
    """Lets the model of a run write, marks each token, and writes the page that --html asks for."""
    from streamprobe.run.opened import load_whole
    from streamprobe.tools import generation
    from streamprobe.tools import watch as monitor

    sampling = _sampling(given)
    if not given.prompt.strip():
        raise InputError("an empty prompt", "some text", "correct --prompt")
    check_text("prompt", given.prompt)
    check_file(given.html, "html", given.run)
    run = _open(given)
    place = _pick(given, run)
    model, tokenizer = load_whole(run)
    data = run.config.data
    ids = generation.encode(given.prompt, data.prompt, tokenizer, data.bos, day=data.chat_date)
    shown = monitor.show(model, tokenizer, run.probes, place, prompt=given.prompt, ids=ids, sampling=sampling)
    if given.html:
        _, k = place
        title, legend = f"{given.run.name}: {run.probes.columns[k]}", monitor.legend(run.probes, place)
        write_file(given.html, "html", monitor.page(title, legend, given.prompt, shown))


def _sampling(given: Namespace) -> "Sampling":
    from streamprobe.tools.generation import Sampling

    return Sampling(given.max_new_tokens, given.temperature, given.top_p, given.seed)


def _open(given: Namespace, data: str | None = None) -> "OpenedRun":
    from streamprobe.run.opened import open_run

    changed = {"model": given.model, "device_map": given.device_map, "data": data}
    return open_run(given.run, solver=given.solver, changed=changed, trusted=given.trust_remote_code)


def _pick(given: Namespace, run: "OpenedRun") -> tuple[int, int]:
    from streamprobe.tools.watch import pick

    return pick(run.folder, run.probes, layer=given.layer, lag=given.lag, label=given.label, target=given.target)


def steer(given: Namespace) -> None:
    """Pushes the model of a run along a probe's direction, and writes the numbers that --json asks for."""
    from streamprobe.run import opened
    from streamprobe.tools import steer as steering

    sampling = _sampling(given)
    _check_steering(given)
    run = _open(given, given.data)
    if run.probes.kind != "linear":
        kind = run.probes.kind
        raise InputError(f"{run.folder} with {kind} probes", "linear ones, which have a direction", "see --solver")
    place, config = _pick(given, run), run.config
    chains = opened.chains_of_run(config)
    opened.check_chains(run.folder, chains)
    model, tokenizer = opened.load_whole(run)
    examples = steering.choose(chains.splits, config.probes.labels, given.problems)
    most = config.model.max_batch_tokens
    if config.data.bad_chains == "skip":
        examples = steering.leave_out_bad(examples, model, run.probes.layers, most)
    settings: dict[str, Any] = {"strengths": given.strengths, "marker": given.marker, "sampling": sampling}
    settings |= {"batch_size": given.batch, "max_batch_tokens": most}
    result = steering.experiment(model, tokenizer, run.probes, place, examples=examples, **settings)
    if given.json:
        write_file(given.json, "json", json.dumps(result, indent=1) + "\n")


def _check_steering(given: Namespace) -> None:
    for name in ("problems", "batch"):
        if getattr(given, name) < 1:
            raise InputError(f"{name} {getattr(given, name)}", "at least 1", f"correct --{name}")
    if not all(abs(strength) <= 1e6 for strength in given.strengths):  # nan neither
        raise InputError(f"strengths {given.strengths}", "finite numbers of at most 1,000,000", "correct --strengths")
    check_file(given.json, "json", given.run)


def report(given: Namespace) -> None:
    """Draws the page of a run anew."""
    from streamprobe.reporting.files import write_report

    write_report(given.run)
    say(f"wrote {given.run / 'report.html'}")


def push(given: Namespace) -> None:
    """Puts the probes of a run on the hub, and says where."""
    from streamprobe.tools.hub import push_to_hub

    say(push_to_hub(given.run, given.repo, given.private))


def configs(_given: Namespace) -> None:
    """Lists the configs that come with the package: name, what it is for, how to launch it, path."""
    for name, path in shipped_configs().items():
        launch, _, about, *_ = path.read_text(encoding="utf-8").splitlines()
        say(f"{name}\n    {about.lstrip('# ')}\n    {launch.lstrip('# ')}\n    {path}")


def bench(given: Namespace) -> None:
    """Measures what training costs, and writes the numbers that --json asks for."""
    import torch

    from streamprobe.bench import training_cost

    cuda = torch.cuda.is_available()
    chains = (1000 if cuda else 60) if given.chains is None else given.chains
    own = {name: value for name, value in vars(given).items() if name != "json"}
    asked = training_cost.Options(**own | {"shape": given.shape or default_shape(cuda), "chains": chains})
    check_file(given.json, "json")
    result = training_cost.measure_training(asked, torch.device("cuda" if cuda else "cpu"))
    if given.json:
        write_output(given.json, (json.dumps(result, indent=1, default=str) + "\n").encode(), "json")
    say(training_cost.table(result))


def bench_watching(given: Namespace) -> None:
    """Measures what watching costs."""
    import torch

    from streamprobe.bench.monitor_cost import measure_watching

    cuda = torch.cuda.is_available()
    shape, device = given.shape or default_shape(cuda), torch.device("cuda" if cuda else "cpu")
    say(measure_watching(shape, device, tokens=given.tokens, rounds=given.rounds, cpu_time=given.cpu_time))


def check_file(path: Path | None, name: str, run: Path | None = None) -> None:
    """Raises InputError for a file that --`name` gives and that cannot be written, before the work is done.

    Nor may it be one that the `run` has written.
    """
    if not path:
        return
    from streamprobe.run.folder import file_names

    check_output(path, name)
    own = {os.path.realpath(run / each) for each in file_names()} if run else set()
    if os.path.realpath(path) in own:  # pathlib's resolve() raises on a loop of links before Python 3.13
        raise InputError(f"{name} {path}, which is a file of the run", "another file", f"give another --{name}")


def write_file(path: Path, name: str, content: str) -> None:
    """Writes what --`name` asked for; raises InputError where that cannot be."""
    write_output(path, content.encode(errors="backslashreplace"), name)
    say(f"wrote {path}")
