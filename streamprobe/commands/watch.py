"""`streamprobe watch`: the model of a run writes, and each token is marked."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from streamprobe.commands.shared import (
    add_probe,
    add_run,
    add_sampling,
    check_file,
    open_probes,
    place_of,
    sampling_of,
    write_file,
)
from streamprobe.config.load import check_text
from streamprobe.errors import InputError


def options(parser: ArgumentParser) -> None:
    """The options of `watch`."""
    add_run(parser)
    parser.add_argument("--prompt", required=True, help="the problem; the run's own `prompt` is put around it")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the marked text as a page, too")
    add_probe(parser)
    add_sampling(parser)


def watch(given: Namespace) -> None:
    """Lets the model of a run write, marks each token, and writes the page that --html asks for."""
    from streamprobe.run.opened import load_whole
    from streamprobe.tools import generation
    from streamprobe.tools import watch as monitor

    sampling = sampling_of(given)
    if not given.prompt.strip():
        raise InputError("an empty prompt", "some text", "correct --prompt")
    check_text("prompt", given.prompt)
    check_file(given.html, "html", given.run)
    run = open_probes(given)
    place = place_of(given, run)
    model, tokenizer = load_whole(run)
    data = run.config.data
    ids = generation.encode(given.prompt, data.prompt, tokenizer, data.bos, day=data.chat_date)
    shown = monitor.show(model, tokenizer, run.probes, place, prompt=given.prompt, ids=ids, sampling=sampling)
    if given.html:
        _, k = place
        title, legend = f"{given.run.name}: {run.probes.columns[k]}", monitor.legend(run.probes, place)
        write_file(given.html, "html", monitor.page(title, legend, given.prompt, shown))
