"""A backend that remembers what it is given, and the stub of W&B in place of the package."""

import json
import sys
from collections.abc import Mapping, Sequence
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest

STUB = Path(__file__).parent / "stub_wandb.py"


class Recorder:
    """Everything that a tracker hands to its backends."""

    def __init__(self) -> None:
        self.curves: dict[str, list[tuple[int, float]]] = {}  # tag -> step and value
        self.maps: dict[str, list[int]] = {}  # name -> steps
        self.other: list[tuple[str, Any]] = []

    def charts(self, categories: Sequence[Any]) -> None:
        self.other.append(("charts", categories))

    def points(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self.curves.setdefault(name, []).append((step, value))

    def epochs(self, values: Mapping[str, Sequence[float]]) -> None:
        self.curves |= {name: list(enumerate(own)) for name, own in values.items()}

    def images(self, pictures: Mapping[str, Any], step: int) -> None:
        for name in pictures:
            self.maps.setdefault(name, []).append(step)

    def separation(self, found: Any, step: int) -> None:
        self.other.append(("separation", found))

    def text(self, name: str, text: str) -> None:
        self.other.append(("text", name))

    def outcome(self, said: str, numbers: Mapping[str, float]) -> None:
        self.other.append(("outcome", said))

    def write(self) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None:
        self.other.append(("close", None))


def use_stub(patch: pytest.MonkeyPatch) -> None:
    """Lets `import wandb` find the stub, until the patch is undone."""
    spec = spec_from_file_location("wandb", STUB)
    assert spec and spec.loader
    stub = module_from_spec(spec)
    spec.loader.exec_module(stub)
    patch.setitem(sys.modules, "wandb", stub)
    patch.setenv("WANDB_MODE", "offline")
    for name in ("WANDB_API_KEY", "WANDB_PROJECT"):
        patch.delenv(name, raising=False)


def lines_of(folder: Path) -> list[tuple[str, Any]]:
    """What the stub was given by the runs of W&B in the folder of a run, in order."""
    paths = sorted(folder.glob("wandb/*/log.jsonl"))
    return [tuple(json.loads(line)) for path in paths for line in path.read_text("utf-8").splitlines()]
