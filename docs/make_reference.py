"""Makes docs/reference.md, the page of every key, from the dataclasses that define the keys.

python docs/make_reference.py
"""

from collections.abc import Sequence
from dataclasses import MISSING, Field, fields
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from streamprobe.config.help import full_help
from streamprobe.config.load import GROUPS

PAGE = Path(__file__).with_name("reference.md")
NAMES = {str: "text", int: "whole number", float: "number", bool: "true or false"}
HEAD = """# Which keys does a config have?

Write them in a YAML file as `KEY: VALUE`, or behind the config on the command line as `--KEY VALUE`, which wins.

    streamprobe train smollm2-135m --layers 9 15 --lags 0 8 24
    streamprobe train --help

- Where a key takes one or more values, write `[9, 15]` in a file and `9 15` on the command line.
- A key that is true by default is turned off by `false`, or as in `--no_bos`.
- A file is UTF-8, and texts in it stay as they are written (`no`, `1_000`, `12:30`).
- An unknown key is refused, and the nearest one named.
- A key's unit, where it has one, stands in its meaning.  What the words mean: [glossary](glossary.md).

This page is made by `python docs/make_reference.py`.
"""


def kind_of(hint: Any) -> str:
    """What a key takes, in words: its type or its choices."""
    if get_origin(hint) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(hint))
    if get_origin(hint) is list:
        return f"{kind_of(get_args(hint)[0])}, one or more"
    options = [option for option in get_args(hint) if option is not NoneType]
    return kind_of(options[0]) if options else NAMES[hint]


def default_of(field: Field[Any]) -> str:
    """The default as it is written on the command line."""
    value = field.default if field.default_factory is MISSING else field.default_factory()
    if value in ("", []):
        return "must be given"
    if value is None:
        return "none"
    shown = " ".join(map(str, value)) if isinstance(value, list) else str(value)
    return f"`{shown.lower() if isinstance(value, bool) else shown}`".replace("\n", r"\n")


def meaning_of(field: Field[Any]) -> str:
    """The help text, such that Markdown shows it as it stands."""
    text = full_help(str(field.metadata["help"])).replace("%%", "%")
    for sign, escaped in (("\\", "\\\\"), ("|", "\\|"), ("<", "&lt;"), ("*", "\\*"), ("[", "\\["), ("_", "\\_")):
        text = text.replace(sign, escaped)
    return text


def render(groups: Sequence[Any] = GROUPS) -> str:
    """The page: a table for each of the dataclasses, a row for each of their fields."""
    lines = [HEAD]
    for group in groups:
        hints = get_type_hints(group)
        lines += [f"## {group._argument_group_name}", "", group.__doc__, ""]
        lines += ["| key | default | takes | meaning |", "|---|---|---|---|"]
        for field in fields(group):
            cells = (f"`{field.name}`", default_of(field), kind_of(hints[field.name]), meaning_of(field))
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
