"""The solvers by name: what is said of each, and what a run must know before it makes one.

`run/jobs.py` makes their jobs.  Nothing here needs torch, so that help answers at once.
"""

from typing import NamedTuple


class SolverRow(NamedTuple):
    """What is known of a solver without its code."""

    about: str
    final: str  # what a probe is called that no further pass would change
    has_matrices: bool = False  # whether it holds one for every probe, which the memory plan must find room for


SOLVERS = {
    "newton": SolverRow("exact, a few passes", "converged", has_matrices=True),
    "adam": SolverRow("the original recipe", "stopped"),
}


def with_matrices(names: list[str]) -> list[str]:
    """Those of the solvers that hold matrices."""
    return [name for name in names if SOLVERS[name].has_matrices]
