"""What `--help` and the reference say of a key: its own words, with the rows of the tables that it names."""

from collections.abc import Mapping
from typing import Any

from streamprobe.controls.table import CONTROLS
from streamprobe.data.formats import FORMATS
from streamprobe.data.label_rules import SCOPES
from streamprobe.probes.kinds import KINDS, kind_names, split_name
from streamprobe.solvers.table import SOLVERS


def full_help(help: str) -> str:
    """A key's help text with the rows of the tables that it names."""
    kinds = {name: KINDS[split_name(name).family] for name in kind_names()}
    tables: dict[str, Mapping[str, Any]] = {
        "<controls>": CONTROLS,
        "<formats>": FORMATS,
        "<solvers>": SOLVERS,
        "<kinds>": kinds,
    }
    for name, rows in tables.items():
        help = help.replace(name, "; ".join(f"{row} ({each.about})".replace("%", "%%") for row, each in rows.items()))
    return help.replace("<scopes>", ", ".join(f"{scope} ({about})" for scope, about in SCOPES.items()))
