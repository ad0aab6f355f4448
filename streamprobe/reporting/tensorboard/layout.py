"""What TensorBoard shows: the tag of each curve, the charts that overlay them, and the latest values as heat maps.

Shapes: L layers, K columns; R rows of a board (layers, then controls), C its lags.
"""

import re
from collections.abc import Sequence
from itertools import product
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from streamprobe.lags import Column
from streamprobe.probes.sites import Site
from streamprobe.reporting.tensorboard.heat_map import draw

SHOWN = ("val_auroc", "val_average_precision")  # the metrics of heat maps and of best layers
CHARTED = (*SHOWN, "val_f1_at_half", "train_loss")


class Grid(Protocol):
    """The probes of a solver, by layer and column."""

    name: str
    sites: list[Site]
    columns: list[Column]


def place(site: Site, column: Column) -> str:
    """Where a probe stands: layer12, control embed, layer12 control permuted, layer12 seed1."""
    where = f"control {site}" if site.is_control else site.name
    return (
        where + (f" control {column.control}" if column.control else "") + (f" seed{s}" if (s := column.seed) else "")
    )


def family(grid: Grid, column: Column) -> str:
    """What is compared in one chart: newton/backtracking/token."""
    return f"{grid.name}/{column.label}/{column.target}"


def tag(grid: Grid, site: Site, column: Column) -> str:
    """The end of a curve's tag; they sort: newton/backtracking/token/layer12/lag+08."""
    return f"{family(grid, column)}/{place(site, column)}/lag{column.lag:+03d}"


class Board:
    """The latest values of all probes and controls of one solver, label and target, by layer or control and lag."""

    def __init__(self, name: str, grids: Sequence[Grid]):
        """`grids` are those of the solver `name`'s family; seeds other than 0 have no row."""
        self.name = name
        own = [(site, c) for g in grids for c in g.columns if family(g, c) == name and not c.seed for site in g.sites]
        layers = sorted({site.layer or 0 for site, c in own if not (site.is_control or c.control)})
        aside = dict.fromkeys(place(site, c) for site, c in own if site.is_control)
        permuted = sorted({place(site, c) for site, c in own if c.control})
        self.lags = sorted({c.lag for _, c in own})
        self.n_layers, self.n_aside, self.n_permuted = len(layers), len(aside), len(permuted)
        self.rows = [*(f"layer{layer:02d}" for layer in layers), *aside, *permuted]
        self.asked = np.zeros((len(self.rows), len(self.lags)), dtype=bool)  # [R, C] where there is a probe
        for site, column in own:
            self.asked[self.rows.index(place(site, column)), self.lags.index(column.lag)] = True
        self.values = {metric: np.full(self.asked.shape, np.nan) for metric in SHOWN}  # [R, C] each

    def take(self, metric: str, grid: Grid, values: Tensor) -> None:
        """Remembers the values [L, K] of a grid, if they are of this family."""
        for k, column in enumerate(grid.columns):
            if family(grid, column) == self.name and not column.seed:
                rows = [self.rows.index(place(site, column)) for site in grid.sites]
                self.values[metric][rows, self.lags.index(column.lag)] = values[:, k].numpy()

    def lift(self) -> NDArray[np.float64]:
        """AUROC of each layer less that of its best control [layers, C]; NaN where one of them is not known."""
        values = np.where(self.asked, self.values["val_auroc"], -np.inf)
        layers, aside, permuted = np.split(values, np.cumsum([self.n_layers, self.n_aside]))
        controls = [*aside, permuted] if len(permuted) else list(aside)
        best = np.full(layers.shape, -np.inf)
        for control in controls:
            best = np.maximum(best, control)
        lift = np.where(np.isinf(best), np.nan, layers - np.where(np.isinf(best), 0, best))
        return np.where(np.isinf(lift), np.nan, lift)

    def highest(self, metric: str) -> dict[str, NDArray[np.float64]]:
        """Best layer, and controls of all layers together, by lag [C]."""
        values = self.values[metric]
        layers, permuted = values[: self.n_layers], values[self.n_layers + self.n_aside :]
        best = {"best layer": np.fmax.reduce(layers)}
        return best | {"control permuted": np.fmax.reduce(permuted)} if len(permuted) else best

    def images(self) -> dict[str, bytes]:
        """Heat maps as PNG by their name, of what is known: AUROC, average precision and lift."""
        lags = [f"{lag:+d}" for lag in self.lags]
        shown = self.n_layers + self.n_aside
        names, pictures = [name.removeprefix("control ") for name in self.rows[:shown]], {}
        for metric in SHOWN:
            values = self.values[metric][:shown]
            rows = names
            if self.n_permuted:
                rows, values = (
                    [*names, "permuted"],
                    np.vstack([values, self.highest(metric)["control permuted"]]),
                )
            low = 0.5 if metric == "val_auroc" else 0.0
            pictures[metric] = draw(values, rows, lags, low, 1.0, "sequential")
        if len(self.rows) > self.n_layers:
            pictures["val_lift"] = draw(self.lift(), names[: self.n_layers], lags, -0.2, 0.2, "diverging")
        return pictures


def make_boards(grids: Sequence[Grid]) -> list[Board]:
    """A board for each solver, label and target."""
    names = dict.fromkeys(family(grid, column) for grid in grids for column in grid.columns)
    boards = [Board(name, [grid for grid in grids if grid.name == name.split("/")[0]]) for name in names]
    return [board for board in boards if board.n_layers]


def layout(boards: Sequence[Board]) -> Any:
    """Custom scalars, as TensorBoard's message: best layers and controls by lag, all layers by lag, all lags by layer.

    A chart names its curves by one regular expression.  Only the charts of AUROC are open, since a page draws all
    charts that are.
    """
    from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

    made = Layout()
    for metric, board in product(CHARTED, boards):
        lags = [f"lag{lag:+03d}" for lag in board.lags]
        layers, controls = board.rows[: board.n_layers], board.rows[board.n_layers :]
        kinds = [
            ("best layer and controls", lags if controls and metric in SHOWN else [], r"(best layer|control [^/]*)/{}"),
            ("all layers, by lag", lags, r"layer\d+/{}"),
            ("all lags, by layer", layers, "{}/lag[^/]*"),
            ("all lags, by control", controls, "{}/lag[^/]*"),
        ]
        for title, names, pattern in kinds:
            if names:
                shown = metric == SHOWN[0] and names is not controls
                name = f"{metric} {board.name.replace('/', ' ')}: {title}"
                category = made.category.add(title=name, closed=not shown)
                for each in names:
                    curves = f"^{re.escape(f'{metric}/{board.name}/')}{pattern.replace('{}', re.escape(each))}$"
                    category.chart.add(title=each).multiline.tag.append(curves)
    return made
