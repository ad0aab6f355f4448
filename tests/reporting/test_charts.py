"""The charts show the numbers of their rows, in the colours of the page."""

import math
import re

from streamprobe.evaluation.rows import Row
from streamprobe.reporting.html.charts import PAGE, lag_curves, metric_map
from streamprobe.reporting.terminal import grids


def numbers(svg: str) -> list[str]:
    return re.findall(r">([+-]?\d\.\d{3})</text>", svg)


def test_a_heat_map_shows_the_numbers_of_its_rows(rows: list[Row]) -> None:
    [grid] = grids(rows).values()
    real = [row for row in rows if not row["control"]]
    assert sorted(numbers(metric_map(grid, "lift"))) == sorted(f"{row['lift']:+.3f}" for row in real)
    shown = numbers(metric_map(grid, "auroc"))
    permuted = [max(r["auroc"] for r in rows if r["control"] == "permuted" and r["lag"] == lag) for lag in (0, 8)]
    expected = [row["auroc"] for row in rows if row["control"] != "permuted"] + permuted
    assert sorted(shown) == sorted(f"{value:.3f}" for value in expected) and len(shown) == 4 + 2 + 1 + 2
    blank = [{**row, "auroc": math.nan} if row["layer"] == 3 else row for row in rows]
    assert len(numbers(metric_map(grids(blank).popitem()[1], "auroc"))) == len(shown) - 2


def test_charts_take_their_colours_from_the_page_and_are_the_same_each_time(rows: list[Row]) -> None:
    [grid] = grids(rows).values()
    for draw in (lambda: lag_curves(grid), lambda: metric_map(grid, "auroc")):
        svg = draw()
        assert svg.startswith("<svg") and not [colour for colour in PAGE if colour in svg]
        assert "currentColor" in svg and len(svg) < 30_000 and svg == draw()
    assert "var(--series0)" in lag_curves(grid) and "persistence" in lag_curves(grid)
    without = [{**row, "lift": math.nan} for row in rows if not row["control"]]
    assert "lift" not in lag_curves(grids(without).popitem()[1])
