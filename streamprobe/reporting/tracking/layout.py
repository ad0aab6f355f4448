"""Charts that overlay the curves which should be compared; TensorBoard shows them as Custom Scalars."""

import re
from collections.abc import Mapping, Sequence
from itertools import product
from typing import NamedTuple

from streamprobe.reporting.tracking.metric_grid import AUROC, SCALES, MetricGrid
from streamprobe.reporting.tracking.tags import lag_name

OPEN = AUROC  # the metric whose charts are open, since a page draws all that are
SUMMARISED = ("train_loss", "gradient_norm")  # metrics of which the median and the largest over all probes are logged
OF_EVERY_PROBE = ("f1_at_half/validation", "train_loss")  # charted beside SCALES where every probe is logged


class Category(NamedTuple):
    """Charts under one title, each given by the regular expression of the curves that it overlays."""

    title: str
    is_open: bool
    charts: Mapping[str, str]  # title -> expression


def layout(grids: Sequence[MetricGrid], every: bool) -> list[Category]:
    """All charts of the curves that are logged: for each metric, solver, label and target, then of training.

    `every`: the curves of every probe are logged too.
    """
    made = []
    for metric, grid in product(SCALES, grids):
        made += _of_the_best(metric, grid, every)
        made += _of_every_probe(metric, grid) if every else []
    if every:
        made += [one for metric, grid in product(OF_EVERY_PROBE, grids) for one in _of_every_probe(metric, grid)]
    summaries = {metric: f"^{metric}/[^/]*/(median|largest)$" for metric in SUMMARISED}
    return [*made, Category("training: median and largest of all probes", True, summaries)] if made else []


def _of_the_best(metric: str, grid: MetricGrid, every: bool) -> list[Category]:
    """Best layer against best control by lag, and each of them over all lags."""
    named, best = _title(metric, grid), ["layer", "control"][: 1 + (len(grid.rows) > grid.n_layers)]
    rivals = "(best layer|control [^/]*)" if every else "best (layer|control)"
    by_lag = {lag: _curves(metric, grid, f"{re.escape(lag)} {rivals}") for lag in map(lag_name, grid.lags)}
    over = {f"best {name}": _curves(metric, grid, f"lag[^ ]* best {name}") for name in best}
    return [
        Category(f"{named}: best layer and controls, by lag", metric == OPEN, by_lag),
        Category(f"{named}: all lags", metric == OPEN, over),
    ]


def _of_every_probe(metric: str, grid: MetricGrid) -> list[Category]:
    """All layers by lag; all lags by layer and by control."""
    named, lags = _title(metric, grid), list(map(lag_name, grid.lags))
    layers, controls = grid.rows[: grid.n_layers], grid.rows[grid.n_layers :]
    kinds = [
        ("all layers, by lag", {lag: rf"{re.escape(lag)} layer\d+" for lag in lags}, metric == OPEN),
        ("all lags, by layer", {place: f"lag[^ ]* {re.escape(place)}" for place in layers}, metric == OPEN),
        ("all lags, by control", {place: f"lag[^ ]* {re.escape(place)}" for place in controls}, False),
    ]
    return [
        Category(
            f"{named}: {title}",
            is_open,
            {name: _curves(metric, grid, pattern) for name, pattern in patterns.items()},
        )
        for title, patterns, is_open in kinds
        if patterns
    ]


def _title(metric: str, grid: MetricGrid) -> str:
    return f"{metric} {grid.name}".replace("/", " ")


def _curves(metric: str, grid: MetricGrid, pattern: str) -> str:
    """The expression of all tags of a metric and a grid whose ends, lag and place, match the pattern."""
    return f"^{re.escape(f'{metric}/{grid.name} ')}{pattern}$"
