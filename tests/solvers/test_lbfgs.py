"""L-BFGS on quadratic problems whose Newton step is known."""

import torch
from torch import Tensor

from streamprobe.solvers.lbfgs import PAIRS, newton_step, remember

L, K, E = 2, 3, 4


def problems() -> tuple[Tensor, Tensor, Tensor]:
    """Matrices H [L, K, E, E], points and their gradients [L, K, E] of quadratics with their minimum at 0."""
    random = torch.Generator().manual_seed(0)
    root = torch.randn(L, K, E, E, dtype=torch.float64, generator=random)
    matrix, point = root @ root.mT + torch.eye(E), torch.randn(L, K, E, dtype=torch.float64, generator=random)
    return matrix, point, (matrix @ point[..., None])[..., 0]


def with_pairs(matrix: Tensor, n: int) -> Tensor:
    """Pairs after steps along n axes."""
    pairs = torch.zeros(2, PAIRS, L, K, E, dtype=torch.float64)
    for axis in range(n):
        step = torch.zeros(L, K, E, dtype=torch.float64)
        step[..., axis] = 1
        for earlier in pairs[0]:  # conjugate to those before, so that none undoes another
            bend = (earlier[..., None, :] @ matrix @ earlier[..., None])[..., 0]
            along = (step[..., None, :] @ matrix @ earlier[..., None])[..., 0]
            step = step - earlier * torch.where(bend > 0, along / bend, 0.0)
        pairs = remember(pairs, step, (matrix @ step[..., None])[..., 0], where=torch.ones(L, K, dtype=torch.bool))
    return pairs


def test_without_pairs_it_is_the_step_of_the_matrix() -> None:
    _, _, gradient = problems()
    assert torch.equal(newton_step(torch.zeros(2, PAIRS, L, K, E), gradient, lambda g: g / 2), gradient / 2)


def test_pairs_along_all_axes_give_newtons_step() -> None:
    matrix, point, gradient = problems()
    found = newton_step(with_pairs(matrix, E), gradient, lambda g: g)
    torch.testing.assert_close(found, point)


def test_newtons_step_fails_without_a_pair() -> None:
    matrix, point, gradient = problems()
    assert (newton_step(with_pairs(matrix, E - 1), gradient, lambda g: g) - point).abs().max() > 1e-2


def test_a_pair_is_remembered_where_it_is_asked_for_and_bends_upwards() -> None:
    before = torch.zeros(2, PAIRS, L, K, E)
    step, change = torch.ones(L, K, E), torch.ones(L, K, E)
    change[0, 1] = -1
    asked = torch.ones(L, K, dtype=torch.bool)
    asked[1, 2] = False
    after = remember(before, step, change, where=asked)
    taken = after[0, 0].any(-1)
    assert taken.tolist() == [[True, False, True], [True, True, False]] and not after[:, 1:].any()


def test_the_oldest_pair_is_forgotten() -> None:
    pairs = torch.zeros(2, PAIRS, L, K, E)
    for number in range(1, PAIRS + 2):
        given = torch.full((L, K, E), float(number))
        pairs = remember(pairs, given, given, where=torch.ones(L, K, dtype=torch.bool))
    assert pairs[0, :, 0, 0, 0].tolist() == [6, 5, 4, 3, 2]
