"""Heat maps as the Images tab of TensorBoard shows them: in its width, so that every number can be read."""

import io
import re
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from streamprobe.reporting import heat_map
from streamprobe.reporting.heat_map import Scale

WIDTH = 350  # pixels of an image in that tab, which drops or doubles columns of pixels where an image has more or less
STYLE: Any = {"text.hinting": "none", "text.parse_math": False}  # letters that are quickly drawn
LARGEST, SMALLEST = 10, 7  # pixels of the font of a number
COLOURS = 256  # of an image, with which it takes a third of the room of all colours
EMS = {3: 2.6, 2: 1.95}  # width of a number with its sign by its digits, in sizes of its font


class Picture(NamedTuple):
    """A PNG image and its size in pixels."""

    png: bytes
    width: int
    height: int


def draw(values: NDArray[np.float64], rows: Sequence[str], columns: Sequence[str], scale: Scale) -> Picture:
    """A heat map of the values [R, C]; a NaN is a blank cell.

    Where columns are many their numbers have two digits rather than three, or none can be written at all.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    cell = heat_map.cell_width(WIDTH, rows, len(columns))
    digits = 3 if cell >= EMS[3] * LARGEST else 2
    size = min(LARGEST, cell / EMS[digits])
    written = partial(short, digits=digits) if size >= SMALLEST else _blank
    with matplotlib.rc_context(STYLE):
        figure = heat_map.draw(values, rows, columns, width=WIDTH, scale=scale, written=written, number_size=size)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
    pixels = Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3])
    png = io.BytesIO()
    pixels.quantize(COLOURS, dither=Image.Dither.NONE).save(png, "PNG")
    return Picture(png.getvalue(), pixels.width, pixels.height)


def short(number: float, digits: int) -> str:
    """A number from -1 to 1 in few letters: .895, -.058, 1.00."""
    text = re.sub(r"^(-?)0\.", r"\1.", f"{number:z.{digits}f}")
    return text[: digits + 1 + text.startswith("-")]


def _blank(number: float) -> str:
    return ""
