"""W&B is given the curves and the verdict, and neither texts of the data nor paths; what fails waits for the flush."""

import builtins
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from probe_grids import GRIDS, LABEL, LAYERS, values_of
from trackers import lines_of, use_stub

from streamprobe.errors import InputError
from streamprobe.reporting.tracking.base import Separation
from streamprobe.reporting.tracking.opened import OPEN, check_backends, open_backends
from streamprobe.reporting.tracking.tracker import Tracker
from streamprobe.reporting.tracking.weights_and_biases import SETTINGS, WeightsAndBiases, check_wandb, last_id

CONFIG = {"layers": [3, 12], "data": "/home/someone/chains.json", "seed": 0}
SECRET = "a line of the data"


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    use_stub(monkeypatch)
    return monkeypatch


def logged(folder: Path, resumed: bool = False, first: int = 1) -> list[tuple[str, Any]]:
    """Two passes of a run; what W&B was given."""
    tracker = Tracker([WeightsAndBiases(folder, CONFIG, resumed)], GRIDS)
    tracker.text("2 preflight", SECRET)
    for step in (100 * first, 100 * first + 100):
        tracker.probes("auroc/validation", LAYERS, values_of(LAYERS, step), step)
        tracker.compare(step)
        tracker.flush()
    tracker.curves(LAYERS, None, torch.full((2, 7), torch.nan), 200)  # type: ignore[arg-type]  # no column has a score
    tracker.outcome("at no lag\nso it is", {"test/lift": 0.25})
    tracker.close()
    return lines_of(folder)


@pytest.mark.usefixtures("stub")
def test_it_is_given_curves_maps_config_and_verdict_in_order_of_their_steps(tmp_path: Path) -> None:
    lines = logged(tmp_path / "demo")
    (_, begun), (_, config), *given = lines
    assert begun == {"project": "streamprobe", "name": "demo", "settings": SETTINGS}
    assert config == {"layers": [3, 12], "data": "chains.json", "seed": 0}, "of a path its last name alone"
    assert given[-1] == ("finish", None) and {kind for kind, _ in given[:-1]} == {"log"}
    name = f"auroc/validation/newton/{LABEL}/token lag+04 best layer"
    values = [(step, found[name]) for _, (step, found) in given[:-1] if name in found]
    assert values == [(step, float(values_of(LAYERS, step)[:, 1].max())) for step in (100, 200)]
    maps = [step for _, (step, found) in given[:-1] if any(key.startswith("heat maps/") for key in found)]
    assert maps == [200] * 3
    [table] = [found["verdict"] for _, (_, found) in given[:-1] if "verdict" in found]
    assert table["data"] == [["at no lag"], ["so it is"]]
    assert given[-2] == ("log", [None, {"test/lift": 0.25}])


@pytest.mark.usefixtures("stub")
def test_no_text_of_the_data_leaves(tmp_path: Path) -> None:
    backend = WeightsAndBiases(tmp_path, CONFIG, False)
    backend.text("2 preflight", SECRET)
    backend.charts([])
    backend.separation(Separation("a", torch.zeros(2), torch.tensor([True, False])), 1)
    backend.close()
    assert [kind for kind, _ in lines_of(tmp_path)] == ["init", "config", "finish"]
    assert SECRET not in json.dumps(lines_of(tmp_path))
    assert SETTINGS["console"] == "off" and SETTINGS["x_disable_meta"], "the command line may hold a URL's secrets"


def test_the_project_may_be_named(stub: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stub.setenv("WANDB_PROJECT", "mine")
    assert logged(tmp_path)[0][1]["project"] == "mine"


@pytest.mark.usefixtures("stub")
def test_a_resumed_run_goes_on_with_the_same_run_of_wandb(tmp_path: Path) -> None:
    logged(tmp_path)
    found = last_id(tmp_path)
    lines = logged(tmp_path, resumed=True, first=3)
    [_, again] = [keys for kind, keys in lines if kind == "init"]
    assert found and (again["id"], again["resume"]) == (found, "allow") and last_id(tmp_path) == found


@pytest.mark.usefixtures("stub")
def test_a_new_run_fails_to_have_that_id_without_resume(tmp_path: Path) -> None:
    logged(tmp_path)
    assert "id" not in [keys for kind, keys in logged(tmp_path) if kind == "init"][1]
    assert last_id(tmp_path / "empty") is None


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["run-20260101_000000-abc"], "abc"),
        (["run-20260101_000002-later", "offline-run-20260101_000001-abc"], "later"),
        (["offline-run-20260101_000000-my-own-id", "latest-run", "debug.log"], "my-own-id"),
        (["run-nothing"], None),
    ],
)
def test_the_id_is_that_of_the_last_folder(tmp_path: Path, names: list[str], found: str | None) -> None:
    for name in names:
        (tmp_path / "wandb" / name).mkdir(parents=True)
    assert last_id(tmp_path) == found


def test_what_fails_waits_for_the_flush(stub: pytest.MonkeyPatch, tmp_path: Path) -> None:
    backend = WeightsAndBiases(tmp_path, CONFIG, False)
    backend.points({"a": 1.0}, 1)
    backend.flush()
    stub.setenv("STUB_FAILS", "1")
    backend.points({"a": 2.0}, 2)
    with pytest.raises(InputError, match=r"report_to wandb, which does not log \(W&B is gone\).*--resume"):
        backend.flush()
    with pytest.raises(InputError):
        backend.close()


def test_it_fails_at_once_without_waiting(stub: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Negative control: the stub does fail."""
    backend = WeightsAndBiases(tmp_path, CONFIG, False)
    stub.setenv("STUB_FAILS", "1")
    with pytest.raises(BrokenPipeError):
        backend.tracker.log({"a": 1.0}, 1)


def test_without_an_account_it_is_refused_but_not_offline(stub: pytest.MonkeyPatch) -> None:
    check_wandb()
    stub.setenv("WANDB_MODE", "online")
    with pytest.raises(InputError, match="does not start.*No API key.*WANDB_MODE=offline"):
        check_wandb()
    stub.setenv("WANDB_API_KEY", "x")
    check_wandb()


@pytest.mark.parametrize("folder", [False, True], ids=["nothing", "a folder of that name"])
def test_without_the_package_it_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, folder: bool) -> None:
    """Whether or not it is installed here."""
    if folder:
        (tmp_path / "wandb").mkdir()
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setattr(sys, "meta_path", [finder for finder in sys.meta_path if not hasattr(finder, "known_paths")])
    with pytest.raises(InputError, match="which is not installed; expected the package wandb; fix: pip install wandb"):
        check_backends(["wandb"])


def test_none_opens_nothing_and_asks_for_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(builtins, "open", None)
    check_backends(["none"])
    assert open_backends(["none"], tmp_path, {}) == [] and list(tmp_path.iterdir()) == []


def test_every_tracker_of_the_config_can_be_opened() -> None:
    from streamprobe.config.schema import TRACKERS

    assert set(OPEN) == set(TRACKERS)


def test_the_real_package_takes_it_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    tracker = Tracker(open_backends(["wandb"], tmp_path, CONFIG), GRIDS)
    tracker.probes("auroc/validation", LAYERS, values_of(LAYERS, 1), 100)
    tracker.compare(100)
    tracker.outcome("at no lag", {"test/lift": 0.25})
    tracker.close()
    assert wandb.run is None and last_id(tmp_path)
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert not list(tmp_path.glob("wandb/*/files/wandb-metadata.json"))
