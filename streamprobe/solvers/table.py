"""The solvers by name, and what each is, for the config's checks and help; `run/jobs.py` makes their jobs."""

from typing import NamedTuple


class SolverRow(NamedTuple):
    """What is said of a solver."""

    about: str


SOLVERS = {
    "newton": SolverRow("exact, a few passes"),
    "adam": SolverRow("the original recipe"),
}
