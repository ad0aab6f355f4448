"""Probes of several folds, trained at once: those of separate solvers, each fed the chains of the other folds alone."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.functional import softplus

from streamprobe.activations.batch import Extras
from streamprobe.activations.feed import Feed
from streamprobe.lags import Column
from streamprobe.probes.nested import Blocks, NestedProbes
from streamprobe.probes.sites import control_sites, layer_sites
from streamprobe.solvers import newton, newton_sums
from streamprobe.solvers.block_matrices import Start
from streamprobe.solvers.nested import NestedSolver
from streamprobe.solvers.newton import NewtonSolver

N, F, P, HAND_MADE, L, D = 6000, 5, 9, 4, 2, 6
COLUMNS = [Column("event", "token", 4), Column("event", "onset", 4)]
ALL = slice(None)


class Problem(NamedTuple):
    """Tokens whose features spread more in some folds than in others, and as many to choose penalties by."""

    blocks: Blocks
    targets: Tensor
    valid: Tensor
    fold: Tensor

    def at(self, rows: Tensor | slice) -> "Problem":
        return Problem(Blocks(*(each[rows] for each in self.blocks)), *(each[rows] for each in self[1:]))


def draw(seed: int) -> Problem:
    random = torch.Generator().manual_seed(seed)
    fold = torch.randint(F, (N,), generator=random)
    spread = (1 + fold / 2)[:, None]
    control = torch.randn(N, P, generator=random) * torch.linspace(0.2, 3, P) * spread + fold[:, None]
    layers = (torch.randn(N, L, D, generator=random) + control[:, None, :D] / 2) * spread[..., None]
    known = (control[:, :3].sum(1) - 3 + layers[:, 1, 0]) / 2
    logits = torch.stack([known, known - 3], 1)
    valid = torch.rand(N, 2, generator=random) < 0.9
    return Problem(
        Blocks(control, layers), (torch.rand(N, 2, generator=random) < logits.sigmoid()) & valid, valid, fold
    )


@pytest.fixture(scope="module")
def problem() -> Problem:
    return draw(1)


@pytest.fixture(scope="module")
def held_out() -> Problem:
    return draw(2)


def feed() -> Feed:
    """Every column for each fold."""
    columns = torch.arange(len(COLUMNS)).repeat(F)
    return Feed("all", [], 0, lambda batch: batch, columns, folds=torch.arange(F).repeat_interleave(len(COLUMNS)))


class Trained(NamedTuple):
    """Solvers of the control, of the layers, and of both, until they are final."""

    control: NewtonSolver
    layers: NewtonSolver
    nested: NestedSolver


def train(problem: Problem, held_out: Problem, *, folds: bool, shared: bool = False) -> Trained:
    """With the probes of all folds in each solver, or of one."""
    asked = feed() if folds else Feed("all", [], 0, lambda batch: batch, torch.arange(len(COLUMNS)))
    columns = [COLUMNS[k]._replace(fold=f) for k, f in zip(asked.columns, feed().folds.tolist(), strict=False)]
    valid, targets = asked.valid(problem.valid, problem.fold), problem.targets[:, asked.columns]
    positive = (targets & valid).sum(0)
    weight = (valid.sum(0) - positive) / positive
    known: dict[str, Any] = {"n_tokens": N, "tolerance": 1e-8, "shared": shared}
    control = NewtonSolver(control_sites(["joint+chain"]), columns, P, weight, n_hand_made=HAND_MADE, **known)
    layers = NewtonSolver(layer_sites([5, 7]), columns, D, weight, **known)

    def fit(solver: Any, take: Callable[[Blocks], Any], done: Callable[[], bool]) -> None:
        for _ in range(200):
            for start in range(0, len(problem.fold), 1500):
                rows = slice(start, start + 1500)
                part = problem.at(rows)
                chance = torch.rand(len(part.fold), generator=torch.Generator().manual_seed(start))
                solver.step(take(part.blocks), targets[rows], valid[rows], Extras(part.fold, chance))
            solver.end_pass()
            if done():
                return
        raise AssertionError(f"{solver.gradient_norm}")

    fit(control, lambda blocks: blocks.control[:, None], lambda: bool(control.converged.all()))
    fit(layers, lambda blocks: blocks.layers, lambda: bool(layers.converged.all()))
    chosen_by = asked.valid(held_out.valid, held_out.fold)

    def loss(probes: NestedProbes) -> Tensor:
        z = probes.scores(held_out.blocks).double()  # [N, S, K]
        y = held_out.targets[:, asked.columns][:, None].double()
        each = weight.double() * y * softplus(-z) + (1 - y) * softplus(z)
        return (each * chosen_by[:, None]).sum(0) / chosen_by.sum(0)

    nested = NestedSolver(Start.of(control, layers), layers.sites, columns, loss, tolerance=1e-7, seed=0)
    fit(nested, lambda blocks: blocks, lambda: nested.final)
    return Trained(control, layers, nested)


def distance(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.mark.parametrize("few", [True, False], ids=["all tokens", "drawn tokens"])
@pytest.mark.parametrize("shared", [False, True], ids=["own matrices", "shared"])
def test_folds_give_the_probes_of_separate_solvers(problem, held_out, few, shared, monkeypatch) -> None:
    for module in () if few else (newton, newton_sums):
        monkeypatch.setattr(module, "EXACT", 0)
    ours, differ = train(problem, held_out, folds=True, shared=shared), 0.0
    for fold in range(F):
        others, own = problem.at(problem.fold != fold), slice(2 * fold, 2 * fold + 2)
        theirs = train(others, held_out.at(held_out.fold != fold), folds=False, shared=shared)
        other = train(problem.at(problem.fold != (fold + 1) % F), held_out, folds=False) if not fold else None
        for name in Trained._fields:
            bank, expected = getattr(ours, name).bank(), getattr(theirs, name).bank()
            for kind, tensor in expected.tensors().items():
                assert distance(bank.tensors()[kind][:, own], tensor) < 1e-6, (name, kind)
                if other is not None:  # negative control: those of another fold are others
                    differ = max(differ, distance(getattr(other, name).bank().tensors()[kind], tensor))
        assert torch.equal(ours.nested.penalty[:, own], theirs.nested.penalty)
    assert differ > 1e-3


def test_grams_of_folds_are_scaled_by_the_other_folds_alone(problem: Problem) -> None:
    ours = train(problem, problem, folds=True).layers
    for fold in range(F):
        others = problem.blocks.layers[problem.fold != fold].double()
        torch.testing.assert_close(ours.scale[:, fold].double(), others.std(0, correction=0), rtol=1e-5, atol=0)
    assert (ours.scale[:, 0] - ours.scale[:, 4]).abs().max() > 0.1  # negative control
