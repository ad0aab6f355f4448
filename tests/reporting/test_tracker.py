"""What is logged is what was measured: by default of the best, else of every probe."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from probe_grids import GRIDS, LABEL, LAYERS, PERSISTENCE, REAL, TEXTS, values_of
from trackers import Recorder

from streamprobe.reporting.tracking import tracker as tracking
from streamprobe.reporting.tracking.tags import place
from streamprobe.reporting.tracking.tracker import Tracker

FAMILY = f"newton/{LABEL}/token"


def tracked(every: bool, name: str = "auroc/validation") -> Recorder:
    """One pass of a metric."""
    seen = Recorder()
    tracker = Tracker([seen], GRIDS, every=every)
    for number, grid in enumerate(GRIDS):
        tracker.probes(name, grid, values_of(grid, number), 100)
    tracker.compare(100)
    return seen


def test_by_default_the_best_layer_and_the_best_control_of_each_lag_have_a_curve() -> None:
    layers, texts, persistence = (values_of(grid, number) for number, grid in enumerate((LAYERS, TEXTS, PERSISTENCE)))
    expected = {}
    for k, column in enumerate(REAL):
        rivals = [*layers[:, 3 + k].tolist(), *texts[:, k].tolist(), *(persistence[:, k - 1].tolist() if k else [])]
        start = f"auroc/validation/{FAMILY} lag{column.lag:+03d} "
        expected |= {
            f"{start}best layer": [(100, float(layers[:, k].max()))],
            f"{start}best control": [(100, max(rivals))],
        }
    assert tracked(every=False).curves == expected


def test_the_best_control_differs_without_those_of_the_layers_own_columns() -> None:
    """Negative control: a permuted label is the best one somewhere."""
    layers, texts = values_of(LAYERS, 0), values_of(TEXTS, 1)
    curves = tracked(every=False).curves
    found = [curves[f"auroc/validation/{FAMILY} lag{c.lag:+03d} best control"][0][1] for c in REAL]
    assert any(value == pytest.approx(float(layers[:, 3 + k].max())) for k, value in enumerate(found))
    assert not np.allclose(found, texts.amax(0))


def test_with_every_probe_each_value_is_a_point_of_its_own_curve() -> None:
    curves = tracked(every=True).curves
    for number, grid in enumerate(GRIDS):
        values = values_of(grid, number)
        for i, site in enumerate(grid.sites):
            for k, column in enumerate(grid.columns):
                name = f"auroc/validation/{FAMILY} lag{column.lag:+03d} {place(site, column)}"
                assert curves[name] == [(100, float(values[i, k]))]
    assert set(tracked(every=False).curves) < set(curves)


@pytest.mark.parametrize("name", ["train_loss", "gradient_norm"])
def test_of_loss_and_gradient_the_median_and_the_largest_probe_have_a_curve(name: str) -> None:
    own = [k for k, column in enumerate(LAYERS.columns) if not column.control]
    values = values_of(LAYERS, 0)[:, own].flatten()
    curves = tracked(every=False, name=name).curves
    assert set(curves) == {f"{name}/newton/median", f"{name}/newton/largest"}
    assert curves[f"{name}/newton/largest"] == [(100, float(values.max()))]
    assert curves[f"{name}/newton/median"] == [(100, float(np.median(values.numpy())))]


def test_a_metric_that_is_not_compared_has_curves_with_every_probe_alone() -> None:
    assert not tracked(every=False, name="f1/validation").curves
    assert len(tracked(every=True, name="f1/validation").curves) == sum(len(g.sites) * len(g.columns) for g in GRIDS)


def test_a_value_that_is_not_a_number_is_no_point() -> None:
    seen = Recorder()
    tracker = Tracker([seen], [TEXTS, LAYERS], every=True)
    tracker.probes("auroc/validation", TEXTS, torch.tensor([[0.5, math.nan, 1], [math.nan] * 3]), 1)
    tracker.probes("gradient_norm", LAYERS, torch.full((2, 7), math.nan), 1)
    tracker.compare(1)
    ends = sorted(name.removeprefix(f"auroc/validation/{FAMILY} ") for name in seen.curves)
    assert ends == ["lag+40 best control", "lag+40 control embed", "lag-04 best control", "lag-04 control embed"]


@pytest.mark.parametrize(("allowed", "steps"), [(0.01, [3, 8]), (1.0, [3, 6, 8])])
def test_heat_maps_come_with_doubled_tokens_and_take_a_fraction_of_the_time(
    monkeypatch: pytest.MonkeyPatch, allowed: float, steps: list[int]
) -> None:
    """Passes of a second, the first maps after two, and maps of a second and a half."""
    clock = [0.0]
    monkeypatch.setattr(tracking, "FIRST_MAPS", 2.0)
    monkeypatch.setattr(tracking.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(tracking, "MAPS_TIME", allowed)
    seen = Recorder()
    tracker = Tracker([seen], GRIDS)
    [metrics] = tracker.grids

    def images() -> dict[str, Any]:
        clock[0] += 1.5
        return {"auroc": None}

    monkeypatch.setattr(metrics, "images", images)
    for step in range(1, 9):
        metrics.fresh = True
        tracker.compare(step)
        clock[0] += 1.0
    tracker.outcome("", {})
    assert seen.maps == {f"heat maps/{FAMILY} auroc": steps}


def test_nothing_is_drawn_or_logged_of_values_that_are_not_new() -> None:
    """A run that is resumed after its end has none."""
    seen = Recorder()
    tracker = Tracker([seen], GRIDS)
    tracker.compare(7)
    tracker.outcome("", {})
    assert not seen.maps and not seen.curves


def test_without_backends_nothing_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = Tracker([], GRIDS, every=True)
    [metrics] = tracker.grids
    monkeypatch.setattr(metrics, "images", lambda: pytest.fail("drawn for nobody"))
    for number, grid in enumerate(GRIDS):
        tracker.probes("auroc/validation", grid, values_of(grid, number), 1)
    tracker.compare(1)
    tracker.text("a", "b")
    tracker.outcome("", {})
    tracker.close()


def test_every_backend_is_handed_the_same() -> None:
    both = Recorder(), Recorder()
    tracker = Tracker(both, GRIDS)
    tracker.number("a", 1.0, 2)
    tracker.text("a", "b")
    tracker.outcome("said", {})
    tracker.close()
    assert both[0].curves == both[1].curves == {"a": [(2, 1.0)]} and both[0].other == both[1].other
    assert [kind for kind, _ in both[0].other] == ["charts", "text", "outcome", "close"]
