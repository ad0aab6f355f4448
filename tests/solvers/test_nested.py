"""Nested probes: against scikit-learn's on [control, layer], and what validation chooses."""

import math
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torch.nn.functional import softplus

from streamprobe.lags import Column
from streamprobe.probes.nested import Blocks, NestedProbes
from streamprobe.probes.sites import control_sites, layer_sites
from streamprobe.solvers import block_matrices, nested, nested_sums
from streamprobe.solvers.block_matrices import PENALTIES, Start
from streamprobe.solvers.nested import PATIENCE, NestedSolver
from streamprobe.solvers.newton import NewtonSolver
from streamprobe.solvers.newton_matrices import HAND_MADE_L2

N, P, HAND_MADE, L, D, L2 = 4000, 9, 4, 2, 6, 0.01
COLUMNS = [Column("event", target, 4) for target in ("token", "onset")] + [Column("event", "token", 8)]


class Problem(NamedTuple):
    """Tokens of which layer 1 knows something that the control does not, of column 0 alone."""

    blocks: Blocks
    targets: Tensor
    valid: Tensor
    held_out: Blocks
    held_out_targets: Tensor
    positive_weight: Tensor


@pytest.fixture(scope="module")
def problem() -> Problem:
    random = torch.Generator().manual_seed(3)

    def draw() -> tuple[Blocks, Tensor]:
        control = torch.randn(N, P, generator=random) * torch.linspace(0.2, 3, P) + 1
        layers = torch.randn(N, L, D, generator=random) + control[:, None, :D] / 2
        known = control[:, :3].sum(1) - 3
        hidden = layers[:, 1, 0] - control[:, 0] / 2
        logits = torch.stack([known + hidden, 2 * known - 5, known - 1], 1)
        return Blocks(control, layers.bfloat16()), torch.rand(N, 3, generator=random) < logits.sigmoid()

    blocks, targets = draw()
    held_out, held_out_targets = draw()
    valid = torch.rand(N, 3, generator=random) < 0.9
    targets &= valid
    positive = targets.sum(0)
    return Problem(blocks, targets, valid, held_out, held_out_targets, (valid.sum(0) - positive) / positive)


def in_chunks(solver: Any, acts: Any, problem: Problem) -> None:
    for start in range(0, N, 1500):
        rows = slice(start, start + 1500)
        given = Blocks(*(each[rows] for each in acts)) if isinstance(acts, Blocks) else acts[rows]
        solver.step(given, problem.targets[rows], problem.valid[rows])
    solver.end_pass()


def make(problem: Problem, loss: Any = None, **options: Any) -> NestedSolver:
    """With the control and the scaling of layers that are final."""
    known: dict[str, Any] = {"n_tokens": N, "l2": L2, "tolerance": 1e-7}
    about = (COLUMNS, P, problem.positive_weight)
    control = NewtonSolver(control_sites(["joint+chain"]), *about, n_hand_made=HAND_MADE, **known)
    layers = NewtonSolver(layer_sites([5, 7]), COLUMNS, D, problem.positive_weight, **known)
    while not control.converged.all():
        in_chunks(control, problem.blocks.control[:, None], problem)
    in_chunks(layers, problem.blocks.layers, problem)
    start = Start.of(control, layers)
    options = {"tolerance": 1e-6, "seed": 0} | options
    return NestedSolver(
        start, layers.sites, COLUMNS, loss or (lambda probes: held_out_loss(probes, problem)), **options
    )


def held_out_loss(probes: NestedProbes, problem: Problem) -> Tensor:
    """Class-weighted as in training."""
    z = probes.scores(problem.held_out).double()  # [N, S, K]
    y = problem.held_out_targets[:, None].double()
    p = problem.positive_weight.double()
    return (p * y * softplus(-z) + (1 - y) * softplus(z)).mean(0)


def trained(solver: NestedSolver, problem: Problem, passes: int = 100) -> NestedSolver:
    for _ in range(passes):
        if solver.final:
            break
        in_chunks(solver, problem.blocks, problem)
    return solver


def falling(probes: NestedProbes) -> Tensor:
    """A validation that prefers the smallest penalty."""
    return -probes.weight.square().sum(-1)


def by_sklearn(problem: Problem, layer: int, k: int, penalty: float) -> np.ndarray:
    """Logits [N] of the same problem, its penalties as factors of features."""
    v = problem.valid[:, k].numpy()
    control, layers = problem.blocks.control.double().numpy(), problem.blocks.layers[:, layer].double().numpy()
    factor = np.append(1 / control.std(0)[:-HAND_MADE], np.full(HAND_MADE, math.sqrt(L2 / HAND_MADE_L2)))
    x = np.hstack(
        [(control - control.mean(0)) * factor, (layers - layers.mean(0)) / layers.std(0) * (L2 / penalty) ** 0.5]
    )
    y = problem.targets[v, k].numpy()
    c = int((~y).sum()) / (len(y) ** 2 * L2)
    fit = LogisticRegression(C=c, class_weight="balanced", tol=1e-12, max_iter=50_000).fit(x[v], y)
    return fit.decision_function(x)


@pytest.mark.parametrize("n_penalties", [1, 4])
def test_the_optimum_is_scikit_learns(problem, n_penalties, monkeypatch) -> None:
    for module in (nested, block_matrices):
        monkeypatch.setattr(module, "PENALTIES", PENALTIES[:n_penalties])
    solver = trained(make(problem, falling, tolerance=1e-7), problem)
    assert solver.final and (solver.penalty[1:] == PENALTIES[n_penalties - 1]).all()
    logits = solver.bank().scores(problem.blocks).double().numpy()
    for layer in range(L):
        for k in range(3):
            expected = by_sklearn(problem, layer, k, PENALTIES[n_penalties - 1])
            assert np.abs(logits[:, layer + 1, k] - expected).max() < 1e-5 * np.abs(expected).max()
            other = by_sklearn(problem, layer, k, PENALTIES[n_penalties - 1] / 2)
            assert np.abs(logits[:, layer + 1, k] - other).max() > 1e-4 * np.abs(other).max()


def objective(probes: NestedProbes, solver: NestedSolver, problem: Problem, level: Tensor) -> Tensor:
    """J [L, K] of the layers' probes at the penalties of a level, plainly."""
    z = probes.scores(problem.blocks).double()[:, 1:]
    y, v, p = problem.targets[:, None].double(), problem.valid[:, None].double(), problem.positive_weight.double()
    loss = ((p * y * softplus(-z) + (1 - y) * softplus(z)) * v).sum(0) / v.sum(0)
    u, w = probes.control_weight[1:].double(), probes.weight[1:].double()
    scale = solver.start.scale
    of_control = (u * scale[..., :P]).square() @ solver.start.penalty[:P] / 2
    return loss + of_control + (w * scale[..., P + 1 :]).square().sum(-1) * torch.tensor(PENALTIES)[level]


def test_validation_chooses_the_layer_that_knows_something_and_the_control_elsewhere(problem) -> None:
    solver = trained(make(problem), problem)
    assert solver.final and solver.penalty[2, 0] <= 1 and solver.penalty[0].isinf().all()
    assert solver.penalty[1:].isinf().any()
    losses = held_out_loss(solver.bank(), problem)
    assert (losses[1:] <= losses[0]).all() and losses[2, 0] < losses[0, 0] - 0.01
    scores, none = solver.bank().scores(problem.held_out), solver.penalty.isinf()
    assert torch.equal(scores[:, none], scores[:, :1].expand_as(scores)[:, none])
    assert (scores[:, 2, 0] != scores[:, 0, 0]).any()
    assert (solver.norm <= solver.tolerance).all()


def test_no_smaller_penalty_is_tried_where_two_in_a_row_are_no_better(problem) -> None:
    asked: list[Tensor] = []

    def loss(probes: NestedProbes) -> Tensor:
        asked.append(probes.weight.square().sum(-1))
        return asked[-1]  # the control is the best

    solver = trained(make(problem, loss), problem)
    assert solver.final and solver.penalty.isinf().all() and (solver.level == PATIENCE - 1).all()
    assert len(asked) <= 12 and torch.equal(solver.bank().weight, torch.zeros_like(solver.bank().weight))


def test_a_penalty_that_is_worse_by_a_hairs_breadth_hides_no_smaller_one(problem) -> None:
    control = make(problem).bank()

    def loss(probes: NestedProbes) -> Tensor:
        """The largest penalty is no better than the control, and every smaller one is."""
        norm = probes.weight.square().sum(-1)
        return torch.where(norm < 1.2 * at_largest, norm * 1e-6, -norm)

    at_largest = torch.zeros(L + 1, 3)
    assert torch.equal(loss(control), torch.zeros_like(at_largest))
    first = make(problem, falling)
    while (first.level == 0).any():
        at_largest[1:] = first.bank().weight.square().sum(-1)[1:]
        in_chunks(first, problem.blocks, problem)
    at_largest[1:] = first.bank().weight.square().sum(-1)[1:]
    solver = trained(make(problem, loss), problem)
    assert solver.final and (solver.penalty[1:] == PENALTIES[-1]).all()


def test_the_objective_is_never_above_the_controls(problem) -> None:
    solver = make(problem, falling)
    before = objective(solver.bank(), solver, problem, solver.level)
    first = before.clone()
    for _ in range(40):
        in_chunks(solver, problem.blocks, problem)
        now = objective(solver._bank(solver.best), solver, problem, solver.level)
        assert (now <= before + 1e-6).all() and (now <= first + 1e-6).all()
        torch.testing.assert_close(now, solver.best_loss, rtol=1e-5, atol=0)
        before = now
    assert solver.final and (now < first - 1e-4).any()


def test_it_begins_with_the_curvature_at_the_control_whenever_its_columns_converged(problem) -> None:
    """Which is what a matrix that columns share is made in proportion to."""
    solver = make(problem)
    chance = solver.bank().probabilities(problem.blocks)[:, 0].double()  # [N, K]
    weight = torch.where(problem.targets, problem.positive_weight.double(), 1) * problem.valid
    torch.testing.assert_close(solver.start.expected, (weight * chance * (1 - chance)).sum(0), rtol=1e-4, atol=0)


def test_a_factor_is_kept_only_as_long_as_a_probe_may_ask_for_it(problem) -> None:
    solver = make(problem, falling)
    while not solver.final:
        in_chunks(solver, problem.blocks, problem)
        assert len(solver.matrices.factors) <= L * len(COLUMNS)
    assert (solver.penalty[1:] == PENALTIES[-1]).all()


def test_before_the_first_pass_and_after_it_there_is_the_control_alone(problem) -> None:
    solver = make(problem)
    for _ in range(2):
        scores = solver.bank().scores(problem.blocks)
        assert torch.equal(scores, scores[:, :1].expand_as(scores)) and not solver.final
        in_chunks(solver, problem.blocks, problem)


def test_columns_that_share_matrices_end_in_the_same_probes(problem) -> None:
    groups = [[0, 2], [1]]
    alone, shared = make(problem, falling), make(problem, falling)
    shared = NestedSolver(
        shared.start._replace(groups=groups), shared.sites[1:], COLUMNS, falling, tolerance=1e-6, seed=0
    )
    ours, theirs = (trained(solver, problem).bank().scores(problem.blocks) for solver in (shared, alone))
    assert shared.final and len(shared.matrices.of_control) == len(groups)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_drawn_tokens_lead_to_the_same_probes(problem, monkeypatch) -> None:
    exact = trained(make(problem, falling), problem).bank().scores(problem.blocks)
    monkeypatch.setattr(nested_sums, "DRAWN", 20)  # 300 of 4,000 tokens
    solver = trained(make(problem, falling), problem)
    assert solver.final
    torch.testing.assert_close(solver.bank().scores(problem.blocks), exact, rtol=1e-4, atol=1e-4)


def test_its_end_can_be_taken_up(problem) -> None:
    solver = trained(make(problem), problem)
    again = make(problem)
    again.load(solver.state())
    assert again.final and torch.equal(again.penalty, solver.penalty) and torch.equal(again.norm, solver.norm)
    for name, tensor in solver.bank().tensors().items():
        assert torch.equal(again.bank().tensors()[name], tensor)
    with pytest.raises(ValueError, match="a checkpoint with nothing as chosen"):
        again.load({})
