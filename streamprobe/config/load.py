"""A command line becomes a config: flat keys, those of a YAML file and options of the same names."""

import os
import re
from argparse import Action, ArgumentError
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from streamprobe.config.data_keys import DataConfig
from streamprobe.config.generation_keys import GenerationConfig, check_written
from streamprobe.config.help import full_help
from streamprobe.config.keys import require
from streamprobe.config.schema import ModelConfig, OutputConfig, ProbeConfig, TrainingConfig
from streamprobe.config.site_keys import check_shards
from streamprobe.config.stream_keys import StreamConfig
from streamprobe.config.yaml_file import find_config, read_keys, unknown_key
from streamprobe.data.prompts import is_unicode
from streamprobe.errors import InputError
from streamprobe.probes.sites import LINEAR
from streamprobe.system.console import say
from streamprobe.system.privacy import FILES, TOKENS, clean_url
from streamprobe.system.shipped import shipped_configs

GROUPS = (ModelConfig, DataConfig, ProbeConfig, TrainingConfig, StreamConfig, GenerationConfig, OutputConfig)
OF_DATA = ("data_sha256", "data_split", "data_config", "format", "label_names")  # and each column: keys of one `data`
DEFAULT = "demo"


@dataclass
class RunConfig:
    """Everything that defines a run."""

    name: str
    model: ModelConfig
    data: DataConfig
    probes: ProbeConfig
    training: TrainingConfig
    stream: StreamConfig
    generation: GenerationConfig
    output: OutputConfig

    def __post_init__(self) -> None:
        others, solvers = [kind for kind in self.probes.kinds if kind != LINEAR], self.training.solvers
        require(
            not others or "newton" in solvers,
            f"kinds {' '.join(others)} with solvers {' '.join(solvers)}",
            "newton among the solvers: other kinds build on converged linear probes",
            f"give --solvers newton {' '.join(solvers)}, or drop --kinds",
        )
        check_written(
            self.generation,
            written=self.stream.source == "generate",
            rules=self.data.rules,
            labels=self.probes.labels,
            tp_size=self.model.tp_size,
        )
        if self.stream.streaming:
            self._check_stream()

    def _check_stream(self) -> None:
        """Raises InputError for what needs all chains before the first one is read."""
        data, written = self.data, self.stream.source == "generate"
        for holds, got, fix in (
            (data.folds == 1, f"folds {data.folds}", "drop --folds"),
            (data.split == "random", f"split {data.split}", "drop --split and --test_categories"),
            (written or data.max_chains is None, f"max_chains {data.max_chains}", "give --max_tokens instead"),
            (written or not data.data_sha256, "data_sha256", "drop it"),
        ):
            require(holds, f"streaming with {got}", "what is known without reading all chains first", fix)

    def flat(self) -> dict[str, Any]:
        """Every key and its value."""
        groups = (self.model, self.data, self.probes, self.training, self.stream, self.generation, self.output)
        return {name: value for group in groups for name, value in asdict(group).items()}


def load_config(argv: Sequence[str], command: str = "run.py [CONFIG]", *, same_data: bool = False) -> RunConfig:
    """`[CONFIG] [--key value ...]`, where the command line wins; without any, and no model or data, the demo's.

    CONFIG is a YAML file, or the name of one that comes with the package.  `command`: what the user typed before, and
    what may follow.  Where the command line gives other data than the file, the file's keys that say how to read its
    data are dropped, in a line; `same_data`: it is the same ones in another place.  Raises InputError for a key, a type
    or a value that is wrong; `--help` prints every key and exits.
    """
    argv = list(argv)
    path = find_config(argv.pop(0)) if argv and not argv[0].startswith("-") else None
    if path is None and not any(word.split("=")[0] in ("--model", "--data", "-h", "--help") for word in argv):
        path = find_config(DEFAULT)
    parser = _make_parser(command)
    actions = {a.dest: a for a in parser._actions if a.dest != "help" and not a.option_strings[0].startswith("--no_")}
    _check_order(argv, actions, command.split(" [")[0])
    keys = read_keys(path, actions) if path else {}
    dropped = [] if same_data else _of_other_data(keys, _last_value(argv, "--data"))
    given = _as_arguments({name: value for name, value in keys.items() if name not in dropped}, path, actions)
    try:
        *groups, rest = parser.parse_args_into_dataclasses(
            [*given, *argv], return_remaining_strings=True, look_for_args_file=False
        )
    except ArgumentError as error:
        raise InputError(str(error), "a value of the key's type", "see --help") from None
    _check_rest(rest, list(actions), command.split(" [")[0])
    config = RunConfig(path.stem if path else "run", *groups)
    for name, value in (("model", config.model.model), ("data", config.data.data)):
        require(bool(value), f"no {name}", f"the key {name!r}", f"give --{name}, or it in the config file")
    _check_text(config)
    check_shards(config.probes.read, config.model.tp_size)
    lost = [name for name in dropped if keys[name] not in (None, actions[name].default)]
    if path and lost:
        say(f"data      left out, since of the data that {path.name} names: {', '.join(lost)}")
    return config


def _check_rest(rest: Sequence[str], keys: list[str], command: str) -> None:
    """Raises InputError for words of the command line that no key has taken."""
    for word in rest:
        if word in shipped_configs():
            raise InputError(f"{word} after the keys", "the config first", f"{command} {word} ...")
        require(
            word.startswith("-"),
            f"{word!r}, which belongs to no key",
            "--key value",
            "drop it, or put what belongs together in quotes",
        )
        raise unknown_key(word, keys, "the command line")


def _of_other_data(keys: Mapping[str, Any], data: str) -> list[str]:
    """The keys of a config file that say how to read its data, where it names other ones than the command line.

    A URL that a run wrote down without its query is the same as with it.
    """
    if not (keys.get("data") and data) or clean_url(str(keys["data"])) == clean_url(data):
        return []
    return [name for name in keys if name in OF_DATA or name.endswith("_column")]


def _last_value(argv: Sequence[str], option: str) -> str:
    """What an option is on a command line, where the last one wins; nothing without it."""
    found = ""
    for word, after in zip(argv, [*argv, ""][1:], strict=True):
        name, equals, value = word.partition("=")
        if name == option:
            found = value if equals else after
    return found


def _make_parser(command: str) -> Any:
    """The parser of all keys; `command` is what comes before them."""
    from transformers import HfArgumentParser

    words = command.split(" [")[0]
    config = "llama-3.1-8b " if "[CONFIG]" in command else ""
    parser = HfArgumentParser(
        list[Any](GROUPS),
        prog=words,
        usage=f"{command} [--key value ...]",
        allow_abbrev=False,
        exit_on_error=False,
        description="Train linear probes for every layer and lag while the language model runs.",
        epilog=f"example: {words} {config}--layers 2 3 --lags 0 8 24",
    )
    for action in parser._actions:
        action.help = full_help(action.help or "")
    return parser


def _check_order(argv: Sequence[str], actions: Mapping[str, Action], command: str) -> None:
    """Raises InputError for a config file behind the keys, of which a key before it might make a value."""
    texts = {f"--{name}" for name, action in actions.items() if action.type is str and action.nargs is None}
    for before, word in zip(["", *argv], argv, strict=False):
        if word.endswith((".yaml", ".yml")) and not word.startswith("-") and before not in texts:
            raise InputError(f"{word} after the keys", "the config file first", f"{command} {word} ...")


def _check_text(config: RunConfig) -> None:
    """Raises InputError for bytes that are no text, and for a path that this locale cannot name."""
    for name, value in config.flat().items():
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str):
                check_text(name, text)
                require(
                    name in FILES or not TOKENS.search(text),
                    f"{name} with what looks like an access token",
                    "text that may be written into the run's folder",
                    f"take it out of --{name}",
                )
                if name in FILES:
                    _check_path(name, text)
    if not (config.output.output_dir or is_unicode(config.name)):
        raise InputError(
            f"config {config.name!r}, whose name is no text in this locale, and would name the folder of the run",
            "--output_dir, or a UTF-8 locale",
            "give --output_dir, or set LC_ALL=C.UTF-8",
        )


def check_text(name: str, text: str) -> None:
    """Raises InputError for a value of the key `name` with bytes that are no text."""
    require(
        is_unicode(text),
        f"{name} {text!r}, with bytes that are no text",
        "UTF-8",
        f"write --{name} in UTF-8, in a UTF-8 locale (such as LC_ALL=C.UTF-8)",
    )


def _check_path(name: str, text: str) -> None:
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        raise InputError(
            f"{name} {text!r}, which has letters that this locale's file names have not",
            "a name that it has",
            "use a UTF-8 locale, such as LC_ALL=C.UTF-8",
        ) from None


def _as_arguments(keys: Mapping[str, Any], path: Path | None, actions: Mapping[str, Action]) -> list[str]:
    """The keys of the file `path` as command-line arguments, so that one parser gives all values their types."""
    arguments = []
    for name, value in keys.items():
        if value is None:
            continue
        many = actions[name].nargs in ("+", "*")
        got = f"config {path}: {name}"
        if isinstance(value, list):
            require(many, f"{got} with a list", "one value", f"keep one value for {name}")
            wrong = [item for item in value if item is None or isinstance(item, list | dict)]
            require(not wrong, f"{got} with {wrong[:1]} in its list", "a list of values", f"fix {name}")
            arguments += _as_words(name, [str(item) for item in value], got)
        else:
            kind = "one value or a list" if many else "one value"
            require(not isinstance(value, dict), f"{got} with keys inside", kind, f"fix {name}")
            arguments.append(f"--{name}={value}")
    return arguments


def _as_words(name: str, items: list[str], got: str) -> list[str]:
    """A list of values as command-line arguments; none of them can become a key."""
    if len(items) == 1:
        return [f"--{name}={items[0]}"]
    keys = [item for item in items if item.startswith("-") and not re.fullmatch(r"-\d+", item)]
    require(not keys, f"{got} with {keys[:1]} in its list", "values that do not begin with -", f"fix {name}")
    return [f"--{name}", *items]
