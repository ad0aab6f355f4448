"""The Newton solver against scikit-learn, autograd and plain sums, on activations of the embedded model."""

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from builders import setup_of
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torch.nn.functional import softplus

from streamprobe.errors import InputError
from streamprobe.probes.linear import ProbeBank
from streamprobe.probes.sites import layer_sites
from streamprobe.run.pipeline import Setup
from streamprobe.solvers.newton import NewtonSolver, curvature_bytes
from streamprobe.solvers.running_sums import Grams, first_scaling, with_one

ROOT = Path(__file__).parents[2]
L2 = 0.01
TOLERANCE = 1e-5


class Tokens(NamedTuple):
    acts: Tensor  # [N, L, D]
    targets: Tensor  # [N, K]
    valid: Tensor  # [N, K]


@pytest.fixture(scope="module")
def setup() -> Setup:
    """The embedded model, 100 of its chains, two layers and columns of both targets."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        grid = ["--layers", "1", "3", "--lags", "-4", "0", "8", "--max_chains", "100", "--controls", "none"]
        return setup_of(["configs/demo.yaml", *grid])


@pytest.fixture(scope="module")
def tokens(setup: Setup) -> Tokens:
    """All training tokens, in a random order."""
    parts = [(b.acts, b.targets, b.valid) for b in setup.reader.read("train")]
    acts, targets, valid = (torch.cat(column) for column in zip(*parts, strict=True))
    order = torch.randperm(len(acts), generator=torch.Generator().manual_seed(0))
    return Tokens(acts[order], targets[order], valid[order])


def weights(tokens: Tokens) -> Tensor:
    """Negatives / positives of each column [K]."""
    n, hits = tokens.valid.sum(0), tokens.targets.sum(0)
    return (n - hits) / hits


def make(setup: Setup, tokens: Tokens, **options: Any) -> NewtonSolver:
    options = {"l2": L2, "tolerance": TOLERANCE} | options
    return NewtonSolver(
        layer_sites(setup.config.probes.layers),
        setup.inputs.columns,
        setup.backbone.hidden_size,
        weights(tokens),
        **options,
    )


def chunks(tokens: Tokens, size: int = 2000, seed: int | None = None) -> Iterator[Tokens]:
    n = len(tokens.acts)
    order = torch.arange(n) if seed is None else torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    for rows in order.split(size):
        yield Tokens(*(part[rows] for part in tokens))


def trained(solver: NewtonSolver, tokens: Tokens, passes: int = 60, size: int = 2000) -> NewtonSolver:
    for number in range(passes):
        if solver.converged.all():
            break
        for chunk in chunks(tokens, size, number):
            solver.step(*chunk)
        solver.end_pass()
    return solver


@pytest.fixture(scope="module")
def solved(setup: Setup, tokens: Tokens) -> NewtonSolver:
    return trained(make(setup, tokens), tokens, 200)


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
def test_control_another_penalty_or_class_weight_gives_other_probes(solved, tokens, wrong) -> None:
    bank = solved.bank()
    for i, k in grid()[:6]:
        _, mean, std = standardised(tokens, i)
        assert distance(in_features(bank, i, k, mean, std), by_sklearn(tokens, i, k, **wrong)) > 1e-2


def first_step(tokens: Tokens, i: int, k: int) -> np.ndarray:
    """The Newton step from zero, written out for one probe in float64."""
    x = np.pad(standardised(tokens, i)[0], ((0, 0), (0, 1)), constant_values=1.0)
    v = tokens.valid[:, k].numpy()
    x, y = x[v], tokens.targets[v, k].numpy()
    weight = np.where(y, (~y).sum() / y.sum(), 1.0)
    hessian = (x.T * weight) @ x / 4 / len(y) + 2 * L2 * np.diag(np.append(np.ones(x.shape[1] - 1), 0))
    return np.linalg.solve(hessian, x.T @ (weight * (y - 0.5)) / len(y))


@pytest.mark.parametrize("size", [500, 10_000])
def test_one_pass_is_the_newton_step_from_zero(setup, tokens, size) -> None:
    """Whatever the chunks, and exact for each column's own valid tokens."""
    assert not tokens.valid[:, [0, 2, 3, 5]].all(0).any()
    solver = trained(make(setup, tokens), tokens, 1, size)
    bank = solver.bank()
    for i, k in grid():
        _, mean, std = standardised(tokens, i)
        assert distance(in_features(bank, i, k, mean, std), first_step(tokens, i, k)) < 2e-4, (i, k)


def test_control_one_pass_is_not_converged(setup, tokens) -> None:
    solver = trained(make(setup, tokens), tokens, 1)
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


def test_the_reported_gradient_norm_is_that_of_the_reported_probe(setup, solved, tokens) -> None:
    bank = solved.bank()
    for i, k in grid():
        loss, norm = objective(tokens, bank, i, k)
        assert norm <= 2 * TOLERANCE and abs(norm - float(solved.gradient_norm[i, k])) < TOLERANCE
        assert loss == pytest.approx(float(solved.best_loss[i, k]), rel=1e-6)
    assert (
        objective(tokens, trained(make(setup, tokens), tokens, 1).bank(), 0, 1)[1] > 0.01
    )  # another probe, another norm


@pytest.mark.parametrize("shared", [False, True], ids=["own matrix", "shared matrix"])
def test_the_loss_falls_in_every_pass_and_converged_probes_stay(setup, tokens, shared) -> None:
    solver = make(setup, tokens, shared=shared, tolerance=1e-3)
    before, bank = torch.full_like(solver.best_loss, torch.inf), solver.bank()
    for number in range(120):
        done = solver.converged.clone()
        trained(solver, tokens, 1)
        assert (solver.best_loss <= before * (1 + 1e-6)).all(), number
        assert torch.equal(solver.bank().weight[done], bank.weight[done])
        before, bank = solver.best_loss.clone(), solver.bank()
    assert solver.converged.all()


def test_a_shared_matrix_leads_to_the_same_probes(setup, tokens, solved) -> None:
    shared = trained(make(setup, tokens, shared=True), tokens, 300)
    assert shared.converged.all()
    assert float((shared.best - solved.best).norm(dim=-1).div(solved.best.norm(dim=-1)).max()) < 2e-3
    assert shared.factor.shape[1] == 1 and solved.factor.shape[1] == 6


def test_raw_features(setup, tokens) -> None:
    """Without standardisation the penalty is on the raw weights."""
    solver = trained(make(setup, tokens, standardize=False), tokens, 1)
    assert torch.equal(solver.mean, torch.zeros_like(solver.mean)) and (solver.scale == 1).all()
    x = np.pad(tokens.acts[:, 0].double().numpy(), ((0, 0), (0, 1)), constant_values=1.0)
    v = tokens.valid[:, 1].numpy()
    x, y = x[v], tokens.targets[v, 1].numpy()
    weight = np.where(y, (~y).sum() / y.sum(), 1.0)
    hessian = (x.T * weight) @ x / 4 / len(y) + 2 * L2 * np.diag(np.append(np.ones(x.shape[1] - 1), 0))
    step = np.linalg.solve(hessian, x.T @ (weight * (y - 0.5)) / len(y))
    bank = solver.bank()
    assert distance(np.append(bank.weight[0, 1].numpy(), float(bank.bias[0, 1])), step) < 1e-3


def test_resumed_after_any_pass_it_goes_on_bit_for_bit(setup, tokens) -> None:
    straight = make(setup, tokens)
    states = []
    for number in range(4):
        for chunk in chunks(tokens, 2000, number):
            straight.step(*chunk)
        straight.end_pass()
        states.append(straight.state())
    for done in (1, 3):
        resumed = make(setup, tokens)
        resumed.load(states[done - 1])
        assert resumed.needs_first_pass
        for number in [0, *range(done, 4)]:  # the first pass once more, for the matrices
            for chunk in chunks(tokens, 2000, number):
                resumed.step(*chunk)
            resumed.end_pass()
            assert not resumed.needs_first_pass
        assert all(torch.equal(resumed.state()[name], value) for name, value in straight.state().items())
    assert not torch.equal(states[0]["point"], states[3]["point"])


def naive(tokens: Tokens, mean: Tensor, scale: Tensor, p: Tensor, i: int, k: int) -> Tensor:
    x = torch.nn.functional.pad((tokens.acts[:, i].double() - mean[i]) / scale[i], (0, 1), value=1.0)
    weight = tokens.valid[:, k] * torch.where(tokens.targets[:, k], p[k].double(), 1.0)
    return (x * weight[:, None]).T @ x


@pytest.mark.parametrize("shared", [False, True])
def test_grams_are_the_plain_sums_and_shards_merge(tokens, shared) -> None:
    """Each shard has the scaling of its own first chunk; what is merged is what one stream sums."""
    p, parts = weights(tokens), list(chunks(tokens, 1500))
    one, left, right = (Grams(*first_scaling(part.acts), p, shared) for part in (parts[0], parts[0], parts[2]))
    for number, part in enumerate(parts):
        for grams in (one, left if number < 2 else right):
            grams.add(with_one(part.acts, grams.mean, grams.scale), part.targets, part.valid)
    assert not torch.equal(left.mean, right.mean)
    alone = left.curvature(0, 0, left.mean.double(), left.scale.double()).clone()
    left.merge(right)
    mean, scale = one.final_scaling()
    x = tokens.acts.double()
    torch.testing.assert_close(mean, x.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(scale, x.std(0, correction=0), rtol=1e-5, atol=0)
    for merged, single in zip(left.final_scaling(), (mean, scale), strict=True):
        torch.testing.assert_close(merged, single, rtol=1e-6, atol=1e-6)
    for i, k in grid():
        expected = naive(tokens, mean, scale, p, i, k)
        if shared:
            expected = torch.stack([naive(tokens, mean, scale, p, i, j) for j in range(6)]).mean(0)
        bound = 1e-5 * float(expected.diagonal().max())
        assert float((one.curvature(i, k, mean, scale) - expected).abs().max()) < bound
        assert float((left.curvature(i, k, mean, scale) - expected).abs().max()) < bound
    assert float((alone - left.curvature(0, 0, left.mean.double(), left.scale.double())).abs().max()) > 10 * bound


def test_a_constant_feature_harms_nothing(setup, tokens) -> None:
    acts = tokens.acts.clone()
    acts[:, :, 5] = 3.0
    solver = trained(make(setup, tokens, l2=0.0), Tokens(acts, tokens.targets, tokens.valid), 3)
    assert solver.bank().weight.isfinite().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_are_the_users_to_fix(setup, tokens, value) -> None:
    acts = tokens.acts.clone()
    acts[7, 1, 3] = value
    with pytest.raises(InputError, match="activations of layer 3 .* --dtype"):
        trained(make(setup, tokens), Tokens(acts, tokens.targets, tokens.valid), 1)


def test_what_the_matrices_take() -> None:
    assert curvature_bytes(5, 14, 4096) == pytest.approx(70 * 134.3e6, rel=1e-3)
