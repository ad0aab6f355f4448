"""The charts of report.html: matplotlib figures as SVG that takes its colours from the page, be it light or dark."""

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import cycle
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from streamprobe.controls.table import CONTROLS
from streamprobe.evaluation.rows import GAINS, Row
from streamprobe.evaluation.verdict import is_certain
from streamprobe.reporting import heat_map
from streamprobe.reporting.grids import (
    Grid,
    best_of,
    certain,
    gained,
    in_units,
    known,
    lags_of,
    lines_of,
    rows_of,
    written,
)
from streamprobe.reporting.heat_map import Scale

TEXT, FAINT, GROUND = "#010203", "#040506", "#070809"  # stand for colours of the page, see `_svg`
BEST = "#0a0b01"  # of the best layer
COLOURS = ["#0a0b02", "#0a0b03", "#0a0b04", "#0a0b05", "#0a0b06"]
SERIES = {colour: f"var(--series{i})" for i, colour in enumerate([BEST, *COLOURS])}
PAGE = {TEXT: "currentColor", FAINT: "var(--faint)", GROUND: "var(--page)", **SERIES}
MARKERS = "osD^vx"  # of runs, so that their curves can be told apart without colour
STYLE: Any = {
    "axes.edgecolor": FAINT,
    "axes.facecolor": "none",
    "axes.labelcolor": TEXT,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 9,
    "font.size": 9,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "lines.markersize": 4,
    "svg.fonttype": "none",
    "svg.hashsalt": "streamprobe",
    "text.color": TEXT,
    "text.parse_math": False,
    "xtick.color": TEXT,
    "ytick.color": TEXT,
}
CELL_WIDTH = 42  # points, of a cell of a heat map


def styled(draw: Callable[..., Figure]) -> Callable[..., str]:
    """The function with its figure made in the style of the page, and returned as SVG."""

    def drawn(*args: Any, **named: Any) -> str:
        with matplotlib.rc_context(STYLE):
            return _svg(draw(*args, **named))

    return drawn


def _svg(figure: Figure) -> str:
    """A figure as an SVG element that holds no address, name or font of its own and scales with the page."""
    text = io.StringIO()
    figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    svg = text.getvalue()[text.getvalue().index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.S)
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.S)
    svg = re.sub(r'<g id="[^"]*"(/?)>', r"<g\1>", svg).replace("<g/>\n", "")
    svg = re.sub(r"font-family: [^;\"]*; ", "", svg)
    svg = re.sub(r' transform="rotate\(-0 [^"]*"', "", svg)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg).replace("xlink:href", "href")
    for stand_in, colour in PAGE.items():
        svg = svg.replace(stand_in, colour)
    return re.sub(r"\n\s*", "\n", svg)


TITLES = {
    "gain_bits": "gain: mbit a token that the best layer adds to joint+chain",
    "lift": "lift: AUROC of the best layer less that of its best single control",
}
SIGNED = ("gain_bits", "gain", "gain_within", "lift")  # above or below 0


@styled
def lag_curves(grid: Grid) -> Figure:
    """AUROC by lag of the best layer with its interval, of all layers and of the controls; and what the best one adds.

    That is the gain in bits where it is known, else the lift, each with its interval.
    """
    layers, controls = lines_of(grid)
    metric = "gain_bits" if gained(layers) else "lift"
    best = best_of(layers.values())
    two = bool(known(rows_of(layers), metric))
    figure = Figure(figsize=(9.6, 3.8) if two else (6, 3.8), layout="constrained")
    left = figure.add_subplot(1, 2 if two else 1, 1)
    _faint(left, layers, "auroc")
    for (name, line), colour in zip(controls.items(), cycle(COLOURS), strict=False):
        lags, marker = sorted(line), CONTROLS[name].marker
        left.plot(lags, [line[lag]["auroc"] for lag in lags], "--", color=colour, marker=marker, label=name)
    _band(left, best, "auroc", label="best layer")
    left.axhline(0.5, color=FAINT, linewidth=0.8, linestyle=":")
    left.set_title("AUROC")
    if two:
        _gains(figure.add_subplot(1, 2, 2), layers, metric)
    _ticks(left, lags_of(grid))
    handles, _ = left.get_legend_handles_labels()
    *of_controls, of_best = handles
    figure.legend(handles=[of_best, *of_controls], loc="outside lower center", ncols=6)
    return figure


@styled
def lift_curve(grid: Grid) -> Figure:
    """The lift of the best layer by lag with its interval."""
    figure = Figure(figsize=(5.4, 3.4), layout="constrained")
    axes = figure.add_subplot()
    _gains(axes, lines_of(grid)[0], "lift")
    return figure


def _gains(axes: Any, layers: Grid, metric: str) -> None:
    """What the best layer of each lag adds, with its interval; of `gain_bits` also all others, and what is certain.

    The best is the one that adds most bits; of the lift, whose chart is that of AUROC's best layers, these.
    """
    bits = metric == "gain_bits"
    lines = gained(layers) if bits else layers
    best = best_of(lines.values(), metric if bits else "auroc")
    axes.axhline(0, color=FAINT, linewidth=0.8)
    _band(axes, best, metric)
    if bits:
        _faint(axes, lines, metric)
        sure = certain(best.values())
        axes.plot(
            [row["lag"] for row in sure],
            [in_units(row, metric) for row in sure],
            "o",
            color=TEXT,
            fillstyle="none",
            ms=9,
        )
    axes.set_title(TITLES[metric])
    _ticks(axes, lags_of(lines))


def _faint(axes: Any, layers: Grid, metric: str) -> None:
    """A thin line for every layer."""
    for line in layers.values():
        lags = sorted(line)
        axes.plot(lags, [in_units(line[lag], metric) for lag in lags], color=FAINT, linewidth=0.8)


def _band(axes: Any, best: Mapping[int, Row], name: str, *, colour: str = BEST, label: str = "") -> None:
    """A metric by lag, with its interval."""
    low, high = ([in_units(row, f"{name}_{end}") for row in best.values()] for end in ("low", "high"))
    axes.fill_between(list(best), low, high, color=colour, alpha=0.25, linewidth=0)
    axes.plot(
        list(best), [in_units(row, name) for row in best.values()], color=colour, marker="o", label=label, linewidth=2
    )


def _ticks(axes: Any, lags: Sequence[int]) -> None:
    """The axis of lags: a tick for every one that has room for its name."""
    axes.set_xlabel("lag in tokens")
    room = (lags[-1] - lags[0]) / 13
    shown: list[int] = []
    for lag in sorted(lags, key=lambda lag: (lag != 0, lag)):
        if all(abs(lag - other) >= room for other in shown):
            shown.append(lag)
    axes.set_xticks(shown, [f"{lag:+d}" for lag in shown])
    axes.set_xticks(lags, minor=True)


@styled
def metric_map(grid: Grid, metric: str, least: float = 0.05) -> Figure:
    """A metric by layer or control and lag, as a heat map, with lines around what is certain.

    What a layer adds (the lift, and each gain) has no rows of controls, and a gain only the lags at which it is known.
    Its darkest colours stand for the largest value or for `least`, whichever is more.
    """
    layers, controls = lines_of(grid)
    lines = (gained(layers) if metric in GAINS else layers) if metric in SIGNED else layers | controls
    rows, lags = list(lines), lags_of(lines)
    values = np.array(
        [[in_units(line[lag], metric) if lag in line else math.nan for lag in lags] for line in lines.values()]
    )
    sure = np.array([[lag in line and is_certain(line[lag]) for lag in lags] for line in lines.values()])
    most = max(least, np.nanmax(np.abs(values), initial=0))
    scales = {"auroc": Scale("viridis", 0.5, 1.0), "average_precision": Scale("viridis", 0.0, most)}
    return heat_map.draw(
        values,
        rows,
        [f"{lag:+d}" for lag in lags],
        width=heat_map.total_width(CELL_WIDTH, rows, len(lags)),
        scale=scales.get(metric, Scale("RdBu", -most, most)),
        written=partial(written, name=metric, sign="+" if metric in SIGNED else ""),
        number_size=8,
        outlined=sure,
        outlines=((GROUND, 3.6), (TEXT, 1.6)),
    )


class NamedGrid(NamedTuple):
    """The grid of one of several runs, by the run's name."""

    name: str
    grid: Grid


def _in_legend(name: str) -> str:
    """A name that a legend shows, which leaves out what begins with an underscore."""
    return f"\u200b{name}"


@styled
def runs_curves(runs: Sequence[NamedGrid]) -> Figure:
    """AUROC and, where a run has it, the gain in bits of each run's best layer by lag, with intervals."""
    two = any(gained(lines_of(run.grid)[0]) for run in runs)
    figure = Figure(figsize=(9.6, 3.8) if two else (6, 3.8), layout="constrained")
    every = figure.subplots(1, 2 if two else 1, squeeze=False)[0]
    lags = sorted({lag for run in runs for lag in lags_of(run.grid)})
    for run, colour, marker in zip(runs, cycle([BEST, *COLOURS]), cycle(MARKERS), strict=False):
        layers, _ = lines_of(run.grid)
        _band(every[0], best_of(layers.values()), "auroc", colour=colour, label=_in_legend(run.name))
        every[0].lines[-1].set_marker(marker)
        if gained(layers):
            _band(every[1], best_of(gained(layers).values(), "gain_bits"), "gain_bits", colour=colour)
            every[1].lines[-1].set_marker(marker)
    every[0].axhline(0.5, color=FAINT, linewidth=0.8, linestyle=":")
    every[0].set_title("AUROC of the best layer")
    if two:
        every[1].axhline(0, color=FAINT, linewidth=0.8)
        every[1].set_title(TITLES["gain_bits"])
        _ticks(every[1], sorted({lag for run in runs for lag in lags_of(gained(lines_of(run.grid)[0]))}))
    _ticks(every[0], lags)
    handles, _ = every[0].get_legend_handles_labels()
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    return figure
