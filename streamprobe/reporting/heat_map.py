"""A heat map: a table of numbers, each in a cell of its colour.  report.html shows it as SVG, TensorBoard as PNG.

Shapes: R rows, C columns of cells.  Lengths are in points, which are the pixels of a PNG.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

DPI = 72  # at which a pixel is a point
CELL_HEIGHT = 19
NAME_SIZE = 9.5  # of the font of the names of rows and columns
LETTER_WIDTH = 0.6 * NAME_SIZE  # of such a name, on average
GAP = 4  # between the name of a row and its cells
BRIGHT = 0.55  # brightness of a colour, of 1, from which the number on it is dark
DARK, LIGHT = "#111111", "#ffffff"
OUTLINES = ((LIGHT, 3.6), (DARK, 1.6))  # colour and width of the lines around a cell, the lower one first


class Scale(NamedTuple):
    """Which colour stands for which number; what lies outside of the ends has the colour of the nearer one."""

    colours: str  # a colour map of matplotlib
    low: float
    high: float


def cell_width(width: float, rows: Sequence[str], n_columns: int) -> float:
    """The width of a cell of a map that is `width` wide and has rows of these names."""
    return (width - _names_width(rows)) / n_columns


def total_width(cell_width: float, rows: Sequence[str], n_columns: int) -> float:
    """The width of a map with rows of these names and cells of this width."""
    return _names_width(rows) + cell_width * n_columns


def _names_width(rows: Sequence[str]) -> float:
    return LETTER_WIDTH * max(map(len, rows)) + GAP + 2


def draw(
    values: NDArray[np.float64],
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    width: float,
    scale: Scale,
    written: Callable[[float], str],
    number_size: float,
    outlined: NDArray[np.bool_] | None = None,
    outlines: Sequence[tuple[str, float]] = OUTLINES,
) -> Any:
    """The values [R, C] with the names of their rows and columns, each number in its cell as `written` gives it.

    A NaN is a blank cell.  `number_size` is that of the numbers' font.  Where `outlined` [R, C] is True there are lines
    around the cell, `outlines`: two, of which one stands out from any colour.  Returns a figure of matplotlib.
    """
    import matplotlib  # here, since it takes half a second and most commands draw nothing
    from matplotlib.figure import Figure

    cell, left, height = cell_width(width, rows, len(columns)), _names_width(rows), CELL_HEIGHT * (len(rows) + 1)
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI)
    axes = figure.add_axes((left / width, 0, 1 - left / width, len(rows) / (len(rows) + 1)))
    axes.set_axis_off()  # its ticks would take as long to draw as the numbers
    colours = matplotlib.colormaps[scale.colours]
    axes.imshow(values, colours, vmin=scale.low, vmax=scale.high, aspect="auto", interpolation="none")
    brightness = colours((values - scale.low) / (scale.high - scale.low))[..., :3] @ (0.299, 0.587, 0.114)
    write: Any = partial(figure.text, transform=axes.transData, va="center_baseline")  # faster than that of the axes
    for i, k in np.argwhere(~np.isnan(values)):
        colour = DARK if brightness[i, k] > BRIGHT else LIGHT
        write(k, i, written(values[i, k]), ha="center", color=colour, size=number_size)
    if outlined is not None:
        _outline(axes, outlined, outlines)
    for i, name in enumerate(rows):
        write(-0.5 - GAP / cell, i, name, ha="right", size=NAME_SIZE)
    for k, name in enumerate(columns):
        write(k, -1, name, ha="center", size=min(NAME_SIZE, cell / 2.3))
    return figure


def _outline(axes: Any, outlined: NDArray[np.bool_], outlines: Sequence[tuple[str, float]]) -> None:
    """Lines just inside the edges of these cells [R, C], so that those of neighbours do not meet."""
    from matplotlib.patches import Rectangle

    for i, k in np.argwhere(outlined):
        for colour, width in outlines:
            place, size = (k - 0.46, i - 0.42), (0.92, 0.84)
            axes.add_patch(Rectangle(place, *size, fill=False, edgecolor=colour, linewidth=width, joinstyle="miter"))
