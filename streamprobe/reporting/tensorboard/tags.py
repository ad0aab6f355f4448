"""The names of curves in TensorBoard, made so that they sort and can be chosen by a regular expression.

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
    return (
        where + (f" control {column.control}" if column.control else "") + (f" seed{s}" if (s := column.seed) else "")
    )


def family(grid: ProbeGrid, column: Column) -> str:
    """Solver, label and target, which name what is compared in one chart: newton/backtracking/token."""
    return f"{grid.name}/{column.label}/{column.target}"


def tag(grid: ProbeGrid, site: Site, column: Column) -> str:
    """The end of a curve's tag, after the metric: newton/backtracking/token/layer12/lag+08."""
    return f"{family(grid, column)}/{place(site, column)}/lag{column.lag:+03d}"
