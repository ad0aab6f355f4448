"""`streamprobe preview`: what will be fed, before any model is loaded."""

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from streamprobe.commands.shared import check_file, write_file
from streamprobe.config.load import load_config
from streamprobe.errors import InputError
from streamprobe.system.console import say
from streamprobe.system.privacy import for_others

if TYPE_CHECKING:
    from streamprobe.config.load import RunConfig
    from streamprobe.run.inputs import Inputs, Texts

SHOWN = (
    *("model", "format", "problem_column", "response_column", "annotation_column", "label_names", "label_rules"),
    *("prompt", "chat_date", "bos", "response", "support", "region", "region_markers", "unlabelled"),
    *("labels", "targets", "lags"),
)


def options(parser: ArgumentParser) -> None:
    """The options of `preview` beside the config and its keys."""
    parser.usage = f"{parser.prog} [CONFIG] [--html FILE] [--chains N] [--key value ...]"
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page of some chains, token by token, too")
    parser.add_argument("--chains", type=int, metavar="N", help="how many chains the page shows (8)")


def preview(given: Namespace) -> None:
    """Prints what would be fed, and writes the page that --html asks for; reads no weights."""
    if given.chains is not None and not given.html:
        raise InputError(f"chains {given.chains} without a page", "--html FILE, too", "give it, or drop --chains")
    if given.chains is not None and given.chains < 1:
        raise InputError(f"chains {given.chains}", "at least 1", "correct --chains")
    config = load_config(given.keys, "streamprobe preview [CONFIG]")
    check_file(given.html, "html")
    from streamprobe.run.inputs import make_inputs, read_texts

    texts, config = read_texts(config)
    inputs = make_inputs(config, texts)
    say(inputs.preflight)
    if given.html:
        write_file(given.html, "html", _page(config, texts, inputs, given.chains))


def _page(config: "RunConfig", texts: "Texts", inputs: "Inputs", most: int | None) -> str:
    from streamprobe.reporting.fed_tokens import CHAINS, collect
    from streamprobe.reporting.html.preview import render

    dataset, columns, labels = inputs.dataset, inputs.columns[: inputs.n_real], config.probes.labels
    chains = collect(
        dataset.splits,
        columns,
        labels=labels,
        arrays=dataset.labels,
        tokenizer=texts.tokenizer,
        most=most or CHAINS,
    )
    keys = for_others(config.flat())
    settings = {name: keys[name] for name in SHOWN}
    return render(config.name, chains, columns, labels=labels, preflight=inputs.preflight, settings=settings)
