"""The charts show the numbers of their rows, in the colours of the page."""

import math
import re

from streamprobe.evaluation.rows import Row
from streamprobe.reporting.grids import grids
from streamprobe.reporting.html.charts import PAGE, NamedGrid, lag_curves, lift_curve, metric_map, runs_curves


def numbers(svg: str) -> list[str]:
    return re.findall(r">([+-]?\d+\.\d{2,4})</text>", svg)


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


def outlines(svg: str) -> int:
    """How many cells of a heat map have lines around them, of two colours each."""
    lines = re.findall(r'style="fill: none; stroke: (?:var\(--page\)|currentColor); stroke-width: (?:3.6|1.6)', svg)
    return len(lines) // 2


def test_cells_that_are_certain_are_outlined_in_every_map(gained_rows: list[Row]) -> None:
    [grid] = grids(gained_rows).values()
    for metric in ("gain_bits", "gain", "gain_within", "auroc", "lift", "average_precision"):
        assert outlines(metric_map(grid, metric)) == 1, metric


def test_no_cell_is_outlined_fails_without_certainty(rows: list[Row], gained_rows: list[Row]) -> None:
    """Negative control: no gains, one of both low ends below zero, and the numbers of a probe in a control's row."""
    ends = ("gain_bits_low_corrected", "gain_within_low_corrected")
    below = [[{**row, end: -0.001} for row in gained_rows] for end in ends]
    of_control = [{**row, **dict.fromkeys(ends, 0.5)} if row["control"] else row for row in rows]
    for uncertain in (rows, *below, of_control):
        [grid] = grids(uncertain).values()
        assert outlines(metric_map(grid, "auroc")) == 0


def test_maps_of_gains_have_the_lags_at_which_they_are_known(gained_rows: list[Row]) -> None:
    [grid] = grids(gained_rows).values()
    svg = metric_map(grid, "gain_bits")
    assert numbers(svg) == ["+31.00", "+31.00"] and ">+8<" in svg and ">+0<" not in svg and "embed" not in svg


def test_the_gain_stands_in_the_place_of_the_lift_where_it_is_known(rows: list[Row], gained_rows: list[Row]) -> None:
    with_gain, without = (next(iter(grids(each).values())) for each in (gained_rows, rows))
    assert "mbit a token" in lag_curves(with_gain) and "lift" not in lag_curves(with_gain)
    assert "lift" in lag_curves(without) and "mbit a token" not in lag_curves(without)
    assert "lift" in lift_curve(with_gain)


def test_curves_of_several_runs_name_each(rows: list[Row], gained_rows: list[Row]) -> None:
    runs = [NamedGrid(name, next(iter(grids(each).values()))) for name, each in (("_a<b", rows), ("c", gained_rows))]
    svg = runs_curves(runs)
    assert "_a&lt;b<" in svg and ">\u200bc<" in svg and "mbit a token" in svg
    assert "mbit a token" not in runs_curves(runs[:1])
