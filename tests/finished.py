"""A finished run to look at, and what it has written, to compare it with another."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from streamprobe.cli import train
from streamprobe.run.checkpoint import STATE, load_run

COSTS = (
    "date",
    "seconds",
    "model_seconds",
    "tokens_per_second",
    "peak_memory_gb",
    "model_forwards",
    "model_tokens",
    "padding",
)
ON_PAGE = re.compile(rf"^(({'|'.join(COSTS)}|resume): |<div><dt>date</dt>).*$".encode(), re.M)
WRITTEN = (
    "config.yaml",
    STATE,
    STATE,
    "probes.safetensors",
    "controls.safetensors",
    "results.csv",
    "transcripts.json",
    "categories.csv",
    "differences.csv",
    "reliability.csv",
    "curves.json",
    "summary.json",
    "report.html",
)


def results(folder: str) -> dict[str, Any]:
    """Everything that a run wrote, without the times it took and whether it was resumed."""
    found: dict[str, Any] = {name: (Path(folder) / name).read_bytes() for name in WRITTEN}
    summary = json.loads(found["summary.json"])
    summary["run"] = {name: value for name, value in summary["run"].items() if name not in COSTS}
    summary["run"]["config"] |= {"resume": None}
    state = load_run(Path(folder))
    assert state
    state.facts["config"] |= {"resume": None}
    tensors = [(part, name, t.numpy().tobytes()) for part, own in state.states.items() for name, t in own.items()]
    page = ON_PAGE.sub(b"", found["report.html"])
    return found | {"summary.json": summary, STATE: (state[1:], tensors), "report.html": page}


def finish(folder: Path, keys: Mapping[str, Any], chains_file: Path) -> Path:
    """The folder with the config `tiny.yaml` of these keys, 30 chains, and the run of both, finished, in `straight`."""
    (folder / "chains.json").write_text(json.dumps(json.loads(chains_file.read_text())[:30]))
    (folder / "tiny.yaml").write_text(yaml.safe_dump({**keys, "data": "chains.json"}))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert train(["tiny.yaml", "--output_dir", "run"]) == 0
        Path("run").rename("straight")
    return folder
