"""One YAML file is one run: flat keys, each of them a command-line option too."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from streamprobe.errors import InputError
from streamprobe.settings import DataConfig, ModelConfig, OutputConfig, ProbeConfig, TrainingConfig, require

GROUPS = (ModelConfig, DataConfig, ProbeConfig, TrainingConfig, OutputConfig)


@dataclass
class RunConfig:
    """Everything that defines a run."""

    name: str
    model: ModelConfig
    data: DataConfig
    probes: ProbeConfig
    training: TrainingConfig
    output: OutputConfig

    def flat(self) -> dict[str, Any]:
        """Every key and its value."""
        groups = (self.model, self.data, self.probes, self.training, self.output)
        return {name: value for group in groups for name, value in asdict(group).items()}


def load_config(argv: Sequence[str]) -> RunConfig:
    """`[CONFIG.yaml] [--key value ...]`, where the command line wins.

    Raises InputError for a key, a type or a value that is wrong; `--help` prints every key and exits.
    """
    from transformers import HfArgumentParser

    argv = list(argv)
    path = Path(argv.pop(0)) if argv and not argv[0].startswith("-") else None
    parser = HfArgumentParser(
        list[Any](GROUPS), prog="run.py", usage="run.py CONFIG.yaml [--key value ...]", allow_abbrev=False,
        description="Train linear probes for every layer and lag while the language model runs.",
    )  # fmt: skip
    keys = [a.dest for a in parser._actions if a.dest != "help" and not a.option_strings[0].startswith("--no_")]

    def refuse(message: str) -> None:
        raise InputError(message, "a value of the key's type", "see --help")

    parser.error = refuse  # type: ignore[method-assign, assignment]
    given = _as_arguments(path, keys) if path else []
    *groups, rest = parser.parse_args_into_dataclasses(
        [*given, *argv], return_remaining_strings=True, look_for_args_file=False
    )
    for word in rest:
        require(
            not word.endswith((".yaml", ".yml")),
            f"{word} after the keys",
            "the config file first",
            f"run.py {word} ...",
        )
        raise _unknown(word, keys, "the command line")
    config = RunConfig(path.stem if path else "run", *groups)
    for name, value in (("model", config.model.model), ("data", config.data.data)):
        require(bool(value), f"no {name}", f"the key {name!r}", f"give --{name}, or it in the config file")
    return config


def _as_arguments(path: Path, keys: list[str]) -> list[str]:
    """The file's keys as command-line arguments, so that one parser gives all values their types."""
    require(
        path.is_file(),
        f"config {path}, which is no file",
        "a YAML file",
        "run in the folder that holds configs/, or give its path",
    )
    try:
        content = yaml.safe_load(path.read_text())
        root = yaml.compose(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"config {path}: {error}", "YAML of the form `key: value`", "mend that line") from None
    require(isinstance(content, dict), f"config {path}", "lines of the form `key: value`", "see the files in configs/")
    assert isinstance(root, yaml.MappingNode)
    names = [name.value for name, _ in root.value]
    twice = sorted({name for name in names if names.count(name) > 1})
    require(not twice, f"config {path} with {', '.join(twice)} given twice", "each key once", "drop one")
    arguments = []
    for name, value in content.items():
        if name not in keys:
            raise _unknown(str(name), keys, f"config {path}")
        if value is None or value == {}:
            continue
        if name == "label_names" and isinstance(value, dict):
            value = [f"{old}={'' if new is None else new}" for old, new in value.items()]
        require(
            not isinstance(value, dict),
            f"config {path}: {name} with keys inside",
            "one value or a list",
            f"mend {name}",
        )
        if isinstance(value, list):
            arguments += [f"--{name}", *map(str, value)]
        else:
            arguments.append(f"--{name}={value}")
    return arguments


def _unknown(word: str, keys: list[str], where: str) -> InputError:
    name = word.split("=")[0].lstrip("-")
    near = get_close_matches(name, keys, n=1, cutoff=0.5)
    expected = f"--{near[0]}, the nearest key" if near else "one of the keys that --help lists"
    return InputError(
        f"unknown key {name!r} on {where}" if "command" in where else f"unknown key {name!r} in {where}",
        expected,
        "mend or drop it",
    )
