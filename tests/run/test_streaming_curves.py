"""What a stream shows while it goes on: how good probes are by now, and whether what comes has changed."""

from pathlib import Path

import pytest
from builders import make_rows
from forked import forked
from launched import launched
from streamed import standing_of, write_config
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_streaming_kills import die_in

from streamprobe.cli import train as main
from streamprobe.run.streaming import loop

pytestmark = pytest.mark.usefixtures("undrawn")
COLUMN = "backtracking/token lag+04"


def curves_of(folder: str) -> dict[str, list[tuple[int, float]]]:
    """Every curve that TensorBoard shows of a run."""
    events = EventAccumulator(folder).Reload()
    tags = events.Tags()["scalars"]
    return {tag: [(point.step, point.value) for point in events.Scalars(tag)] for tag in tags}


def rows_with_a_change() -> list[dict[str, str]]:
    """Chains of which those of the second half have the label in half of their sections, whatever their words."""
    rows = make_rows(160, seed=7)
    for i, row in enumerate(rows[80:]):
        row["annotated_chain"] = row["annotated_chain"].replace('["deduction"]', '["backtracking"]', 1 + i % 3)
    return rows


def mean(points: list[tuple[int, float]], begin: float, end: float) -> float:
    """Of a curve between two steps, given as parts of its last one."""
    last = points[-1][0]
    own = [value for step, value in points if begin * last < step <= end * last]
    return sum(own) / len(own)


@pytest.fixture
def config(tmp_path: Path, model_dir: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    keys = {"report_to": ["tensorboard"], "report_tokens": 2500, "lags": [4], "reservoir_tokens": 4096}
    return write_config(tmp_path, model_dir, rows_with_a_change(), **keys)


def test_a_change_of_the_corpus_shows(config: str) -> None:
    """More positives come, and probes that were trained before they did expect fewer; then they learn."""
    assert main([config, "--output_dir", "run"]) == 0
    curves = curves_of("run")
    rates = curves[f"stream/rate/{COLUMN}"]
    assert len(rates) == standing_of("run")["rounds"] and rates[-1][0] == standing_of("run")["tokens"]
    assert mean(rates, 0.5, 1) > 1.3 * mean(rates, 0, 0.5)
    calibration = curves[f"stream/calibration/{COLUMN}"]
    assert calibration[0][0] > 2500  # behind the first report
    assert mean(calibration, 0.5, 0.7) < mean(calibration, 0, 0.5) - 0.05
    assert all(0 < bits < 2 for _, bits in curves[f"stream/bits/{COLUMN}"])
    reports = curves[f"auroc/test/newton/{COLUMN} best layer"]
    assert len(reports) == standing_of("run")["reports"] + 1
    assert all(step > 2500 * number for number, (step, _) in enumerate(reports[:-1], 1))
    assert reports[-1][0] == standing_of("run")["tokens"]


def test_without_a_change_nothing_shows(tmp_path: Path, config: str, model_dir: str) -> None:
    """Negative control: the same chains in another order, so that both halves are alike."""
    rows = rows_with_a_change()
    mixed = [row for pair in zip(rows[:80], rows[80:], strict=True) for row in pair]
    config = write_config(
        tmp_path, model_dir, mixed, report_to=["tensorboard"], report_tokens=5000, lags=[4], reservoir_tokens=4096
    )
    assert main([config, "--output_dir", "run"]) == 0
    curves = curves_of("run")
    rates, calibration = (curves[f"stream/{name}/{COLUMN}"] for name in ("rate", "calibration"))
    assert mean(rates, 0.5, 1) < 1.2 * mean(rates, 0, 0.5)
    assert abs(mean(calibration, 0.5, 1)) < 0.05


def test_curves_go_on_behind_a_kill_and_are_those_of_any_number_of_processes(config: str) -> None:
    assert main([config, "--output_dir", "run"]) == 0
    forked([config, "--output_dir", "killed"], prepare=die_in(loop, "learn", 7, after=True))
    assert main([config, "--output_dir", "killed", "--resume"]) == 0
    assert [done.status for done in launched([config, "--output_dir", "two"], 2)] == [0, 0]
    expected = curves_of("run")
    for folder in ("killed", "two"):
        found = curves_of(folder)
        assert found.keys() == expected.keys()
        for tag in (tag for tag in found if tag.startswith(("stream/", "auroc/"))):
            assert dict(found[tag]) == pytest.approx(dict(expected[tag]), abs=1e-4), (folder, tag)
