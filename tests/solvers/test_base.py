"""What every solver refuses to load."""

from functools import partial
from typing import Any

import pytest
import torch

from streamprobe.errors import InputError
from streamprobe.lags import make_columns
from streamprobe.solvers.adam import AdamSolver
from streamprobe.solvers.base import Solver
from streamprobe.solvers.newton import NewtonSolver

COLUMNS = make_columns(["backtracking"], ["token"], [-4, 0, 8])
SOLVERS: dict[str, Any] = {
    "weight": AdamSolver,
    "gradient_norm": partial(NewtonSolver, n_tokens=100),
}  # and the tensor that is changed


@pytest.mark.parametrize("change", [lambda t: t[:1], lambda t: t.half(), lambda t: t.flatten(), lambda t: t[..., None]])
@pytest.mark.parametrize("name", SOLVERS)
def test_load_refuses_a_tensor_of_another_kind_and_changes_nothing(name: str, change: Any) -> None:
    """`copy_` would broadcast or cast it, and the run would end with other probes."""
    solver: Solver = SOLVERS[name]([8, 10], COLUMNS, 12, torch.ones(3))
    before, state = solver.state(), solver.state()
    state = {key: torch.ones_like(tensor) for key, tensor in state.items()} | {name: change(state[name])}
    with pytest.raises(InputError, match=f"as {name}; expected"):
        solver.load(state)
    assert all(torch.equal(tensor, before[key]) for key, tensor in solver.state().items())


def test_a_tensor_of_another_kind_fails_without_that() -> None:
    """Torch copies a smaller tensor over a larger one without a word."""
    large, small = torch.zeros(3, 4), torch.ones(1, 4, dtype=torch.float64)
    large.copy_(small)
    assert (large == 1).all()
