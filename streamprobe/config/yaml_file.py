"""One YAML file is one run: the file that a name means, and the keys that it holds."""

import os
from argparse import Action
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from streamprobe.config.keys import require
from streamprobe.data.label_rules import SCOPES
from streamprobe.errors import InputError
from streamprobe.system.shipped import shipped_configs

PAIRS = ("label_names", "label_rules")  # keys of a list of NAME=VALUE, which a file may write as a mapping


def find_config(name: str) -> Path:
    """The config file that a command line means: the file of that path, or else the shipped config of that name."""
    return Path(name) if os.path.isfile(name) else shipped_configs().get(name, Path(name))


def read_keys(path: Path, actions: Mapping[str, Action]) -> dict[str, Any]:
    """The file's keys and values.  Raises InputError for what is no mapping of keys.

    A value of a key that is text stays as it is written: YAML takes `no`, `1_000`, `12:30` for something else.
    """
    root, content = _load(path)
    names = [name.value for name, _ in root.value]
    twice = sorted({name for name in names if names.count(name) > 1})
    require(not twice, f"config {path} with {', '.join(twice)} given twice", "each key once", "drop one")
    for name in content:
        if name not in actions:
            raise unknown_key(str(name), list(actions), f"config {path}")
    texts = [(name.value, node) for name, node in root.value if getattr(actions.get(name.value), "type", None) is str]
    return content | {name: _as_written(node, pairs=name in PAIRS) for name, node in texts}


def _load(path: Path) -> tuple[yaml.MappingNode, dict[Any, Any]]:
    """A YAML mapping as it is written, and what it means."""
    what = "lines of the form `key: value`"
    try:
        found = path.is_file()
        loader = yaml.SafeLoader(path.read_bytes().decode("utf-8-sig") if found else "")
        root = loader.get_single_node()
        content = loader.construct_document(root) if root else None
    except RecursionError:
        raise InputError(f"config {path}, nested too deeply", what, "flatten it") from None
    except (OSError, ValueError, OverflowError, yaml.YAMLError) as error:
        raise InputError(f"config {path}: {error}", f"YAML in UTF-8: {what}", "fix that") from None
    if not found:
        raise _no_config(path)
    if not isinstance(root, yaml.MappingNode) or not isinstance(content, dict):
        raise InputError(f"config {path}", what, "see those that `streamprobe configs` lists")
    return root, content


def _no_config(path: Path) -> InputError:
    names = list(shipped_configs())
    near = get_close_matches(path.stem if path.suffix in (".yaml", ".yml") else path.name, names, n=1, cutoff=0.5)
    fix = f"check the path, or give {near[0]}, the nearest name" if near else "check the path or the name"
    return InputError(f"config {path}, which is no file", f"a YAML file, or one of {', '.join(names)}", fix)


def _as_written(node: yaml.Node, pairs: bool = False) -> Any:
    """The text of a node, of each one in its list, or of its `pairs` (NAME=VALUE); None for null."""
    if pairs and isinstance(node, yaml.MappingNode):
        return [_pair(str(_as_written(name)), value) for name, value in node.value] or None
    if isinstance(node, yaml.SequenceNode):
        return [_as_written(each) if isinstance(each, yaml.ScalarNode) else {} for each in node.value]
    if isinstance(node, yaml.ScalarNode):
        return None if node.tag == "tag:yaml.org,2002:null" else node.value
    return {}


def _pair(name: str, node: yaml.Node) -> str:
    """NAME=VALUE of a value that is text, or NAME=SCOPE:PATTERN of a mapping of these two; raises InputError else."""
    inside = {"pattern": node}
    if isinstance(node, yaml.MappingNode):
        inside = {each.value: value for each, value in node.value if isinstance(each, yaml.ScalarNode)}
    values = {key: _as_written(value) for key, value in inside.items()}
    texts = all(value is None or isinstance(value, str) for value in values.values())
    if not (texts and values.keys() <= {"scope", "pattern"} and (values.get("scope") or "match") in SCOPES):
        said = " and ".join(f"{key} {value}" for key, value in values.items())
        expected = f"text, or a pattern with a scope of {', '.join(SCOPES)}"
        raise InputError(f"a config with {name!r}: {said}", expected, "correct it")
    scope = f"{values['scope']}:" if values.get("scope") else ""
    return f"{name}={scope}{values.get('pattern') or ''}"


def unknown_key(word: str, keys: list[str], where: str) -> InputError:
    """What is said of a key that is none, in a file or on the command line."""
    name = word.split("=")[0].lstrip("-")
    near = get_close_matches(name, keys, n=1, cutoff=0.5)
    expected = f"--{near[0]}, the nearest key" if near else "one of the keys that --help lists"
    return InputError(
        f"unknown key {name!r} on {where}" if "command" in where else f"unknown key {name!r} in {where}",
        expected,
        "fix or drop it",
    )
