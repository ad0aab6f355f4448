"""The charts of report.html: matplotlib figures as SVG that takes its ink from the page, be it light or dark."""

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
from streamprobe.reporting.terminal import Grid, best_of, lags_of, lines_of

matplotlib.use("svg")
INK, FAINT = "#010203", "#040506"  # stand for colours of the page, see `_svg`
SERIES = ["#0a0b01", "#0a0b02", "#0a0b03", "#0a0b04", "#0a0b05", "#0a0b06"]
PAGE = {INK: "currentColor", FAINT: "var(--faint)"} | {c: f"var(--series{i})" for i, c in enumerate(SERIES)}
STYLE: Any = {
    "svg.fonttype": "none", "svg.hashsalt": "streamprobe", "font.size": 9, "text.color": INK, "axes.edgecolor": FAINT,
    "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK, "axes.spines.top": False,
    "axes.spines.right": False, "axes.facecolor": "none", "legend.frameon": False, "axes.titlesize": 9,
    "axes.titlelocation": "left", "lines.linewidth": 1.4, "lines.markersize": 4, "text.parse_math": False,
}  # fmt: skip


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
    for (name, line), colour in zip(controls.items(), cycle(SERIES[1:]), strict=False):
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
    handles, names = left.get_legend_handles_labels()
    figure.legend([handles[-1], *handles[:-1]], [names[-1], *names[:-1]], loc="outside lower center", ncols=6)
    return figure


def _band(axes: Any, best: Mapping[int, Row], name: str, label: str) -> None:
    low, high = ([row[f"{name}_{end}"] for row in best.values()] for end in ("low", "high"))
    axes.fill_between(list(best), low, high, color=SERIES[0], alpha=0.25, linewidth=0)
    axes.plot(list(best), [row[name] for row in best.values()], color=SERIES[0], marker="o", label=label, linewidth=2)


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
def heat_map(grid: Grid, metric: str) -> Figure:
    """`auroc`, `average_precision` or `lift` by layer or control and lag, each number in its cell."""
    layers, controls = lines_of(grid)
    lines = layers if metric == "lift" else layers | controls
    lags = lags_of(grid)
    values = np.array([[line[lag][metric] if lag in line else math.nan for lag in lags] for line in lines.values()])
    most = max(0.05, np.nanmax(np.abs(values), initial=0))
    low, high = {"auroc": (0.5, 1.0), "average_precision": (0.0, most), "lift": (-most, most)}[metric]
    colours = matplotlib.colormaps["RdBu" if metric == "lift" else "viridis"]
    figure = Figure(figsize=(1.6 + 0.58 * len(lags), 0.6 + 0.27 * len(lines)), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(values, colours, vmin=low, vmax=high, aspect="auto", interpolation="none")
    for i, k in zip(*np.nonzero(~np.isnan(values)), strict=True):
        place = np.clip((values[i, k] - low) / (high - low), 0, 1)
        bright = np.dot(colours(place)[:3], (0.299, 0.587, 0.114)) > 0.55
        text = f"{values[i, k]:{'+' if metric == 'lift' else ''}.3f}"
        axes.text(k, i, text, ha="center", va="center", color="#111111" if bright else "#ffffff", fontsize=8)
    axes.set_xticks(range(len(lags)), [f"{lag:+d}" for lag in lags])
    axes.set_yticks(range(len(lines)), list(lines))
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.xaxis.tick_top()
    return figure
