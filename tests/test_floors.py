"""A folder imports only from strictly lower floors, so that none can grow into a knot."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "streamprobe"
FLOORS = [  # the ground first; a name is a folder, or a module that lies on top
    ["errors"],
    ["system", "lags", "demo"],
    ["data", "model", "probes"],
    ["activations", "controls"],
    ["solvers"],
    ["config", "evaluation"],
    ["reporting"],
    ["trainer", "tools"],
    ["run"],
    ["bench"],
    ["commands"],
    ["cli"],
    ["__main__"],
]
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}
SOURCES = {str(path.relative_to(PACKAGE)): path.read_text(encoding="utf-8") for path in sorted(PACKAGE.rglob("*.py"))}


def room_of(path: str) -> str:
    """The folder that a file of the package lies in, or the module itself where it lies on top."""
    return path.removesuffix(".py").split("/")[0]


def imports(source: str, room: str = "") -> set[str]:
    """The dotted names below `streamprobe` that a file imports, at any depth of its code; `room` is its folder."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = ["streamprobe", room][: {0: 0, 1: 2, 2: 1}[node.level]] if node.level else []
            base = ".".join(filter(None, [*above, node.module or ""]))
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return {name.removeprefix("streamprobe.") for name in found if name.startswith("streamprobe.")}


def file_of(name: str) -> str:
    """The file of the package that a dotted name stands for, or the name where it is none."""
    path = name.replace(".", "/")
    return next((file for file in (f"{path}.py", f"{path}/__init__.py") if file in SOURCES), name)


def broken(path: str, source: str) -> list[str]:
    """A line for each import of the file `path` that goes up, or to another folder on the same floor."""
    room = room_of(path)
    return sorted(
        f"streamprobe/{path} (floor {FLOOR[room]}) imports streamprobe/{file_of(name)} (floor {FLOOR[other]})"
        for name in imports(source, room)
        if (other := name.split(".")[0]) in FLOOR and other != room and FLOOR[other] >= FLOOR[room]
    )


def test_every_room_has_a_floor():
    rooms = {room_of(path) for path in SOURCES} - {"__init__"}
    assert len(FLOOR) == sum(map(len, FLOORS)) and rooms <= set(FLOOR)


@pytest.mark.parametrize("path", SOURCES)
def test_imports_go_down(path):
    if path != "__init__.py":
        assert broken(path, SOURCES[path]) == []


def test_files_of_a_room_import_each_other_in_no_circle():
    links = {
        path: {file_of(name) for name in imports(text, room_of(path))} & set(SOURCES) for path, text in SOURCES.items()
    }
    while links:
        leaves = {path for path, others in links.items() if not others - {path}}
        assert leaves, f"a circle among {sorted(links)}"
        links = {path: others - leaves for path, others in links.items() if path not in leaves}


def test_the_package_itself_imports_nothing():
    assert imports(SOURCES["__init__.py"]) == set()


def test_the_launcher_only_calls_the_command_line():
    launcher = (PACKAGE.parent / "run.py").read_text(encoding="utf-8")
    assert {name.split(".")[0] for name in imports(launcher)} == {"cli"}


@pytest.mark.parametrize(
    "line",
    [
        "from streamprobe.trainer import train",
        "from streamprobe import errors, trainer",
        "from streamprobe import trainer as t",
        "import streamprobe.trainer",
        "import os, streamprobe.trainer as t",
        "from ..trainer import train",
        "from .. import trainer",
        "def f():\n    from streamprobe.trainer import train",
    ],
)
def test_an_import_that_goes_up_is_reported_with_both_files(line):
    """In every way in which an import can be written."""
    source = f"import torch\nfrom streamprobe.errors import InputError\n{line}\n"
    up = "imports streamprobe/trainer.py (floor 7)"
    assert broken("activations/stream.py", source)[0] == f"streamprobe/activations/stream.py (floor 3) {up}"
    assert broken("tools/watch.py", source)[0] == f"streamprobe/tools/watch.py (floor 7) {up}"
    assert broken("cli.py", source) == []


def test_an_import_on_the_same_floor_but_not_in_the_same_folder_is_reported():
    line = "import streamprobe.data.prompts"
    assert broken("data/dataset.py", line) == []
    assert broken("model/trial.py", line) == [
        "streamprobe/model/trial.py (floor 2) imports streamprobe/data/prompts.py (floor 2)"
    ]


def test_the_parser_sees_the_packages_imports():
    """What is written in the modules is found at all."""
    rooms = {name.split(".")[0] for name in imports(SOURCES["activations/stream.py"])}
    assert rooms >= {"model", "data", "errors", "lags"}
    assert imports("from streamprobe_other.trainer import train\nimport trainer") == set()
