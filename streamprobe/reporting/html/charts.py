"""The charts of report.html: matplotlib figures as SVG that takes its colours from the page, be it light or dark."""

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from streamprobe.controls.table import CONTROLS
from streamprobe.evaluation.rows import Row
from streamprobe.reporting import heat_map
from streamprobe.reporting.heat_map import Scale
from streamprobe.reporting.terminal import Grid, best_of, lags_of, lines_of

TEXT, FAINT = "#010203", "#040506"  # stand for colours of the page, see `_svg`
BEST = "#0a0b01"  # of the best layer
COLOURS = ["#0a0b02", "#0a0b03", "#0a0b04", "#0a0b05", "#0a0b06"]
SERIES = {colour: f"var(--series{i})" for i, colour in enumerate([BEST, *COLOURS])}
PAGE = {TEXT: "currentColor", FAINT: "var(--faint)", **SERIES}
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

    def drawn(*args: Any) -> str:
        with matplotlib.rc_context(STYLE):
            return _svg(draw(*args))

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


@styled
def lag_curves(grid: Grid) -> Figure:
    """AUROC of the best layer by lag with its interval, of all layers and of the controls; and the lift with its."""
    layers, controls = lines_of(grid)
    best = best_of(layers.values())
    lifted = any(not math.isnan(row["lift"]) for row in best.values())
    figure = Figure(figsize=(9.6, 3.6) if lifted else (6, 3.6), layout="constrained")
    left = figure.add_subplot(1, 2 if lifted else 1, 1)
    for line in layers.values():
        lags = sorted(line)
        left.plot(lags, [line[lag]["auroc"] for lag in lags], color=FAINT, linewidth=0.8)
    for (name, line), colour in zip(controls.items(), cycle(COLOURS), strict=False):
        lags, marker = sorted(line), CONTROLS[name].marker
        left.plot(lags, [line[lag]["auroc"] for lag in lags], "--", color=colour, marker=marker, label=name)
    _band(left, best, "auroc", "best layer")
    left.axhline(0.5, color=FAINT, linewidth=0.8, linestyle=":")
    left.set_title("AUROC")
    if lifted:
        right = figure.add_subplot(1, 2, 2)
        right.axhline(0, color=FAINT, linewidth=0.8)
        _band(right, best, "lift", "")
        right.set_title("lift: AUROC of the best layer less that of its best control")
    for axes in figure.axes:
        axes.set_xlabel("lag in tokens")
        _ticks(axes, lags_of(grid))
    handles, _ = left.get_legend_handles_labels()
    *of_controls, of_best = handles
    figure.legend(handles=[of_best, *of_controls], loc="outside lower center", ncols=6)
    return figure


def _band(axes: Any, best: Mapping[int, Row], name: str, label: str) -> None:
    low, high = ([row[f"{name}_{end}"] for row in best.values()] for end in ("low", "high"))
    axes.fill_between(list(best), low, high, color=BEST, alpha=0.25, linewidth=0)
    axes.plot(list(best), [row[name] for row in best.values()], color=BEST, marker="o", label=label, linewidth=2)


def _ticks(axes: Any, lags: Sequence[int]) -> None:
    """A tick for every lag that has room for its name."""
    room = (lags[-1] - lags[0]) / 13
    shown: list[int] = []
    for lag in sorted(lags, key=lambda lag: (lag != 0, lag)):
        if all(abs(lag - other) >= room for other in shown):
            shown.append(lag)
    axes.set_xticks(shown, [f"{lag:+d}" for lag in shown])
    axes.set_xticks(lags, minor=True)


@styled
def metric_map(grid: Grid, metric: str) -> Figure:
    """`auroc`, `average_precision` or `lift` by layer or control and lag, as a heat map."""
    layers, controls = lines_of(grid)
    lines = layers if metric == "lift" else layers | controls
    rows, lags = list(lines), lags_of(grid)
    values = np.array([[line[lag][metric] if lag in line else math.nan for lag in lags] for line in lines.values()])
    most = max(0.05, np.nanmax(np.abs(values), initial=0))
    scales = {
        "auroc": Scale("viridis", 0.5, 1.0),
        "average_precision": Scale("viridis", 0.0, most),
        "lift": Scale("RdBu", -most, most),
    }
    return heat_map.draw(
        values,
        rows,
        [f"{lag:+d}" for lag in lags],
        width=heat_map.total_width(CELL_WIDTH, rows, len(lags)),
        scale=scales[metric],
        written=("{:+.3f}" if metric == "lift" else "{:.3f}").format,
        number_size=8,
    )
