"""Where curves go changes nothing else: results, checkpoint and resume are those of a run without them."""

import json
import signal
from pathlib import Path

import pytest
import yaml
from forked import forked
from killed import killed_after
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from trackers import lines_of, use_stub

from streamprobe.cli import train as main

pytestmark = pytest.mark.usefixtures("undrawn")
FILES = ("results.csv", "probes.safetensors", "transcripts.json", "differences.csv", "reliability.csv", "curves.json")


@pytest.fixture
def config(tmp_path: Path, model_dir: str, chains_file: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A small run of two solvers, in the working directory; W&B is a stub."""
    monkeypatch.chdir(tmp_path)
    use_stub(monkeypatch)
    Path("chains.json").write_text(json.dumps(json.loads(chains_file.read_text())[:30]))
    keys = {
        "model": model_dir,
        "data": "chains.json",
        "dtype": "float32",
        "layers": [0, 1],
        "lags": [0, 4],
        "solvers": ["newton", "adam"],
        "max_passes": 3,
        "bootstrap": 2,
        "controls": ["position", "permuted"],
    }
    Path("tiny.yaml").write_text(yaml.safe_dump(keys))
    return "tiny.yaml"


def results(folder: str) -> dict[str, bytes]:
    return {name: (Path(folder) / name).read_bytes() for name in FILES}


def events_of(folder: str) -> list[Path]:
    return list(Path(folder).glob("events.out.tfevents.*"))


def test_results_are_the_same_bytes_wherever_curves_go(config: str) -> None:
    ways = {
        "none": ["--report_to", "none"],
        "default": [],
        "all": ["--log_probes", "all"],
        "wandb": ["--report_to", "wandb"],
        "both": ["--report_to", "tensorboard", "wandb", "--log_probes", "all"],
    }
    for name, argv in ways.items():
        assert main([config, *argv, "--output_dir", name]) == 0
        assert results(name) == results("none")
        assert len(events_of(name)) == (name in ("default", "all", "both"))
        assert bool(lines_of(Path(name))) == (name in ("wandb", "both"))
    assert {kind for kind, _ in lines_of(Path("both"))} == {"init", "config", "log", "finish"}, "no step goes back"


def test_results_differ_without_the_same_seed(config: str) -> None:
    """Negative control."""
    assert main([config, "--report_to", "none", "--output_dir", "a"]) == 0
    assert main([config, "--report_to", "none", "--output_dir", "b", "--seed", "1"]) == 0
    assert results("a") != results("b")


def test_without_wandb_a_run_is_refused_before_anything_is_read(
    config: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("streamprobe.reporting.tracking.weights_and_biases.find_spec", lambda name: None)
    monkeypatch.setattr("streamprobe.run.setup.read_texts", None)
    for argv in ([], ["--dry_run"]):
        assert main([config, "--report_to", "tensorboard", "wandb", *argv]) == 2
        error = capsys.readouterr().err
        assert "report_to wandb, which is not installed" in error and error.count("\n") == 1
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        (["tensorbord"], "tensorbord"),
        (["none", "wandb"], "none wandb"),
        (["wandb", "wandb"], "wandb wandb"),
        (["tensorboard", "résumé \x1b[31m"], "tensorboard"),
    ],
)
def test_a_wrong_place_is_refused(
    config: str, given: list[str], shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([config, "--report_to", *given]) == 2
    error = capsys.readouterr().err
    assert f"report_to {shown}" in error and "one or more of tensorboard, wandb" in error and "\x1b" not in error


def test_a_killed_run_goes_on_and_may_report_elsewhere(config: str) -> None:
    """What was logged behind the checkpoint is hidden in TensorBoard; W&B goes on with the same run."""
    both = ["--report_to", "tensorboard", "wandb"]
    assert main([config, "--report_to", "none", "--output_dir", "straight"]) == 0
    [done] = forked([config, *both, "--output_dir", "killed"], prepare=killed_after(2, saved=1))
    assert done.status == -signal.SIGKILL
    name = "auroc/validation/newton/backtracking/token lag+00 best layer"
    assert len(EventAccumulator("killed").Reload().Scalars(name)) == 2
    assert main([config, *both, "--output_dir", "killed", "--resume"]) == 0
    assert results("killed") == results("straight")
    steps = [point.step for point in EventAccumulator("killed").Reload().Scalars(name)]
    assert len(steps) == 3 and steps == sorted(set(steps))
    first, again = [keys for kind, keys in lines_of(Path("killed")) if kind == "init"]
    assert "id" not in first and again["id"] == "id0"
    assert main([config, "--report_to", "none", "--output_dir", "killed", "--resume", "--log_probes", "all"]) == 0
    assert results("killed") == results("straight") and len(events_of("killed")) == 2


def test_when_wandb_fails_a_run_ends_behind_its_checkpoint_and_goes_on_without_it(
    config: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([config, "--report_to", "none", "--output_dir", "straight"]) == 0
    monkeypatch.setenv("STUB_FAILS", "1")
    assert main([config, "--report_to", "wandb", "--output_dir", "out"]) == 2
    error = capsys.readouterr().err
    assert "report_to wandb, which does not log (W&B is gone)" in error and error.count("\n") == 1
    assert Path("out/checkpoint").exists()
    assert main([config, "--report_to", "none", "--output_dir", "out", "--resume"]) == 0
    assert results("out") == results("straight")


def test_hparams_name_no_solver_and_compare_by_the_first(config: str) -> None:
    assert main([config, "--output_dir", "out"]) == 0
    events = EventAccumulator("out").Reload()
    tests = [tag for tag in events.Tags()["scalars"] if tag.startswith("test/")]
    assert "test/highest auroc/backtracking/token" in tests and not [tag for tag in tests if "newton" in tag]
    newton = json.loads(Path("out/summary.json").read_text())["results"]["newton"]["backtracking"]["token"]
    best = max(values["auroc"] for lag in newton.values() for at, values in lag.items() if at.startswith("layer"))
    assert events.Scalars("test/highest auroc/backtracking/token")[0].value == pytest.approx(best)
