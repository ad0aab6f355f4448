"""Rows of results.csv put in order for tables and charts: by place and lag, the best of each lag, what is certain.

The rows of one solver, label and target are a family, for which there is one verdict.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

from streamprobe.evaluation.rows import GAINS, Row, is_beyond_linear, place, site_cell
from streamprobe.evaluation.verdict import furthest, is_certain
from streamprobe.probes.linear import LINEAR
from streamprobe.probes.sites import RESID_POST

Family = tuple[str, str, str]  # solver, label, target
Grid = dict[str, dict[int, Row]]  # by place, then by lag


def grids(rows: Iterable[Row]) -> dict[Family, Grid]:
    """The rows of linear probes and controls of each solver, label and target, in the order of the verdicts.

    Layers before controls.
    """
    found: dict[Family, Grid] = {}
    linear = (row for row in rows if row["kind"] == LINEAR)
    for row in sorted(linear, key=lambda row: (row["solver"], row["label"], row["target"], bool(row["control"]))):
        grid = found.setdefault((row["solver"], row["label"], row["target"]), {})
        grid.setdefault(place(row), {})[row["lag"]] = row
    return found


def other_kinds(rows: Iterable[Row]) -> dict[Family, list[Row]]:
    """The rows of probes of other kinds than linear, of each solver, label and target that has some: as in `grids`."""
    found: dict[Family, list[Row]] = {}
    for row in sorted(rows, key=lambda row: (row["solver"], row["label"], row["target"])):
        if row["kind"] != LINEAR:
            found.setdefault((row["solver"], row["label"], row["target"]), []).append(row)
    return found


def beyond_linear(rows: Iterable[Row]) -> list[Row]:
    """Of each lag, rising, the row with the highest AUROC of those that are certainly above the linear probe there.

    That is: the low end of the difference of AUROC, corrected for all kinds, layers and lags looked at, is above what
    training leaves open.
    """
    best: dict[int, Row] = {}
    for row in rows:
        lag = row["lag"]
        if is_beyond_linear(row) and (lag not in best or row["auroc"] > best[lag]["auroc"]):
            best[lag] = row
    return [best[lag] for lag in sorted(best)]


def title(family: Family) -> str:
    """A family as a heading names it."""
    solver, label, target = family
    return f"{label}, target {target}, solver {solver}"


def rows_of(grid: Grid) -> list[Row]:
    """Every row of a grid."""
    return [row for line in grid.values() for row in line.values()]


def lags_of(grid: Grid) -> list[int]:
    """Every lag of a grid, rising."""
    return sorted({lag for line in grid.values() for lag in line})


def best_of(lines: Iterable[Mapping[int, Row]], metric: str = "auroc") -> dict[int, Row]:
    """The row in which the metric is highest at each lag, among the lines given; by lag, rising."""
    best: dict[int, Row] = {}
    for line in lines:
        for lag, row in line.items():
            if lag not in best or _or_lowest(row[metric]) > _or_lowest(best[lag][metric]):
                best[lag] = row
    return dict(sorted(best.items()))


def _or_lowest(value: float) -> float:
    return -math.inf if math.isnan(value) else value


def lines_of(grid: Grid) -> tuple[Grid, Grid]:
    """The lines of the layers, and one of each control: of one that is tried at every layer the highest values."""
    layers = {name: line for name, line in grid.items() if not _first(line)["control"]}
    by_control: dict[str, list[dict[int, Row]]] = {}
    for line in sorted(grid.values(), key=lambda line: _first(line)["layer"] != ""):
        if name := _first(line)["control"]:
            by_control.setdefault(name, []).append(line)
    return layers, {name: best_of(lines) for name, lines in by_control.items()}


def _first(line: Mapping[int, Row]) -> Row:
    return next(iter(line.values()))


def known(rows: Iterable[Row], metric: str) -> list[Row]:
    """The rows in which the metric is a number."""
    return [row for row in rows if not math.isnan(row[metric])]


def gained(lines: Grid) -> Grid:
    """The lines with what a layer adds to the joint control: the lags at which `gain_bits` is known, if any."""
    found = {name: {row["lag"]: row for row in known(line.values(), GAINS[0])} for name, line in lines.items()}
    return {name: line for name, line in found.items() if line}


def certain(rows: Iterable[Row]) -> list[Row]:
    """The rows of the probes whose foresight may be claimed."""
    return [row for row in rows if is_certain(row)]


def furthest_certain(rows: Iterable[Row]) -> Row | None:
    """The probe that a verdict names, if the foresight of any may be claimed."""
    found = certain(rows)
    return furthest(found) if found else None


def in_units(row: Row, name: str) -> float:
    """A number in the units in which it is shown: `gain_bits` in thousandths of a bit, since there is little to gain of
    what is rare; others as they are.
    """
    return row[name] * 1000 if name.startswith("gain_bits") else row[name]


def written(value: float, name: str, sign: str = "") -> str:
    """A number in its units (see `in_units`) as tables and maps show it; nothing where it is NaN.

    With 3 decimals, of a gain in AUROC 4, of one in bits 2; with a `sign` ("+") if that is asked for.
    """
    decimals = 2 if name.startswith("gain_bits") else 4 if name.startswith("gain") else 3
    value = round(value, decimals) + 0.0
    return "" if math.isnan(value) else f"{value:{sign}.{decimals}f}"


def number(row: Row, name: str, sign: str = "") -> str:
    """A number of a row as tables show it: see `written`."""
    return written(in_units(row, name), name, sign)


def interval(row: Row, name: str, sign: str = "") -> str:
    """The 95% interval of a metric as tables show it; nothing where it has none."""
    low, high = (number(row, f"{name}_{end}", sign) for end in ("low", "high"))
    return low and f"{low} to {high}"


def layers_by_lag(rows: Sequence[Row]) -> dict[int, list[str]]:
    """The layers of these rows at each lag, both rising, as a table names them; those of other sites behind."""
    found: dict[int, list[str]] = {}
    for row in sorted(rows, key=lambda row: (row["lag"], row["site"] != RESID_POST, row["site"], row["layer"])):
        found.setdefault(row["lag"], []).append(site_cell(row))
    return found
