"""The Newton solver against scikit-learn, autograd and plain sums, on activations of the embedded model."""

from contextlib import nullcontext
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from demo_tokens import Tokens, chunks, demo_problem, weights
from sklearn.linear_model import LogisticRegression
from torch.nn.functional import softplus

from streamprobe.errors import InputError
from streamprobe.probes.linear import ProbeBank
from streamprobe.solvers import matrix_sums, newton, newton_matrices, newton_sums
from streamprobe.solvers.curvature import curvature_bytes
from streamprobe.solvers.newton import NewtonSolver

L2 = 0.01
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def tokens() -> Tokens:
    return demo_problem().tokens


def make(tokens: Tokens, **options: Any) -> NewtonSolver:
    problem, options = demo_problem(), {"l2": L2, "tolerance": TOLERANCE} | options
    about = (problem.sites, problem.columns, tokens.acts.shape[2], weights(tokens))
    return NewtonSolver(*about, n_tokens=len(tokens.acts), **options)


def trained(solver: NewtonSolver, tokens: Tokens, passes: int = 60, size: int = 2000) -> NewtonSolver:
    for number in range(passes):
        if solver.converged.all():
            break
        for chunk in chunks(tokens, size, number):
            solver.step(*chunk)
        solver.end_pass()
    return solver


@pytest.fixture(autouse=True)
def draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices from some of the tokens, as where features are many: those of these tests are few."""
    every_token_up_to(0, monkeypatch)
    monkeypatch.setattr(newton_sums, "DRAWN", 16)


def every_token_up_to(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (newton, newton_matrices, newton_sums):
        monkeypatch.setattr(module, "EXACT", size)


@pytest.fixture(scope="module")
def solved(tokens: Tokens) -> NewtonSolver:
    return trained(make(tokens), tokens, 200)


def standardised(tokens: Tokens, i: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features [N, D] of a layer by the moments of all tokens, the mean and the standard deviation, float64."""
    x = tokens.acts[:, i].double().numpy()
    mean, std = x.mean(0), x.std(0)
    return (x - mean) / std, mean, std


def in_features(bank: ProbeBank, i: int, k: int, mean: np.ndarray, std: np.ndarray) -> np.ndarray:
    """A saved probe as weights of the standardised features, the bias behind them."""
    raw = bank.weight[i, k].double().numpy()
    return np.append(raw * std, float(bank.bias[i, k]) + raw @ mean)


def by_sklearn(tokens: Tokens, i: int, k: int, l2: float = L2, balanced: bool = True) -> np.ndarray:
    """The same problem, class_weight="balanced": weights n / (2 n_c) instead of ours, which C makes up for."""
    x = standardised(tokens, i)[0]
    v = tokens.valid[:, k].numpy()
    y = tokens.targets[v, k].numpy()
    n, negatives = len(y), int((~y).sum())
    fit = LogisticRegression(
        C=negatives / (n * n * l2), class_weight="balanced" if balanced else None, tol=1e-10, max_iter=20_000
    ).fit(x[v], y)
    return np.append(fit.coef_[0], fit.intercept_[0])


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@cache
def grid() -> list[tuple[int, int]]:
    return [(i, k) for i in range(2) for k in range(6)]


def test_converged_probes_are_scikit_learns(solved: NewtonSolver, tokens: Tokens) -> None:
    assert solved.converged.all()
    bank = solved.bank()
    off = {}
    for i, k in grid():
        _, mean, std = standardised(tokens, i)
        off[i, k] = distance(in_features(bank, i, k, mean, std), by_sklearn(tokens, i, k))
    assert max(off.values()) < 1e-3, off


@pytest.mark.parametrize("wrong", [{"l2": L2 / 2}, {"balanced": False}], ids=str)
def test_agreement_with_scikit_learn_fails_without_its_penalty_and_class_weight(solved, tokens, wrong) -> None:
    bank = solved.bank()
    for i, k in grid()[:6]:
        _, mean, std = standardised(tokens, i)
        assert distance(in_features(bank, i, k, mean, std), by_sklearn(tokens, i, k, **wrong)) > 1e-2


def first_step(tokens: Tokens, x: np.ndarray, k: int) -> np.ndarray:
    """The Newton step from zero, written out for features x [N, D] and one column in float64.

    Its matrix takes invalid tokens for negatives, and is scaled by the share of the others.
    """
    x = np.pad(x, ((0, 0), (0, 1)), constant_values=1.0)
    v, y = tokens.valid[:, k].numpy(), tokens.targets[:, k].numpy()
    p = (v & ~y).sum() / y.sum()
    counts = v.mean() * min(p, 1) + np.where(y, max(p - 1, 0), max(1 - p, 0)) * v
    hessian = (x.T * counts) @ x / 4 / v.sum() + 2 * L2 * np.diag(np.append(np.ones(x.shape[1] - 1), 0))
    return np.linalg.solve(hessian, x[v].T @ (np.where(y, p, 1.0) * (y - 0.5))[v] / v.sum())


@pytest.mark.parametrize("size", [500, 10_000])
def test_one_pass_is_the_newton_step_from_zero(tokens, size, monkeypatch) -> None:
    """Whatever the chunks, and nearly so where factors of products are rounded."""
    coarse = trained(make(tokens), tokens, 1, size).bank()
    monkeypatch.setattr(matrix_sums, "coarse_float32", nullcontext)
    bank = trained(make(tokens), tokens, 1, size).bank()
    for i, k in grid():
        x, mean, std = standardised(tokens, i)
        assert distance(in_features(bank, i, k, mean, std), first_step(tokens, x, k)) < 2e-4, (i, k)
        assert distance(in_features(coarse, i, k, mean, std), first_step(tokens, x, k)) < 5e-2, (i, k)


def test_the_newton_step_fails_without_what_the_rarer_class_counts_more(tokens, monkeypatch) -> None:
    monkeypatch.setattr(newton_sums, "draw", lambda curvature, rate, chance: torch.zeros_like(curvature))
    bank = trained(make(tokens), tokens, 1).bank()
    for i, k in grid():
        x, mean, std = standardised(tokens, i)
        assert distance(in_features(bank, i, k, mean, std), first_step(tokens, x, k)) > 0.1, (i, k)


def test_convergence_fails_without_further_passes(tokens) -> None:
    solver = trained(make(tokens), tokens, 1)
    _, mean, std = standardised(tokens, 0)
    assert not solver.converged.any() and solver.gradient_norm.isnan().all()  # no pass has seen it
    assert distance(in_features(solver.bank(), 0, 1, mean, std), by_sklearn(tokens, 0, 1)) > 0.1


def objective(tokens: Tokens, bank: ProbeBank, i: int, k: int) -> tuple[float, float]:
    """J and the norm of its gradient at a saved probe, by autograd in float64."""
    x, mean, std = standardised(tokens, i)
    v = tokens.valid[:, k]
    y = tokens.targets[v, k].double()
    point = torch.from_numpy(in_features(bank, i, k, mean, std)).requires_grad_()
    z = torch.from_numpy(x)[v] @ point[:-1] + point[-1]
    p = (1 - y).sum() / y.sum()
    loss = (p * y * softplus(-z) + (1 - y) * softplus(z)).mean() + L2 * point[:-1].square().sum()
    loss.backward()
    return loss.item(), point.grad.norm().item()


def test_the_reported_gradient_norm_is_that_of_the_reported_probe(solved, tokens) -> None:
    bank = solved.bank()
    for i, k in grid():
        loss, norm = objective(tokens, bank, i, k)
        assert norm <= 2 * TOLERANCE and abs(norm - float(solved.gradient_norm[i, k])) < TOLERANCE
        assert loss == pytest.approx(float(solved.best_loss[i, k]), rel=1e-6)
    assert objective(tokens, trained(make(tokens), tokens, 1).bank(), 0, 1)[1] > 0.01  # another probe, another norm


@pytest.mark.parametrize("shared", [False, True], ids=["own matrix", "shared matrix"])
def test_the_loss_falls_in_every_pass_and_converged_probes_stay(tokens, shared) -> None:
    solver = make(tokens, shared=shared, tolerance=1e-3)
    before, bank = torch.full_like(solver.best_loss, torch.inf), solver.bank()
    for number in range(120):
        done = solver.converged.clone()
        trained(solver, tokens, 1)
        assert (solver.best_loss <= before * (1 + 1e-6)).all(), number
        assert torch.equal(solver.bank().weight[done], bank.weight[done])
        before, bank = solver.best_loss.clone(), solver.bank()
    assert solver.converged.all()


def test_a_shared_matrix_leads_to_the_same_probes(tokens, solved) -> None:
    shared = trained(make(tokens, shared=True), tokens, 300)
    assert shared.converged.all()
    assert float((shared.best - solved.best).norm(dim=-1).div(solved.best.norm(dim=-1)).max()) < 2e-3


def test_a_shared_matrix_is_one_for_a_layer(tokens) -> None:
    assert len(trained(make(tokens, shared=True), tokens, 1).factors) == 2
    assert len(trained(make(tokens), tokens, 1).factors) == 12


def test_columns_of_many_tokens_share_a_matrix(tokens, solved, monkeypatch) -> None:
    first = trained(make(tokens, matrices_every=2), tokens, 1)
    few = (first.effective[0] <= first.effective[0].median()).nonzero()[:, 0].tolist()
    monkeypatch.setattr(newton_matrices, "MANY", float(first.effective[0].median()) / (tokens.acts.shape[2] + 1))
    solver = trained(make(tokens, matrices_every=2), tokens, 1)
    several = [place for place in solver.places[0] if place.column not in few]
    assert {place.column for place in solver.places[0]} == {*few, several[0].column} and len(several) > 1
    trained(solver, tokens, 200)
    assert float((solver.best - solved.best).norm(dim=-1).div(solved.best.norm(dim=-1)).max()) < 2e-3


def test_columns_of_small_probes_or_few_tokens_have_their_own(tokens, monkeypatch) -> None:
    monkeypatch.setattr(newton_matrices, "MANY", 0)
    assert len(trained(make(tokens, matrices_every=2), tokens, 2).factors) < 12
    every_token_up_to(200, monkeypatch)
    assert len({place for own in trained(make(tokens), tokens, 2).places for place in own}) == 12


def test_no_matrix_is_shared_in_the_first_pass(tokens, monkeypatch) -> None:
    """It ends in the class-balanced ridge of each column."""
    monkeypatch.setattr(newton_matrices, "MANY", 0)
    assert len(trained(make(tokens), tokens, 1).factors) == 12


def test_columns_whose_curvature_is_of_another_size_have_their_own(tokens, monkeypatch) -> None:
    """The penalty beside a shared matrix is right for columns of its size alone."""
    monkeypatch.setattr(newton_matrices, "MANY", 0)
    solver = make(tokens)
    solver.effective += 1
    solver.expected = torch.tensor([40.0, 5.0, 60.0, 4.5, 1.0, 33.0]).double().expand(2, -1)
    assert [place.column for place in solver.find_places()[1]] == [0, 1, 0, 1, 4, 0]


def test_of_how_many_tokens_curvature_is(tokens) -> None:
    """Kish's effective sample size; in the first pass of the class weights alone."""
    solver = make(tokens)
    valid, weight = tokens.valid.double(), torch.where(tokens.targets, weights(tokens).double(), 1.0)
    plain = (weight * valid).sum(0).square() / (weight.square() * valid).sum(0)
    for chunk in chunks(tokens, 2000, 0):
        solver.step(*chunk)
    torch.testing.assert_close(solver.sums.effective(), plain.expand(2, -1), rtol=1e-5, atol=0)
    assert (valid.sum(0) / plain > 1.2).any()  # it is no count of valid tokens


def test_the_curvature_of_a_converged_probe_is_what_it_was(tokens) -> None:
    """Others begin where it ended, with matrices in proportion to that."""
    solver = make(tokens)
    known: dict[tuple[int, int], float] = {}
    while not solver.converged.all():
        before = solver.converged.clone()
        trained(solver, tokens, 1)
        for i, k in (solver.converged & ~before).nonzero().tolist():
            known[i, k] = float(solver.expected[i, k])
    assert all(float(solver.expected[place]) == value for place, value in known.items())
    assert min(known.values()) > 1e-3 * max(known.values()) and solver.effective.min() > 1


def test_raw_features(tokens, monkeypatch) -> None:
    """Without standardisation the penalty is on the raw weights."""
    monkeypatch.setattr(matrix_sums, "coarse_float32", nullcontext)
    solver = trained(make(tokens, standardize=False), tokens, 1)
    assert torch.equal(solver.mean, torch.zeros_like(solver.mean)) and (solver.scale == 1).all()
    bank, step = solver.bank(), first_step(tokens, tokens.acts[:, 0].double().numpy(), 1)
    assert distance(np.append(bank.weight[0, 1].numpy(), float(bank.bias[0, 1])), step) < 1e-3


def test_few_passes_are_enough(tokens, monkeypatch) -> None:
    """The curvature is taken anew as probes move; the same problem took 40 passes with that of the first point."""
    assert trained(make(tokens, tolerance=1e-4, matrices_every=1000), tokens).passes > 20
    every_token_up_to(200, monkeypatch)
    assert trained(make(tokens, tolerance=1e-4), tokens).passes <= 15


def test_small_problems_take_the_steps_of_newton(tokens, solved, monkeypatch) -> None:
    """From every token, in every pass: quadratic convergence, for which drawn tokens are no match."""
    easy = [0, 1, 2, 5]  # columns that are near their solution after so many passes
    drawn = trained(make(tokens, matrices_every=1), tokens, 9)
    assert float(drawn.gradient_norm[:, easy].max()) > 1e-4
    every_token_up_to(200, monkeypatch)
    solver = trained(make(tokens), tokens, 9)
    assert float(solver.gradient_norm[:, easy].max()) < 1e-5
    trained(solver, tokens, 5)
    assert float((solver.best - solved.best).norm(dim=-1).div(solved.best.norm(dim=-1)).max()) < 1e-3


def test_hand_made_features_are_not_scaled_and_have_a_small_penalty_of_their_own(tokens) -> None:
    """As scikit-learn has it with features that are multiplied by what their penalty is smaller."""
    n = 3
    solver = trained(make(tokens, n_hand_made=n), tokens, 100)
    assert solver.converged.all() and (solver.scale[..., -n:] == 1).all() and (solver.scale[..., :-n] != 1).any()
    x, mean, std = standardised(tokens, 1)
    x[:, -n:] *= std[-n:] * (L2 / newton_matrices.HAND_MADE_L2) ** 0.5
    for k in (0, 4):
        v = tokens.valid[:, k].numpy()
        y = tokens.targets[v, k].numpy()
        options: Any = {"class_weight": "balanced", "tol": 1e-10, "max_iter": 20_000}
        fit = LogisticRegression(C=int((~y).sum()) / (len(y) ** 2 * L2), **options).fit(x[v], y)
        logits = solver.bank().scores(tokens.acts)[:, 1, k]
        assert float((logits.double().numpy() - fit.decision_function(x)).std()) < 2e-3 * float(logits.std())


@pytest.mark.parametrize("every", [1, 3])
def test_resumed_where_it_can_be_it_goes_on_bit_for_bit(tokens, every) -> None:
    straight = make(tokens, matrices_every=every)
    states = {}
    for number in range(6):
        for chunk in chunks(tokens, 2000, number):
            straight.step(*chunk)
        straight.end_pass()
        if straight.resumable:
            states[number + 1] = straight.state()
    assert list(states) == ([1, 2, 3, 4, 5, 6] if every == 1 else [2, 5])
    final = straight.state()
    for done, state in states.items():
        resumed = make(tokens, matrices_every=every)
        resumed.load(state)
        for number in range(done, 6):
            for chunk in chunks(tokens, 2000, number):
                resumed.step(*chunk)
            resumed.end_pass()
        assert all(torch.equal(resumed.state()[name], value) for name, value in final.items())
    assert not torch.equal(state["point"], states[min(states)]["point"])


def test_it_goes_on_bit_for_bit_from_a_pass_in_which_every_probe_stepped_back(tokens, monkeypatch) -> None:
    """Columns then share by how they stand there, not by how they stood when the run began."""
    monkeypatch.setattr(newton_matrices, "MANY", 0)
    straight = trained(make(tokens, matrices_every=3), tokens, 2)
    at_first, straight.point = straight.places, straight.point * 100
    straight.sums = straight._start_pass()
    trained(straight, tokens, 1)
    assert straight.resumable and straight.places != at_first
    resumed = make(tokens, matrices_every=3)
    resumed.load(straight.state())
    assert resumed.places == straight.places
    assert torch.equal(trained(resumed, tokens, 2).point, trained(straight, tokens, 2).point)


def test_it_goes_on_otherwise_where_it_is_resumed_without_its_matrices(tokens) -> None:
    straight = trained(make(tokens, matrices_every=3), tokens, 3)
    assert not straight.resumable
    resumed = make(tokens, matrices_every=3)
    resumed.load(straight.state())
    assert not torch.equal(trained(resumed, tokens, 1).point, trained(straight, tokens, 1).point)


def test_the_loss_of_a_converged_probe_is_what_it_was(tokens, solved) -> None:
    solver = make(tokens, tolerance=1e-3)
    trained(solver, tokens)
    solver.loss()
    shown = solver.loss()
    last = solver.best_loss - L2 * solver.best[..., :-1].square().sum(-1)
    torch.testing.assert_close(shown, last, rtol=1e-12, atol=0)


def test_no_probe_is_done_before_it_has_moved(tokens) -> None:
    """However small the gradient is where all weights are zero."""
    solver = trained(make(tokens, tolerance=10.0), tokens, 1)
    assert not solver.converged.any() and (solver.bank().weight != 0).any(-1).all()
    assert trained(solver, tokens, 1).converged.all()


def test_where_the_first_step_is_too_long_the_next_is_the_best_there_is(tokens, monkeypatch) -> None:
    """And not a probe of zeros, which ranks nothing."""
    monkeypatch.setattr(newton_sums, "draw", lambda curvature, rate, chance: torch.zeros_like(curvature))
    solver = trained(make(tokens), tokens, 1)
    solver.point *= 100
    solver.sums = solver._start_pass()
    trained(solver, tokens, 1)
    assert not solver.best.any() and (solver.bank().weight != 0).any(-1).all()


def test_a_constant_feature_harms_nothing(tokens) -> None:
    acts = tokens.acts.clone()
    acts[:, :, 5] = 3.0
    solver = trained(make(tokens, l2=0.0), Tokens(acts, tokens.targets, tokens.valid), 3)
    assert solver.bank().weight.isfinite().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_are_refused(tokens, value) -> None:
    acts = tokens.acts.clone()
    acts[7, 1, 3] = value
    with pytest.raises(InputError, match="activations of layer 3 .* --dtype"):
        trained(make(tokens), Tokens(acts, tokens.targets, tokens.valid), 1)


def test_what_the_matrices_take() -> None:
    assert curvature_bytes(5, 14, 4096) == pytest.approx(70 * 74.6e6, rel=1e-2)
