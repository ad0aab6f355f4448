"""The latest validation metrics by layer or control and by lag, for what compares layers: best layer, lift, heat maps.

Shapes: L layers, K columns; R rows of a grid (layers, then controls), C its lags.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from streamprobe.controls.table import CONTROLS
from streamprobe.reporting.heat_map import Scale
from streamprobe.reporting.tracking.images import Picture, draw
from streamprobe.reporting.tracking.tags import ProbeGrid, family, place

AUROC = "auroc/validation"
SCALES = {  # of the metrics that are kept
    AUROC: Scale("viridis", 0.5, 1.0),
    "average_precision/validation": Scale("viridis", 0.0, 1.0),
}
LIFT_SCALE = Scale("RdBu", -0.2, 0.2)


class MetricGrid:
    """The latest AUROC and average precision of all probes and controls of one solver, label and target."""

    def __init__(self, name: str, grids: Sequence[ProbeGrid]):
        """`name` is that of the family, whose probes are in `grids`; seeds and folds other than 0 have no row."""
        self.name = name
        own = [(site, c) for g in grids for c in g.columns if family(g, c) == name and c.is_first for site in g.sites]
        probed = {site: place(site, c) for site, c in own if not (site.is_control or c.control)}
        self.of_points: dict[str, list[str]] = {site.point: [] for site in probed}  # point of a block -> its rows
        for site in sorted(probed, key=lambda site: site.layer or 0):
            self.of_points[site.point].append(probed[site])
        layers = [row for rows in self.of_points.values() for row in rows]
        aside = {place(site, c): site.name for site, c in own if site.is_control}
        relabelled = dict.fromkeys((c.control, place(site, c)) for site, c in own if c.control)  # at every layer
        self.lags = sorted({c.lag for _, c in own})
        self.n_layers, self.n_aside = len(layers), len(aside)
        self.rows = [*layers, *aside, *(place for _, place in relabelled)]
        first = self.n_layers + self.n_aside
        self.relabelled: dict[str, list[int]] = {}  # control -> its rows
        for row, (control, _) in enumerate(relabelled, first):
            self.relabelled.setdefault(control, []).append(row)
        names = [*aside.values(), *(control for control, _ in relabelled)]
        self.joint = np.array([False] * self.n_layers + [not CONTROLS[name].under_lift for name in names])  # [R]
        self.asked = np.zeros((len(self.rows), len(self.lags)), dtype=bool)  # [R, C] where there is a probe
        for site, column in own:
            self.asked[self.rows.index(place(site, column)), self.lags.index(column.lag)] = True
        self.values = {metric: np.full(self.asked.shape, np.nan) for metric in SCALES}  # [R, C] each
        self.fresh = False  # whether there are values that `Tracker.compare` has not seen

    def take(self, metric: str, grid: ProbeGrid, values: Tensor) -> None:
        """Remembers the values [L, K] of probes that are of this family."""
        for k, column in enumerate(grid.columns):
            if family(grid, column) == self.name and column.is_first:
                rows = [self.rows.index(place(site, column)) for site in grid.sites]
                self.values[metric][rows, self.lags.index(column.lag)] = values[:, k].numpy()
                self.fresh = True

    def lift(self) -> NDArray[np.float64]:
        """AUROC of each layer less that of its best single control [layers, C]; NaN where one of them is not known."""
        values = np.where(self.asked & ~self.joint[:, None], self.values[AUROC], -np.inf)
        layers, aside, _ = np.split(values, np.cumsum([self.n_layers, self.n_aside]))
        controls = [*aside, *(values[rows] for rows in self.relabelled.values())]
        best = np.full(layers.shape, -np.inf)
        for control in controls:
            best = np.maximum(best, control)
        lift = np.where(np.isinf(best), np.nan, layers - np.where(np.isinf(best), 0, best))
        return np.where(np.isinf(lift), np.nan, lift)

    def best(self, metric: str) -> dict[str, NDArray[np.float64]]:
        """The highest value of all layers, and of all single controls if there are any, by lag [C]."""
        layers, controls = np.split(self.values[metric][~self.joint], [self.n_layers])
        sides = {"best layer": layers, "best control": controls}
        return {name: np.fmax.reduce(values) for name, values in sides.items() if len(values)}

    def best_relabelled(self, metric: str) -> dict[str, NDArray[np.float64]]:
        """The highest value of all layers of each control that relabels, by lag [C]."""
        return {name: np.fmax.reduce(self.values[metric][rows]) for name, rows in self.relabelled.items()}

    def images(self) -> dict[str, Picture]:
        """Heat maps by name: AUROC and average precision with a row for each control, and the lift if there is any.

        The ends of their colours are fixed, so that passes and runs compare.
        """
        lags, shown = [f"{lag:+d}" for lag in self.lags], self.n_layers + self.n_aside
        names, pictures = [name.removeprefix("control ") for name in self.rows[:shown]], {}
        rows = [*names, *self.relabelled]
        for metric, scale in SCALES.items():
            values = np.vstack([self.values[metric][:shown], *self.best_relabelled(metric).values()])
            pictures[metric.partition("/")[0]] = draw(values, rows, lags, scale)
        if (~self.joint).sum() > self.n_layers:
            pictures["lift"] = draw(self.lift(), names[: self.n_layers], lags, LIFT_SCALE)
        return pictures


def metric_grids(grids: Sequence[ProbeGrid]) -> list[MetricGrid]:
    """One for each solver, label and target that has probes at layers."""
    solvers = {family(grid, column): grid.name for grid in grids for column in grid.columns}
    made = [MetricGrid(name, [grid for grid in grids if grid.name == solver]) for name, solver in solvers.items()]
    return [grid for grid in made if grid.n_layers]
