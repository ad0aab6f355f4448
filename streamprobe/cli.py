"""The one command line: every subcommand of `streamprobe`; what each takes and does is in commands/.

`python -m streamprobe` is the same, and `python run.py` is `streamprobe train`.  To add a command, add a row to
COMMANDS.  Nothing here needs torch, so that `--help` answers at once.
"""

import os
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from typing import NamedTuple, NoReturn

import streamprobe
from streamprobe.commands import bench, compare, evaluate, folders, preview, score, shared, steer, training, watch
from streamprobe.errors import InputError
from streamprobe.system.console import guard, say, shows_progress
from streamprobe.system.distributed import joined
from streamprobe.system.launch import was_launched

RESUME = "interrupted; the same command with --resume goes on from its last checkpoint"
SMALLER = "lower --max_batch_tokens or --memory_gb, or use --quantization 8bit or 4bit"


class Parser(ArgumentParser):
    """A parser that refuses in the one line of an InputError."""

    def error(self, message: str) -> NoReturn:
        """Raises InputError instead of printing the usage."""
        raise InputError(message, "options that --help lists", f"see {self.prog} --help")


class Command(NamedTuple):
    """One subcommand: what is said of it, what it takes and does, what helps without memory, and after Ctrl-C."""

    about: str
    example: str
    options: Callable[[ArgumentParser], None]
    work: Callable[[Namespace], None]
    smaller: str = "free some"
    takes_keys: bool = False  # a config and its keys, too: they are given to `work` as `keys`
    interrupted: str = "interrupted"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `streamprobe ARGV`; returns the exit status: 0, or 2 where the user can fix what went wrong."""
    words = list(sys.argv[1:] if argv is None else argv)
    _quiet_libraries()
    if words[:1] == ["train"]:
        return train(words[1:], "streamprobe train")
    if words[:1] == ["demo"]:
        return _guard_training(lambda: training.demo(words[1:]))
    longest_first = sorted(COMMANDS, key=len, reverse=True)
    name = next((name for name in longest_first if words[: len(name.split())] == name.split()), None)
    if name is None:
        return guard(lambda: _answer(words))
    command = COMMANDS[name]
    if was_launched():
        return guard(lambda: _refuse_launcher(name))
    return guard(lambda: _run(name, words[len(name.split()) :]), command.smaller, command.interrupted)


def train(argv: Sequence[str] | None = None, command: str = "run.py") -> int:
    """Runs `run.py ARGV`, which trains the probes of a config; returns the exit status as `main` does."""
    return _guard_training(lambda: training.train(sys.argv[1:] if argv is None else argv, command))


def _guard_training(work: Callable[[], object]) -> int:
    _quiet_libraries()
    return guard(work, SMALLER, RESUME)


def _quiet_libraries() -> None:
    """Keeps the progress bars of libraries, too, from where none can be drawn."""
    if not shows_progress():
        os.environ.setdefault("TQDM_DISABLE", "1")


def make_parser(name: str) -> ArgumentParser:
    """The parser of a command of COMMANDS; a config and its keys are parsed by config/load.py."""
    command = COMMANDS[name]
    keys = "\n\nCONFIG and every --key are those of streamprobe train, whose --help lists them" * command.takes_keys
    parser = Parser(
        prog=f"streamprobe {name}",
        description=command.about + keys,
        epilog=f"example:\n  streamprobe {name} {command.example}".rstrip(),
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.options(parser)
    return parser


def parse(name: str, argv: Sequence[str]) -> Namespace:
    """What a command of COMMANDS is given.  Raises InputError for what it does not take."""
    if not COMMANDS[name].takes_keys:
        return make_parser(name).parse_args(argv)
    given, keys = make_parser(name).parse_known_args(argv)
    return Namespace(**vars(given), keys=keys)


def _run(name: str, argv: Sequence[str]) -> None:
    _quiet_libraries()
    COMMANDS[name].work(parse(name, argv))


def _refuse_launcher(name: str) -> None:
    """Raises InputError, once, for a command that several processes cannot share."""
    with joined():
        raise InputError(f"several processes of streamprobe {name}", "one", "start it without a launcher")


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


TRAINING = {  # what takes the keys of a config
    "train": "train the probes of a config: a YAML file, or the name of one that comes with the package",
    "demo": "train the probes of the demo: a small model that comes with the package, no network",
}
COMMANDS = {
    "preview": Command(
        "show what a config would feed, token by token with its labels, before any model is loaded",
        "demo --html preview.html",
        preview.options,
        preview.preview,
        takes_keys=True,
    ),
    "score": Command(
        "give every token of any texts the probability of a run's probes",
        "runs/demo texts.jsonl --out scores.csv",
        score.options,
        score.score,
        "lower --max_batch_tokens, or use --device_map cpu",
        interrupted="interrupted; with --out, the same command with --resume goes on",
    ),
    "evaluate": Command(
        "judge the probes and controls of a run on other data: do they transfer?",
        "runs/demo --data other.json --max_chains 200",
        evaluate.options,
        evaluate.evaluate,
        "lower --max_batch_tokens or --max_chains, or use --device_map cpu",
    ),
    "watch": Command(
        "let the model of a run write, and mark each token by the probability that a probe gives",
        'runs/demo --prompt "reach 27 with 15 13 14 ?" --lag 8',
        watch.options,
        watch.watch,
        "use --device_map cpu",
    ),
    "steer": Command(
        "push the model of a run along a probe's direction while it writes, and count what it does",
        "runs/demo --layer 3 --lag 8 --strengths -8 0 8",
        steer.options,
        steer.steer,
        "lower --batch, or use --device_map cpu",
    ),
    "report": Command(
        "draw report.html of a run anew from its other files", "runs/demo", shared.add_run, folders.report
    ),
    "compare": Command(
        "set runs side by side: their models and data, best layers by lag, and how far each foresees",
        "runs/demo runs/demo-2 --html compare.html",
        compare.options,
        compare.compare,
    ),
    "push": Command(
        "put the probes of a run and its results on the Hugging Face hub",
        "runs/demo user/name --private",
        folders.push_options,
        folders.push,
    ),
    "bench": Command(
        "measure what training costs beside the bare forward pass of the model",
        "--shape tiny --chains 10 --repeats 1 --json bench.json",
        bench.options,
        bench.bench,
        "lower --chains",
    ),
    "bench watching": Command(
        "measure what watching costs beside plain generation",
        "--shape tiny --rounds 9 --tokens 300",
        bench.watching_options,
        bench.watching,
    ),
    "bench processes": Command(
        "measure what it costs to share a pass among processes of this machine",
        "--shape tiny --chains 20 --repeats 1",
        bench.processes_options,
        bench.processes,
        "lower --chains",
    ),
    "bench streams": Command(
        "measure whether the memory of a run grows with the length of its stream",
        "--tokens 10000 40000",
        bench.streams_options,
        bench.streams,
    ),
    "configs": Command("list the configs that come with the package", "", folders.no_options, folders.configs),
}
