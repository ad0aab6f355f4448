"""`streamprobe bench` runs through, measures what it says, and refuses what it cannot run.  No time is asserted."""

import json
import math

import pytest
import torch

from streamprobe.bench.timings import FORWARD, JOB, MANY, OFFLINE, PASSES, REPLAYS
from streamprobe.cli import main


def test_a_tiny_run_writes_every_row(tmp_path, capsys):
    file = tmp_path / "bench.json"
    tiny = "--shape tiny --chains 4 --repeats 1 --offline_chains 2 --offline_epochs 3 --peer probelab"
    assert main(["bench", *tiny.split(), "--json", str(file)]) == 0
    printed = capsys.readouterr().out
    result = json.loads(file.read_text())
    rows = {row["what"]: row for row in result["rows"]}
    for name in (FORWARD, *PASSES, JOB, *MANY, *(f"replayed pass, 70 probes: {kind}" for kind in REPLAYS)):
        assert len(rows[name]["times"]) == 1 and rows[name]["kind"] == "measured"
    assert all(row["seconds"] > 0 and row["ratio"] > 0 and row["what"] in printed for row in rows.values())
    assert all(value > 0 for value in result["headlines"].values())
    assert len([row for row in rows.values() if row["what"].startswith("offline, 2 chains")]) == 3
    assert "metrics of 70 probes on 100,000 tokens" in rows
    assert rows[FORWARD]["ratio"] == 1
    assert result["threads"] == 1 and result["versions"]["torch"] == torch.__version__
    assert result["model"]["hidden"] == 32 and result["tokens"]["train"] > result["tokens"]["validation"] > 0
    assert ("not installed" in printed) != any("probelab" in name for name in rows)
    extrapolated = [row["seconds"] for row in rows.values() if row["kind"] == "extrapolated"]
    assert len(extrapolated) == 4 and math.isclose(extrapolated[-1], sum(extrapolated[:-1]))
    assert rows[OFFLINE]["seconds"] == extrapolated[-1]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("--chains 1", "at least 2"),
        ("--chains many", "invalid int value: 'many'"),
        ("--repeats 0", "repeats 0"),
        ("--shape huge", "invalid choice: 'huge'"),
        ("--peer sklearn", "invalid choice: 'sklearn'"),
        ("--json no/such/folder/bench.json", "a file in a folder that exists"),
        ("--nosuch 1", "unrecognized arguments: --nosuch 1"),
    ],
)
def test_wrong_input_ends_in_one_line(arguments, told, capsys):
    assert main(["bench", *arguments.split()]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("streamprobe: ") and printed.err.count("\n") == 1 and told in printed.err


def test_chains_that_do_not_fit_are_refused(monkeypatch, capsys):
    monkeypatch.setattr("streamprobe.run.memory_plan.free_bytes", lambda device: 0)
    assert main("bench --shape tiny --chains 6 --repeats 1".split()) == 2
    assert "fix: lower --chains" in capsys.readouterr().err.splitlines()[-1]
