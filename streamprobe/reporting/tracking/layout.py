"""Charts that overlay the curves which should be compared; TensorBoard shows them as Custom Scalars."""

import re
from collections.abc import Mapping, Sequence
from itertools import product
from typing import NamedTuple

from streamprobe.probes.sites import RESID_POST
from streamprobe.reporting.tracking.epochs import OVER_LINEAR
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


def layout(grids: Sequence[MetricGrid], every: bool, in_epochs: Sequence[str] = ()) -> list[Category]:
    """All charts of the curves that are logged: for each metric, solver, label and target, then of training.

    `every`: the curves of every probe are logged too.  `in_epochs`: kinds of probes that have curves over epochs.
    """
    made = []
    for metric, grid in product(SCALES, grids):
        made += _of_the_best(metric, grid, every)
        made += _of_every_probe(metric, grid) if every else []
    if every:
        made += [one for metric, grid in product(OF_EVERY_PROBE, grids) for one in _of_every_probe(metric, grid)]
    summaries = {metric: f"^{metric}/[^/]*/(median|largest)$" for metric in SUMMARISED}
    made += [Category("training: median and largest of all probes", True, summaries)] if made else []
    above = {kind: f"^{OVER_LINEAR}/[^/]*/{kind}/(median|lowest)$" for kind in in_epochs}
    return made + ([Category(f"{OVER_LINEAR} by epoch: kinds that begin at it", True, above)] if above else [])


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
    named = _title(metric, grid)
    layers, controls = grid.rows[: grid.n_layers], grid.rows[grid.n_layers :]
    kinds = [
        *_all_layers_by_lag(grid, is_open=metric == OPEN),
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


def _all_layers_by_lag(grid: MetricGrid, is_open: bool) -> list[tuple[str, dict[str, str], bool]]:
    """All layers by lag, a chart for each point of the blocks that is read."""
    found = []
    for point, places in grid.of_points.items():
        title = "all layers, by lag" if point == RESID_POST else f"{point} of all layers, by lag"
        one = "|".join(map(re.escape, places))
        found.append((title, {lag: f"{re.escape(lag)} ({one})" for lag in map(lag_name, grid.lags)}, is_open))
    return found


def _title(metric: str, grid: MetricGrid) -> str:
    return f"{metric} {grid.name}".replace("/", " ")


def _curves(metric: str, grid: MetricGrid, pattern: str) -> str:
    """The expression of all tags of a metric and a grid whose ends, lag and place, match the pattern."""
    return f"^{re.escape(f'{metric}/{grid.name} ')}{pattern}$"
