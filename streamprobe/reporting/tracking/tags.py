"""The names of curves, made so that they sort and can be chosen by a regular expression.

Shapes: L sites, K columns.
"""

from typing import Protocol

from streamprobe.lags import Column
from streamprobe.probes.sites import Site


class ProbeGrid(Protocol):
    """What has probes at every one of its sites and columns, as a solver does."""

    name: str
    sites: list[Site]
    columns: list[Column]


def place(site: Site, column: Column) -> str:
    """Where a probe is and what control it is, if any: layer12, control embed, layer12 control permuted seed1."""
    where = f"control {site}" if site.is_control else site.name
    control = f" control {column.control}" if column.control else ""
    return where + control + "".join(f" {name}{n}" for name in ("seed", "fold") if (n := getattr(column, name)))


def family(grid: ProbeGrid, column: Column) -> str:
    """Solver, label and target, which name what is compared in one chart: newton/backtracking/token."""
    return f"{grid.name}/{column.label}/{column.target}"


def tag(family: str, lag: int, place: str) -> str:
    """The end of a curve's tag, after the metric: newton/backtracking/token lag+08 layer12.

    TensorBoard shows what stands behind the last slash in full.
    """
    return f"{family} {lag_name(lag)} {place}"


def lag_name(lag: int) -> str:
    """A lag as it stands in a tag: lag+08."""
    return f"lag{lag:+03d}"
