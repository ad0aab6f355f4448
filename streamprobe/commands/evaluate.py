"""`streamprobe evaluate`: the probes and controls of a run are judged on other data."""

import os
import re
from argparse import SUPPRESS, ArgumentParser, Namespace
from collections.abc import Collection
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from streamprobe.commands.shared import add_model, add_run, refuse_data
from streamprobe.config.data_keys import DataConfig
from streamprobe.config.help import full_help
from streamprobe.config.load import OF_DATA, RunConfig
from streamprobe.errors import InputError

SPLIT = ("test_share", "validation_share", "split_seed", "split_by", "split", "test_categories", "validation", "folds")
OF_ITS_DATA = (*OF_DATA, "max_chains", *SPLIT)  # and the columns


def options(parser: ArgumentParser) -> None:
    """The options of `evaluate`."""
    add_run(parser)
    add = parser.add_argument
    add("--split", choices=["test"], help="judge on the run's own test chains (with --data: where its data lie now)")
    add("--out", metavar="FOLDER", help="where to write (default: RUN/evaluations/<name of the data>)")
    add("--bootstrap", help="resamples of the chains behind each interval (default: as in the run)")
    add("--max_batch_tokens", help="most tokens in one forward pass (default: as in the run)")
    add_model(parser)
    group = parser.add_argument_group("data", "how they are read; without these keys as the run's own, but for columns")
    for each in fields(DataConfig):
        if each.name not in SPLIT:
            _add_key(group, each)


def _add_key(group: Any, key: Any) -> None:
    """An option for a key of a config; what is given is parsed by config/load.py."""
    option, help = f"--{key.name}", full_help(key.metadata["help"])
    if key.type in (bool, "bool"):
        group.add_argument(option, nargs="?", const="true", metavar="BOOL", help=help)
        group.add_argument(f"--no_{key.name}", dest=key.name, action="store_const", const="false", help=SUPPRESS)
    else:
        many = key.default_factory is not MISSING or "list" in str(key.type)
        group.add_argument(option, nargs="+" if many else None, metavar="TEXT", help=help)


def evaluate(given: Namespace) -> None:
    """Judges the probes and controls of a run on other data, or on its own test chains, and writes what it found."""
    own = given.split == "test"
    if not (own or given.data):
        raise InputError("nothing to judge on", "--data OTHER or --split test", "give one of them")
    _check_out(given)
    from streamprobe.probes.kept import load_kept
    from streamprobe.run.evaluate import Asked, evaluate_run
    from streamprobe.run.opened import open_run

    own_options = ("run", "split", "out")
    keys = {name: value for name, value in vars(given).items() if not (name in own_options or value is None)}
    trusted = keys.pop("trust_remote_code")
    finite = {} if own else {"streaming": "false", "source": "data"}  # of which all chains are read first
    config = open_run(given.run, changed=keys | finite, trusted=trusted).config
    refuse_data(config, given.data)
    if own and config.data.folds > 1:
        raise InputError(
            f"a run of {config.data.folds} folds, which keeps the means of probes that all of its chains have trained",
            "other data: its results.csv is of probes that were not trained on the chains they are tested on",
            "give --data",
        )
    config = config if own else for_other_data(config, keys)
    name = "test" if own else name_of(config.data.data)
    evaluate_run(Asked(given.run, load_kept(given.run), config, own), name, given.out)


def _check_out(given: Namespace) -> None:
    """Raises InputError for a folder in which the run itself lies, or one that is not named."""
    if given.out is None:
        return
    run, out = Path(os.path.realpath(given.run)), Path(os.path.realpath(given.out or "."))
    inside = out == run or (run in out.parents and out.relative_to(run).parts[0] != "evaluations")
    if not given.out or inside:
        raise InputError(
            f"out {given.out!r}", "a folder outside of the run, or below its evaluations/", "give another --out"
        )


def for_other_data(config: RunConfig, given: Collection[str]) -> RunConfig:
    """The config of a run with the keys that belong to its own data at their defaults, but for those that are given."""
    fresh = DataConfig()
    own = [each.name for each in fields(DataConfig) if each.name in OF_ITS_DATA or each.name.endswith("_column")]
    back = {name: getattr(fresh, name) for name in own if name not in given}
    return replace(config, data=replace(config.data, **back))


def name_of(data: str) -> str:
    """What a folder for the results on these data is called: the last part of a path, a URL or an id."""
    path = urlsplit(data).path if "://" in data else data
    last = re.split(r"[/\\]", path.rstrip("/\\"))[-1]
    plain = re.sub(r"(\.(jsonl?|ndjson|csv|tsv|parquet|txt|md))?(\.(gz|zst))?$", "", last, flags=re.IGNORECASE)
    return re.sub(r"[^\w.-]+", "-", plain).strip(".-")[:80] or "data"
