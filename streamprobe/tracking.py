"""TensorBoard.  The step of every curve is the number of training tokens seen so far, over all passes."""

import math
import re
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Protocol

from torch import Tensor

from streamprobe.lags import Column


class Grid(Protocol):
    """The probes of a solver, by layer and column."""

    name: str
    layers: list[int | str]
    columns: list[Column]


class Tracker:
    """Curves of every probe under tags that sort: val_auroc/newton/backtracking/token/layer12/lag+08."""

    def __init__(self, folder: Path, grids: Sequence[Grid], purge_step: int | None = None):
        """Writes event files into `folder`; on resume, `purge_step` hides what was logged after the checkpoint."""
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder), purge_step=purge_step)
        self.writer.add_custom_scalars(self._layout(grids))

    def _tag(self, name: str, solver: str, layer: int | str, column: Column) -> str:
        return f"{name}/{solver}/{column.label}/{column.target}/{place(layer, column)}/lag{column.lag:+03d}"

    def _layout(self, grids: Sequence[Grid]) -> dict[str, dict[str, list]]:
        """Custom scalars: for each metric, label and target a chart per layer and per control that holds all lags."""
        layout: dict[str, dict[str, list]] = {}
        for name, grid in product(("val_auroc", "val_average_precision", "val_f1_at_half", "train_loss"), grids):
            for column, layer in product(grid.columns, grid.layers):
                charts = layout.setdefault(f"{name} {grid.name} {column.label} {column.target}", {})
                tags = charts.setdefault(place(layer, column), ["Multiline", []])[1]
                tags.append("^" + re.escape(self._tag(name, grid.name, layer, column)) + "$")
        return layout

    def probes(self, name: str, grid: Grid, values: Tensor, step: int) -> None:
        """One point on the curve of every probe of a solver; values [L, K], NaN left out."""
        for layer, row in zip(grid.layers, values.tolist(), strict=True):
            for column, value in zip(grid.columns, row, strict=True):
                if not math.isnan(value):
                    self.writer.add_scalar(self._tag(name, grid.name, layer, column), value, step)

    def number(self, name: str, value: float, step: int) -> None:
        """One point on a curve of the whole run."""
        self.writer.add_scalar(name, value, step)

    def text(self, name: str, text: str) -> None:
        """A page of the text tab, shown as it is."""
        self.writer.add_text(name, "    " + text.replace("\n", "\n    "))

    def flush(self) -> None:
        """Puts on disk what was logged so far."""
        self.writer.flush()

    def close(self) -> None:
        """Ends the event file."""
        self.writer.close()


def place(layer: int | str, column: Column) -> str:
    """Where a probe stands: layer12, embed, layer12-permuted, and with its seed, if that is not 0, layer12-seed1."""
    where = f"layer{layer:02d}" if isinstance(layer, int) else layer
    control = f"-{column.control}" if column.control else ""
    return where + control + (f"-seed{column.seed}" if column.seed else "")
