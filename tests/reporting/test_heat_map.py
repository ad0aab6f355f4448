"""A heat map has the colour and the number of every value, and a blank cell where there is none."""

import math

import numpy as np
import pytest

from streamprobe.reporting.heat_map import Scale, cell_width, draw, total_width

VALUES = np.array([[0.5, 0.75, 1.0], [0.625, math.nan, 2.0]])
ROWS = ["layer00", "b"]


def test_every_number_is_in_its_cell_and_every_name_beside_its_row_or_column() -> None:
    scale = Scale("viridis", 0.5, 1.0)
    figure = draw(VALUES, ROWS, ["-4", "+0", "+4"], width=300, scale=scale, written="{:.2f}".format, number_size=8)
    texts = {text.get_position(): text.get_text() for text in figure.texts}
    cells = {(k, i): f"{VALUES[i, k]:.2f}" for i in range(2) for k in range(3) if not math.isnan(VALUES[i, k])}
    assert cells.items() <= texts.items()
    assert {(k, -1): name for k, name in enumerate(["-4", "+0", "+4"])}.items() <= texts.items()
    assert [text.get_text() for text in figure.texts if text.get_ha() == "right"] == ROWS
    assert len(texts) == 5 + 3 + 2


@pytest.mark.parametrize("colours", ["viridis", "RdBu"])
def test_numbers_stand_out_from_their_cells(colours: str) -> None:
    values = np.linspace(0, 1, 101)[None]
    figure = draw(values, ["a"], [""] * 101, width=3000, scale=Scale(colours, 0, 1), written=str, number_size=8)
    [axes] = figure.axes
    [image] = axes.images
    grounds = image.to_rgba(values)[0, :, :3] @ (0.299, 0.587, 0.114)
    letters = np.array([float(int(text.get_color()[1:3], 16)) / 255 for text in figure.texts[:101]])
    assert np.abs(letters - grounds).min() > 0.4


def test_the_width_of_a_map_is_that_of_its_cells_and_names() -> None:
    assert cell_width(total_width(42, ROWS, 3), ROWS, 3) == pytest.approx(42)
    assert total_width(42, ["a longer name"], 3) > total_width(42, ["short"], 3) > 3 * 42


def test_cells_are_outlined_where_asked() -> None:
    given = {"width": 300, "scale": Scale("viridis", 0.5, 1.0), "written": str, "number_size": 8}
    figure = draw(VALUES, ROWS, ["a", "b", "c"], **given, outlined=VALUES == 0.75)
    [axes] = figure.axes
    assert [patch.get_center().tolist() for patch in axes.patches] == [[1, 0]] * 2, "two lines around one cell"
    assert not draw(VALUES, ROWS, ["a", "b", "c"], **given).axes[0].patches
