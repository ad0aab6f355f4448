"""The Custom Scalars tab: charts that overlay the curves which should be compared."""

import re
from collections.abc import Sequence
from itertools import product
from typing import Any

from streamprobe.reporting.tensorboard.metric_grid import SCALES, MetricGrid

CHARTED = (*SCALES, "val_f1_at_half", "train_loss")
OPEN = "val_auroc"  # the metric whose charts are open, since a page draws all that are


def layout(grids: Sequence[MetricGrid]) -> Any:
    """TensorBoard's message of all charts: best layer and controls by lag, all layers by lag, all lags by layer.

    A chart names its curves by one regular expression.
    """
    from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

    made = Layout()
    for metric, grid in product(CHARTED, grids):
        lags = [f"lag{lag:+03d}" for lag in grid.lags]
        layers, controls = grid.rows[: grid.n_layers], grid.rows[grid.n_layers :]
        ranked = lags if controls and metric in SCALES else []
        kinds = [
            ("best layer and controls", ranked, r"(best layer|control [^/]*)/{}"),
            ("all layers, by lag", lags, r"layer\d+/{}"),
            ("all lags, by layer", layers, "{}/lag[^/]*"),
            ("all lags, by control", controls, "{}/lag[^/]*"),
        ]
        for title, names, pattern in kinds:
            if names:
                shown = metric == OPEN and names is not controls
                name = f"{metric} {grid.name.replace('/', ' ')}: {title}"
                category = made.category.add(title=name, closed=not shown)
                for each in names:
                    curves = f"^{re.escape(f'{metric}/{grid.name}/')}{pattern.replace('{}', re.escape(each))}$"
                    category.chart.add(title=each).multiline.tag.append(curves)
    return made
