"""The one command line: every subcommand of `streamprobe` and what it takes; what it does is in commands.py.

`python -m streamprobe` is the same, and `python run.py` is `streamprobe train`.  To add a command, add a row to
COMMANDS.  Nothing here needs torch, so that `--help` answers at once.
"""

import os
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple, NoReturn

import streamprobe
from streamprobe import commands
from streamprobe.bench.shapes import SHAPES, default_shape
from streamprobe.errors import InputError
from streamprobe.solvers.table import SOLVERS
from streamprobe.system.console import guard, say, shows_progress

RESUME = "interrupted; the same command with --resume goes on after the last pass"
SMALLER = "lower --max_batch_tokens or --memory_gb, or use --quantization 8bit or 4bit"


class Parser(ArgumentParser):
    """A parser that refuses in the one line of an InputError."""

    def error(self, message: str) -> NoReturn:
        """Raises InputError instead of printing the usage."""
        raise InputError(message, "options that --help lists", f"see {self.prog} --help")


class Command(NamedTuple):
    """One subcommand: what is said of it, what it takes, what it does, and what helps where memory runs out."""

    about: str
    example: str
    options: Callable[[ArgumentParser], None]
    work: Callable[[Namespace], None]
    smaller: str = "free some"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `streamprobe ARGV`; returns the exit status: 0, or 2 where the user can fix what went wrong."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["train"]:
        return train(words[1:], "streamprobe train")
    if words[:1] == ["demo"]:
        return _guard_training(lambda: commands.demo(words[1:]))
    longest_first = sorted(COMMANDS, key=len, reverse=True)
    name = next((name for name in longest_first if words[: len(name.split())] == name.split()), None)
    if name is None:
        return guard(lambda: _answer(words))
    return guard(lambda: _run(name, words[len(name.split()) :]), COMMANDS[name].smaller)


def train(argv: Sequence[str] | None = None, command: str = "run.py") -> int:
    """Runs `run.py ARGV`, which trains the probes of a config; returns the exit status as `main` does."""
    return _guard_training(lambda: commands.train(sys.argv[1:] if argv is None else argv, command))


def _guard_training(work: Callable[[], object]) -> int:
    if not shows_progress():
        os.environ.setdefault("TQDM_DISABLE", "1")  # progress bars of the libraries too
    return guard(work, SMALLER, RESUME)


def make_parser(name: str) -> ArgumentParser:
    """The parser of a command of COMMANDS; what those of TRAINING take is parsed by config/load.py."""
    command = COMMANDS[name]
    parser = Parser(
        prog=f"streamprobe {name}",
        description=command.about,
        epilog=f"example:\n  streamprobe {name} {command.example}".rstrip(),
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.options(parser)
    return parser


def _run(name: str, argv: Sequence[str]) -> None:
    COMMANDS[name].work(make_parser(name).parse_args(argv))


def _answer(words: Sequence[str]) -> None:
    """What `streamprobe` says where no command is given.  Raises InputError for one that there is not."""
    word = words[0] if words else "--help"
    if word == "--version":
        say(f"streamprobe {streamprobe.__version__}")
    elif word in ("-h", "--help"):
        say(overview())
    else:
        near = get_close_matches(word, abouts(), n=1)
        expected = f"{near[0]}, the nearest command" if near else f"one of {', '.join(abouts())}"
        raise InputError(f"unknown command {word!r}", expected, "see streamprobe --help")


def abouts() -> dict[str, str]:
    """Every command and what it does, in a line."""
    return TRAINING | {name: command.about for name, command in COMMANDS.items()}


def overview() -> str:
    """The help of `streamprobe` itself: a line for each command."""
    return "\n".join(
        [
            "usage: streamprobe COMMAND ...",
            "",
            streamprobe.__doc__ or "",
            "",
            *(f"  {name:<16}{about}" for name, about in abouts().items()),
            "",
            "streamprobe COMMAND --help says what it takes, with an example; streamprobe --version names the version",
        ]
    )


# --- what several commands take ---


def _add_run(parser: ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", type=Path, help="folder of a finished run")


def _add_probe(parser: ArgumentParser) -> None:
    """Options that say which probe of the run is meant, and where its model lies."""
    add = parser.add_argument
    add("--solver", help=f"whose probes: {' or '.join(SOLVERS)} (default: the run's first)")
    add("--layer", type=int, help="layer of the probe (default: the best of results.csv)")
    add("--lag", type=int, default=0, help="tokens that the probe looks ahead (%(default)s)")
    add("--label", help="label of the probe (default: the run's first)")
    add("--target", help="target of the probe: token, onset or within (default: the run's first)")
    add("--model", help="folder or hub id of the model, if it is no longer where the run found it")
    add("--trust_remote_code", action="store_true", help="run the Python code that comes with the run's model")
    add("--device_map", help="where the model lies: auto, cpu, cuda, ... (default: as in the run)")


def _add_sampling(parser: ArgumentParser) -> None:
    """Options that say how the model writes."""
    add = parser.add_argument
    add("--max_new_tokens", type=int, default=256, help="most tokens of a response (%(default)s)")
    add("--temperature", type=float, default=0.0, help="of the sampling; 0 takes the likeliest token (%(default)s)")
    add("--top_p", type=float, default=1.0, help="sample among the likeliest tokens of so much mass (%(default)s)")
    add("--seed", type=int, default=0, help="seed of the sampling (%(default)s)")


# --- watch ---


def _watch_options(parser: ArgumentParser) -> None:
    _add_run(parser)
    parser.add_argument("--prompt", required=True, help="the problem; the run's own `prompt` is put around it")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the marked text as a page, too")
    _add_probe(parser)
    _add_sampling(parser)


# --- steer ---


def _steer_options(parser: ArgumentParser) -> None:
    _add_run(parser)
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
    _add_probe(parser)
    _add_sampling(parser)


# --- report, push, configs ---


def _push_options(parser: ArgumentParser) -> None:
    _add_run(parser)
    parser.add_argument("repo", metavar="USER/NAME", help="repository on the hub; made if there is none")
    parser.add_argument("--private", action="store_true", help="make it a private one")


def _no_options(_parser: ArgumentParser) -> None:
    pass


# --- bench ---


def _add_shape(parser: ArgumentParser) -> None:
    text = f"size of the model ({default_shape(cuda=True)} on a GPU, else {default_shape(cuda=False)})"
    parser.add_argument("--shape", choices=list(SHAPES), help=text)


def _bench_options(parser: ArgumentParser) -> None:
    _add_shape(parser)
    add = parser.add_argument
    add("--chains", type=int, help="synthetic chains, a tenth of them for validation (1000 on a GPU, else 60)")
    add(
        "--max_batch_tokens",
        type=int,
        default=8192,
        help="most tokens in one forward pass, padding included (%(default)s)",
    )
    add("--repeats", type=int, default=3, help="of each pass, of which the median counts (%(default)s)")
    add("--offline_chains", type=int, default=20, help="chains on which the offline way is measured (%(default)s)")
    add("--offline_epochs", type=int, default=5, help="epochs of the offline way; one is measured (%(default)s)")
    add("--peer", choices=["probelab"], help="another package to measure, where it is installed")
    add("--json", type=Path, metavar="FILE", help="where to write every number, with the hardware and the versions")


def _bench_watching_options(parser: ArgumentParser) -> None:
    _add_shape(parser)
    add = parser.add_argument
    add("--tokens", type=int, default=100, help="tokens to write (%(default)s)")
    add("--rounds", type=int, default=5, help="timed rounds (%(default)s)")
    add("--cpu_time", action="store_true", help="seconds of this process on the CPU, of all its threads")


# --- the tables ---

TRAINING = {  # what takes the keys of a config
    "train": "train the probes of a config: a YAML file, or the name of one that comes with the package",
    "demo": "train the probes of the demo: a small model that comes with the package, no network",
}
COMMANDS = {
    "watch": Command(
        "let the model of a run write, and mark each token by the probability that a probe gives",
        'runs/demo --prompt "reach 27 with 15 13 14 ?" --lag 8',
        _watch_options,
        commands.watch,
        "use --device_map cpu",
    ),
    "steer": Command(
        "push the model of a run along a probe's direction while it writes, and count what it does",
        "runs/demo --layer 3 --lag 8 --strengths -8 0 8",
        _steer_options,
        commands.steer,
        "lower --batch, or use --device_map cpu",
    ),
    "report": Command("draw report.html of a run anew from its other files", "runs/demo", _add_run, commands.report),
    "push": Command(
        "put the probes of a run and its results on the Hugging Face hub",
        "runs/demo user/name --private",
        _push_options,
        commands.push,
    ),
    "bench": Command(
        "measure what training costs beside the bare forward pass of the model",
        "--shape tiny --chains 10 --repeats 1 --json bench.json",
        _bench_options,
        commands.bench,
        "lower --chains",
    ),
    "bench watching": Command(
        "measure what watching costs beside plain generation",
        "--shape tiny --rounds 9 --tokens 300",
        _bench_watching_options,
        commands.bench_watching,
    ),
    "configs": Command("list the configs that come with the package", "", _no_options, commands.configs),
}
