"""The lift and the maps of the latest values: over the best control, where there is one."""

from typing import Any

import numpy as np
from builders import sites_of
from probe_grids import GRIDS, LABEL, LAYERS, PERSISTENCE, REAL, TEXTS, Grid, values_of
from torch import Tensor

from streamprobe.reporting.tracking.metric_grid import AUROC, MetricGrid, metric_grids


def lift_by_loop(layers: Tensor, texts: Tensor, persistence: Tensor) -> list[list[float]]:
    """AUROC of each layer and lag less that of the best control, permuted ones of its own layer only."""
    lift = []
    for i in range(2):
        controls = [
            [layers[i, 3 + k], *texts[:, k], *(persistence[:, k - 1] if k else [])] for k in range(3)
        ]  # persistence looks ahead, so the first lag has none
        lift.append([float(layers[i, k] - max(controls[k])) for k in range(3)])
    return lift


def filled() -> tuple[MetricGrid, dict[str, Tensor]]:
    """The grid of all values but those of persistence, and the values."""
    [metrics] = metric_grids(GRIDS)
    values = {"layers": values_of(LAYERS, 0), "texts": values_of(TEXTS, 1), "persistence": values_of(PERSISTENCE, 2)}
    metrics.take(AUROC, LAYERS, values["layers"])
    metrics.take(AUROC, TEXTS, values["texts"])
    return metrics, values


def test_the_lift_is_over_the_best_control() -> None:
    metrics, values = filled()
    assert np.isnan(metrics.lift()[:, 1:]).all(), "persistence is not known yet, so neither is the lift"
    assert not np.isnan(metrics.lift()[:, 0]).any()
    metrics.take(AUROC, PERSISTENCE, values["persistence"])
    np.testing.assert_allclose(metrics.lift(), lift_by_loop(**values))


def test_the_lift_fails_to_be_that_without_the_other_controls() -> None:
    metrics, values = filled()
    metrics.take(AUROC, PERSISTENCE, values["persistence"])
    wrong = (values["layers"][:, :3] - values["texts"][0]).numpy()
    assert not np.allclose(metrics.lift(), wrong)


def test_without_controls_there_is_no_lift_and_no_map_of_it() -> None:
    metrics = MetricGrid(f"newton/{LABEL}/token", [Grid("newton", sites_of([3]), REAL)])
    assert np.isnan(metrics.lift()).all() and set(metrics.images()) == {"auroc", "average_precision"}


def test_maps_have_a_row_for_every_control_and_the_best_permuted_one(monkeypatch: Any) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr("streamprobe.reporting.tracking.metric_grid.draw", lambda *given: drawn.append(given))
    metrics, values = filled()
    assert list(metrics.images()) == ["auroc", "average_precision", "lift"]
    auroc, _, lift = drawn
    shown, rows, lags, _ = auroc
    assert rows == ["layer03", "layer12", "embed", "text", "persistence", "permuted"] and lags == ["-4", "+4", "+40"]
    np.testing.assert_array_equal(shown[-1], values["layers"][:, 3:6].amax(0))
    np.testing.assert_array_equal(shown[:4], np.vstack([values["layers"][:, :3], values["texts"]]))
    _, rows, _, _ = lift
    assert rows == ["layer03", "layer12"]


def test_joint_controls_have_a_row_and_are_neither_the_best_control_nor_under_the_lift() -> None:
    joint = Grid("newton", sites_of(["joint+chain"]), REAL[1:])
    metrics, _ = filled()
    metrics.take(AUROC, PERSISTENCE, values_of(PERSISTENCE, 2))
    [beside] = metric_grids([*GRIDS, joint])
    for grid, seed in zip(GRIDS, range(3), strict=True):
        beside.take(AUROC, grid, values_of(grid, seed))
    beside.take(AUROC, joint, values_of(joint, 3) + 1)
    assert "control joint+chain" in beside.rows and "control joint+chain" not in metrics.rows
    np.testing.assert_array_equal(beside.lift(), metrics.lift())
    for name, values in beside.best(AUROC).items():
        np.testing.assert_array_equal(values, metrics.best(AUROC)[name])


def test_with_joint_controls_alone_there_is_no_lift_and_no_best_control() -> None:
    grids = [Grid("newton", sites_of([3]), REAL), Grid("newton", sites_of(["joint"]), REAL[1:])]
    metrics = MetricGrid(f"newton/{LABEL}/token", grids)
    assert np.isnan(metrics.lift()).all() and set(metrics.images()) == {"auroc", "average_precision"}
    assert set(metrics.best(AUROC)) == {"best layer"}
