"""TensorBoard.  The step of every curve is the number of training tokens seen so far, over all passes."""

import math
from itertools import product
from pathlib import Path

from torch import Tensor

from streamprobe.lags import Column


class Tracker:
    """Curves of every probe under tags that sort: val_auroc/newton/backtracking/token/layer12/lag+08."""

    def __init__(
        self,
        folder: Path,
        solvers: list[str],
        layers: list[int],
        columns: list[Column],
        purge_step: int | None = None,
    ):
        """Writes event files into `folder`; on resume, `purge_step` hides what was logged after the checkpoint."""
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder), purge_step=purge_step)
        self.solvers, self.layers, self.columns = solvers, layers, columns
        self.writer.add_custom_scalars(self._layout())

    def _tag(self, name: str, solver: str, layer: int, column: Column) -> str:
        return f"{name}/{solver}/{column.label}/{column.target}/layer{layer:02d}/lag{column.lag:+03d}"

    def _layout(self) -> dict[str, dict[str, list]]:
        """Custom scalars: for each metric, label and target one chart per layer that holds all lags."""
        layout: dict[str, dict[str, list]] = {}
        for name in ("val_auroc", "val_average_precision", "val_f1_at_half", "train_loss"):
            for solver, column in product(self.solvers, self.columns):
                charts = layout.setdefault(f"{name} {solver} {column.label} {column.target}", {})
                for layer in self.layers:
                    tags = charts.setdefault(f"layer {layer:02d}", ["Multiline", []])[1]
                    tags.append("^" + self._tag(name, solver, layer, column).replace("+", r"\+") + "$")
        return layout

    def probes(self, name: str, solver: str, values: Tensor, step: int) -> None:
        """One point on the curve of every probe; values [L, K], NaN left out."""
        for layer, row in zip(self.layers, values.tolist(), strict=True):
            for column, value in zip(self.columns, row, strict=True):
                if not math.isnan(value):
                    self.writer.add_scalar(self._tag(name, solver, layer, column), value, step)

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
