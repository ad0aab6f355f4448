"""A module imports only from strictly lower floors, so that none can grow into a knot."""

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "streamprobe"
FLOORS = [
    ["errors", "lifts", "metrics", "heatmap", "hardware", "alignment", "network", "publication"],
    ["hooks", "files", "blocks"],
    [
        "settings",
        "console",
        "csvfiles",
        "lags",
        "backbone",
        "annotations",
        "reading",
        "prompts",
        "splits",
        "task",
        "muon",
    ],
    ["config", "trial", "model", "probes", "moments", "boards", "chains", "controls", "behaviour"],
    ["train", "solvers", "newton", "checkpoint", "stream", "results", "tracking"],
    ["memory", "table", "transcripts", "provenance", "baseline", "generation", "folder"],
    ["trainer", "preflight", "madeup", "charts", "monitor", "hub"],
    ["lab", "clockwork", "page", "overhead"],
    ["fits", "report", "bench", "steering"],
    ["experiment"],
    ["cli"],
]
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}


def imports(source: str, siblings: set[str]) -> set[str]:
    """The modules of the package that a module's source imports, at any depth of its code."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = f"streamprobe.{node.module or ''}".rstrip(".") if node.level else node.module or ""
            names = [base, *(f"{base}.{alias.name}" for alias in node.names)]
        else:
            continue
        parts = [re.sub(r"^streamprobe\.(demo|system)\.", "streamprobe.", name).split(".") for name in names]
        found |= {part[1] for part in parts if part[0] == "streamprobe" and len(part) > 1} & siblings
    return found


def broken(name: str, source: str) -> list[str]:
    """A line for each import of `source`, the module `name`, that does not go down."""
    return [
        f"{name} (floor {FLOOR[name]}) imports {other} (floor {FLOOR[other]})"
        for other in sorted(imports(source, set(FLOOR)))
        if FLOOR[other] >= FLOOR[name]
    ]


SOURCES = {path.stem: path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py") if path.stem != "__init__"}


def test_every_module_has_a_floor():
    assert len(FLOOR) == sum(map(len, FLOORS))
    assert set(SOURCES) == set(FLOOR)


@pytest.mark.parametrize("name", FLOOR)
def test_imports_go_down(name):
    assert broken(name, SOURCES[name]) == []


def test_the_package_itself_imports_nothing():
    assert imports((PACKAGE / "__init__.py").read_text(encoding="utf-8"), set(FLOOR)) == set()


def test_the_launcher_only_calls_the_command_line():
    assert imports((PACKAGE.parent / "run.py").read_text(encoding="utf-8"), set(FLOOR)) == {"cli"}


@pytest.mark.parametrize(
    "line",
    [
        "from streamprobe.trainer import train",
        "from streamprobe import errors, trainer",
        "from streamprobe import trainer as t",
        "import streamprobe.trainer",
        "import os, streamprobe.trainer as t",
        "from .trainer import train",
        "from . import trainer",
        "def f():\n    from streamprobe.trainer import train",
    ],
)
def test_import_that_goes_up_is_reported(line):
    """Negative control, in every way in which an import can be written."""
    source = f"import torch\nfrom streamprobe.errors import InputError\n{line}\n"
    assert broken("stream", source) == [f"stream (floor {FLOOR['stream']}) imports trainer (floor {FLOOR['trainer']})"]
    assert broken("trainer", source) == ["trainer (floor {0}) imports trainer (floor {0})".format(FLOOR["trainer"])]
    assert broken("cli", source) == []


def test_import_on_the_same_floor_is_reported():
    assert broken("backbone", "from streamprobe.lags import Column") == ["backbone (floor 2) imports lags (floor 2)"]


def test_the_parser_sees_the_packages_imports():
    """Negative control: what is written in the modules is found at all."""
    assert imports(SOURCES["stream"], set(FLOOR)) >= {"backbone", "chains", "errors", "hooks", "lags"}
    assert imports("from streamprobe_other.trainer import train\nimport trainer", set(FLOOR)) == set()
