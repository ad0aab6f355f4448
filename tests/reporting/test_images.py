"""The images are as wide as TensorBoard shows them, their colours those of the values, their numbers short."""

import io
import math

import matplotlib
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from streamprobe.reporting.heat_map import CELL_HEIGHT, Scale, cell_width
from streamprobe.reporting.tracking.images import WIDTH, Picture, draw, short

SEQUENTIAL, DIVERGING = Scale("viridis", 0.5, 1.0), Scale("RdBu", -0.2, 0.2)
VALUES, ROWS = np.array([[0.5, 0.75, 1.0], [0.625, math.nan, 2.0]]), ["layer00", "b"]
BACKGROUND = [255, 255, 255]


def corners(picture: Picture, rows: list[str], n_columns: int) -> np.ndarray:
    """The colours [R, C, 3] of the upper left corners of the cells, which are free of text."""
    pixels = np.asarray(Image.open(io.BytesIO(picture.png)).convert("RGB")).astype(float)
    cell = cell_width(WIDTH, rows, n_columns)
    left = WIDTH - cell * n_columns
    y = [CELL_HEIGHT * (i + 1) + 2 for i in range(len(rows))]
    x = [round(left + cell * k) + 2 for k in range(n_columns)]
    return pixels[np.ix_(y, x)]


def test_a_cell_has_the_colour_of_its_value() -> None:
    found = corners(draw(VALUES, ROWS, ["-4", "+0", "+4"], SEQUENTIAL), ROWS, 3)
    for i, k in np.ndindex(VALUES.shape):
        if math.isnan(VALUES[i, k]):
            assert found[i, k].tolist() == BACKGROUND
            continue
        at = min(1.0, (VALUES[i, k] - 0.5) / 0.5)
        expected = np.array(matplotlib.colormaps["viridis"](at)[:3]) * 255
        assert np.abs(found[i, k] - expected).max() < 12


def test_a_cell_fails_to_have_the_colour_of_its_value_without_the_right_end() -> None:
    found = corners(draw(VALUES, ROWS, ["-4", "+0", "+4"], SEQUENTIAL), ROWS, 3)
    assert np.abs(found[0, 0] - np.array([253.0, 231, 37])).max() > 100


@pytest.mark.parametrize("n_columns", range(1, 60))
def test_every_map_is_as_wide_as_it_is_shown(n_columns: int) -> None:
    picture = draw(np.full((2, n_columns), np.nan), ["layer00", "persistence"], ["+8"] * n_columns, SEQUENTIAL)
    assert Image.open(io.BytesIO(picture.png)).size == (picture.width, picture.height)
    assert picture.width == WIDTH


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are drawn from here on."""
    found: list[Figure] = []

    def canvas(figure: Figure) -> FigureCanvasAgg:
        found.append(figure)
        return FigureCanvasAgg(figure)

    monkeypatch.setattr("matplotlib.backends.backend_agg.FigureCanvasAgg", canvas)
    return found


@pytest.mark.parametrize(("n_columns", "digits"), [(10, 3), (14, 2), (40, 0)])
def test_numbers_have_as_many_digits_as_there_is_room_for(n_columns: int, digits: int, figures: list[Figure]) -> None:
    draw(np.full((1, n_columns), -0.0583), ["persistence"], ["+8"] * n_columns, DIVERGING)
    [figure] = figures
    expected = f"{-0.0583:.{digits}f}".replace("0.", ".") if digits else ""
    assert [text.get_text() for text in figure.texts[:n_columns]] == [expected] * n_columns


@pytest.mark.parametrize("n_columns", [1, 5, 10, 14, 17])
def test_the_longest_number_fits_its_cell(n_columns: int, figures: list[Figure]) -> None:
    for value in (1.0, -1.0, -0.888):
        draw(np.full((1, n_columns), value), ["persistence"], ["+48"] * n_columns, DIVERGING)
    cell = cell_width(WIDTH, ["persistence"], n_columns)
    assert len(figures) == 3
    for figure in figures:
        wide = [text.get_window_extent().width for text in figure.texts if text.get_text()[-1].isdigit()]
        assert len(wide) == 2 * n_columns and max(wide) < cell
        [name] = [text for text in figure.texts if text.get_text() == "persistence"]
        assert 0 <= name.get_window_extent().x0 and name.get_window_extent().x1 <= WIDTH - cell * n_columns


def test_numbers_are_written_in_few_letters() -> None:
    written = {0.8949: ".895", -0.0583: "-.058", 1.0: "1.00", -1.0: "-1.00", 0.0: ".000", -0.0004: ".000"}
    assert {value: short(value, 3) for value in written} == written
    assert [short(value, 2) for value in (0.8949, -0.0583, 1.0, -1.0)] == [".89", "-.06", "1.0", "-1.0"]
