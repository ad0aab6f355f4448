"""Heat maps as small PNG images, drawn without a plotting library: TensorBoard gets some after every pass.

Shapes: R rows, C columns of cells.
"""

import io
import struct
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

LEVELS = 64  # colours of a scale
DARK, LIGHT, PAPER, BLANK = range(LEVELS, LEVELS + 4)  # what else is in the palette
CELL = (18, 35)  # height and width of a cell in pixels; its text takes 11 x 30 of them
SCALES = {  # both tell their ends apart for every kind of colour vision: viridis, and the red to blue of ColorBrewer
    "sequential": ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)),
    "diverging": ((178, 24, 43), (244, 165, 130), (247, 247, 247), (146, 197, 222), (33, 102, 172)),
}


def draw(
    values: NDArray[np.float64], rows: Sequence[str], columns: Sequence[str], low: float, high: float, scale: str
) -> bytes:
    """A PNG of values [R, C] with their names, each number in its cell; `low` and `high` are the ends of the scale.

    A NaN is a blank cell; what lies outside of the scale has the colour of its end.
    """
    known = ~np.isnan(values)
    place = np.clip((np.nan_to_num(values) - low) / (high - low), 0, 1)
    level = np.where(known, np.rint(place * (LEVELS - 1)), BLANK).astype(np.uint8)
    height, width = CELL
    cells = np.broadcast_to(level[:, None, :, None], (len(rows), height, len(columns), width)).copy()
    cells[:, -1], cells[..., -1] = PAPER, PAPER  # the gaps
    letters = _letters()
    signed = "+" if scale == "diverging" else ""
    texts = [[f"{v:{signed}.3f}".replace("0.", ".", 1) if v == v else "" for v in row] for row in values.tolist()]
    codes = np.array([[list(text[:5].center(5).encode()) for text in row] for row in texts], dtype=np.uint8)
    mask = letters[codes].transpose(0, 3, 1, 2, 4).reshape(len(rows), 11, len(columns), 30)
    ink = _colours(scale)[1][np.where(known, level, 0)]
    inner = cells[:, 3:14, :, 2:32]
    inner[mask] = np.broadcast_to(ink[:, None, :, None], mask.shape)[mask]
    side, top = _names(tuple(rows), tuple(columns))
    body = np.hstack([side, cells.reshape(len(rows) * height, -1)])
    image = Image.fromarray(np.vstack([top, body]), mode="P")
    image.putpalette(_colours(scale)[0])
    png = io.BytesIO()
    image.save(png, "PNG", compress_level=3)
    return png.getvalue()


def size(png: bytes) -> tuple[int, int]:
    """Width and height in pixels of a PNG."""
    width, height = struct.unpack(">II", png[16:24])
    return width, height


@lru_cache
def _colours(scale: str) -> tuple[bytes, NDArray[np.uint8]]:
    """The palette, and the ink [LEVELS] that can be read on each of its colours."""
    anchors = np.array(SCALES[scale], dtype=float)
    at = np.linspace(0, len(anchors) - 1, LEVELS)
    colours = np.stack([np.interp(at, range(len(anchors)), channel) for channel in anchors.T], axis=1)
    bright = colours @ (0.299, 0.587, 0.114) > 140
    rest = [(17, 17, 17), (255, 255, 255), (255, 255, 255), (225, 225, 225)]
    palette = np.vstack([colours, rest]).round().astype(np.uint8).tobytes()
    return palette, np.where(bright, DARK, LIGHT).astype(np.uint8)


@lru_cache
def _letters() -> NDArray[np.bool_]:
    """The printable ASCII characters as masks [128, 11, 6]."""
    font = ImageFont.load_default_imagefont()
    masks = np.zeros((128, 11, 6), dtype=bool)
    for code in range(33, 127):
        image = Image.new("1", (6, 11))
        ImageDraw.Draw(image).text((0, 0), chr(code), fill=1, font=font)
        masks[code] = np.asarray(image)
    return masks


@lru_cache(maxsize=256)
def _names(rows: tuple[str, ...], columns: tuple[str, ...]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """The strips with the names of the rows [R * height, W] and of the columns [height, W + C * width]."""
    height, width = CELL
    font = ImageFont.load_default_imagefont()
    left = 6 * max(map(len, rows)) + 8
    side = Image.new("L", (left, len(rows) * height), PAPER)
    top = Image.new("L", (left + len(columns) * width, height), PAPER)
    pen = ImageDraw.Draw(side)
    for i, name in enumerate(rows):
        pen.text((left - 6 - 6 * len(name), i * height + 3), name, fill=DARK, font=font)
    pen = ImageDraw.Draw(top)
    for k, name in enumerate(columns):
        pen.text((left + k * width + (width - 6 * len(name)) // 2, 4), name, fill=DARK, font=font)
    return np.asarray(side), np.asarray(top)
