"""Curves of what is trained in epochs begin at the linear probes, and go where each backend takes them."""

import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from probe_grids import GRIDS, LABEL, LAYERS, REAL
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from torch import Tensor
from trackers import Recorder, lines_of, use_stub

from streamprobe.reporting.tracking.epochs import curves_over_linear
from streamprobe.reporting.tracking.tensorboard import TensorBoard
from streamprobe.reporting.tracking.tracker import Tracker
from streamprobe.reporting.tracking.weights_and_biases import WeightsAndBiases

PROBES: Any = SimpleNamespace(kind="mlp64", sites=LAYERS.sites, columns=REAL)
START = "loss_over_linear/validation/mlp64"


def losses() -> Tensor:
    """Of 2 layers, 3 columns and 4 epochs; one probe has no training token."""
    made = torch.rand(2, 3, 2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    made[1, 2] = math.nan
    return made


def test_the_median_and_the_lowest_of_all_probes_are_told_from_the_linear_ones_on() -> None:
    curves = curves_over_linear(PROBES, losses(), every=False)
    assert set(curves) == {
        f"{START}/{end}".replace("validation", s) for s in ("train", "validation") for end in ("median", "lowest")
    }
    own = (losses() - losses()[..., :1])[:, :, 1].flatten(0, 1)[:5]  # the last one is not known
    assert curves[f"{START}/median"] == own.median(0).values.tolist() and curves[f"{START}/median"][0] == 0
    assert curves[f"{START}/lowest"] == own.amin(0).tolist() != own.amax(0).tolist()


def test_with_every_probe_each_that_is_known_has_a_curve() -> None:
    curves = curves_over_linear(PROBES, losses(), every=True)
    name = f"{START}/{LABEL}/token lag+04 layer12"
    assert curves[name] == (losses() - losses()[..., :1])[1, 1, 1].tolist()
    assert f"{START}/{LABEL}/token lag+40 layer12" not in curves and len(curves) == 4 + 2 * 5
    assert not curves_over_linear(PROBES, losses() * math.nan, every=True)


def test_a_tracker_hands_them_to_its_backends_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Recorder()
    Tracker([seen], GRIDS).epochs(PROBES, losses())
    curves = curves_over_linear(PROBES, losses(), every=False)
    assert seen.curves == {name: list(enumerate(values)) for name, values in curves.items()}
    monkeypatch.setattr("streamprobe.reporting.tracking.tracker.curves_over_linear", None)
    Tracker([], GRIDS).epochs(PROBES, losses())


def test_tensorboard_has_a_chart_of_each_kind(tmp_path: Path) -> None:
    tracker = Tracker([TensorBoard(tmp_path, {})], GRIDS, every=True, in_epochs=["quad16", "mlp64"])
    tracker.epochs(PROBES, losses())
    tracker.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    expected = curves_over_linear(PROBES, losses(), every=False)[f"{START}/median"]
    points = [(point.step, pytest.approx(point.value)) for point in events.Scalars(f"{START}/median")]
    assert points == list(enumerate(expected))
    written = layout_pb2.Layout()
    written.ParseFromString(events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    quad, mlp = written.category[-1].chart
    tags = events.Tags()["scalars"]
    assert sum(bool(re.search(mlp.multiline.tag[0], tag)) for tag in tags) == 4 < len(tags)
    assert not any(re.search(quad.multiline.tag[0], tag) for tag in tags)


def test_wandb_is_given_them_behind_all_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_stub(monkeypatch)
    tracker = Tracker([WeightsAndBiases(tmp_path / "demo", {}, False)], GRIDS)
    tracker.epochs(PROBES, losses())
    tracker.epochs(SimpleNamespace(**vars(PROBES) | {"kind": "attn4"}), losses()[..., :2])  # type: ignore[arg-type]
    tracker.number("progress/pass", 3, 1000)
    tracker.outcome("so it is", {})
    tracker.close()
    logged = [values for kind, values in lines_of(tmp_path / "demo") if kind in ("log", "ignored")]
    assert logged[0] == [1000, {"progress/pass": 3}]
    found = [values[f"{START}/median"] for step, values in logged if f"{START}/median" in values]
    assert found == curves_over_linear(PROBES, losses(), every=False)[f"{START}/median"]
    assert [f"{START}/median".replace("mlp64", "attn4") in values for _, values in logged[1:5]] == [
        True,
        True,
        False,
        False,
    ]
