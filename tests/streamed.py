"""Small runs over streams: a file of made-up chains, the keys of a config for it, and what such a run has left."""

import csv
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from builders import make_rows
from safetensors.torch import load_file

from streamprobe.data import dataset
from streamprobe.data.overlap import hash_of
from streamprobe.data.splits import split_of
from streamprobe.run.checkpoint import STATE, load_run

KEYS: dict[str, Any] = {
    "dtype": "float32",
    "layers": [1],
    "lags": [0, 4],
    "targets": ["token"],
    "controls": ["position"],
    "bootstrap": 5,
    "max_passes": 3,
    "max_batch_tokens": 1024,
    "report_to": ["none"],
    "streaming": True,
    "round_tokens": 1024,
    "reservoir_tokens": 2048,
    "test_tokens": 1024,
}
NAMES = (
    "solver",
    "kind",
    "site",
    "layer",
    "label",
    "target",
    "control",
    "split",
    "best_control",
)  # of a row of results
ALL = {"reservoir_tokens": 10**6, "test_tokens": 10**6}  # room for every chain


def write_lines(path: Path, rows: Sequence[Any]) -> str:
    """A file of a line for each row, one that is a text as it stands; returns its name."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return str(path)


def write_config(folder: Path, model: str, rows: int | Sequence[Any] = 80, **keys: Any) -> str:
    """`tiny.yaml`, and the stream that it names, of so many made-up chains or of these rows; returns its path."""
    data = write_lines(folder / "chains.jsonl", make_rows(rows, seed=7) if isinstance(rows, int) else rows)
    config = folder / "tiny.yaml"
    config.write_text(yaml.safe_dump(KEYS | {"model": model, "data": data} | keys))
    return str(config)


def divide_by_hash(patch: pytest.MonkeyPatch, seed: int | None = None) -> None:
    """Lets a finite run divide its chains as a stream does, by that seed or its own."""

    def divided(records: Sequence[Any], division: Any) -> list[str]:
        own = division.seed if seed is None else seed
        validation = 0.0 if division.validate_on_test else division.validation_share
        shares = {"test_share": division.test_share, "validation_share": validation, "seed": own}
        return [split_of(str(hash_of(record)), **shares) for record in records]

    patch.setattr(dataset, "_divide", divided)


def counts_of(folder: str | Path) -> dict[str, Any]:
    """What became of the chains, as a run wrote it."""
    found: dict[str, Any] = json.loads(Path(folder, "summary.json").read_text(encoding="utf-8"))["run"]["counts"]
    return found


def probes_of(folder: str | Path) -> tuple[bytes, ...]:
    """The files of a run that hold its probes and how they do."""
    return tuple(Path(folder, name).read_bytes() for name in ("probes.safetensors", "results.csv"))


def standing_of(folder: str | Path) -> dict[str, Any]:
    """What the checkpoint of a stream says of how far it is."""
    found = load_run(Path(folder))
    assert found, f"{folder}/{STATE}"
    about: dict[str, Any] = json.loads(found.states["stream"]["about"].numpy().tobytes())
    return about


def tensors_of(folder: str | Path) -> dict[str, bytes]:
    """All that the checkpoint of a stream holds."""
    found = load_run(Path(folder))
    assert found, f"{folder}/{STATE}"
    return {f"{part}.{name}": t.numpy().tobytes() for part, own in found.states.items() for name, t in own.items()}


def distance(one: str, other: str) -> float:
    """The largest difference between two numbers of two runs, of a tensor in units of its largest number.

    Infinite where they have not as many.  In how many passes they were found is not looked at.
    """
    worst = 0.0
    for name in ("probes.safetensors", "controls.safetensors"):
        ours, theirs = (load_file(Path(folder, name)) for folder in (one, other))
        assert ours.keys() == theirs.keys()
        for key in {key for key in ours if not key.endswith("best_pass") and ours[key].numel()}:
            if ours[key].shape != theirs[key].shape:
                return math.inf
            a, b = ours[key].double().nan_to_num(), theirs[key].double().nan_to_num()
            worst = max(worst, float((a - b).abs().max() / b.abs().max().clamp(min=1)))
    rows, others = (list(csv.DictReader(Path(folder, "results.csv").open())) for folder in (one, other))
    for row, beside in zip(rows, others, strict=True):
        for key, value in row.items():
            if value != beside[key] and key in NAMES:
                return math.inf
            if value != beside[key] and key != "best_pass":
                worst = max(worst, abs(float(value) - float(beside[key])))
    return worst
