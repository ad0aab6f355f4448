"""Nested probes on few tokens, corrected by what many more say of the control and the layers: against torch's L-BFGS.

Shapes: N tokens, P features of the control, L = 2 layers, D features of a layer, K = 2 columns.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

from streamprobe.lags import Column
from streamprobe.probes.nested import Blocks, NestedProbes
from streamprobe.probes.sites import control_sites, layer_sites
from streamprobe.solvers.block_matrices import PENALTIES, Start
from streamprobe.solvers.class_means import ClassMeans
from streamprobe.solvers.nested import NestedSolver
from streamprobe.solvers.newton import NewtonSolver
from streamprobe.solvers.newton_matrices import HAND_MADE_L2

P, HAND_MADE, L, D, L2 = 9, 1, 2, 6, 0.01
COLUMNS = [Column("event", "token", 0), Column("event", "onset", 4)]
ZERO = torch.zeros(2)


class Tokens(NamedTuple):
    """Tokens of which the control knows something, and layer 1 more."""

    blocks: Blocks
    targets: Tensor
    valid: Tensor

    @property
    def positive_weight(self) -> Tensor:
        positive = self.targets.sum(0)
        return (self.valid.sum(0) - positive) / positive


def draw(n: int, seed: int) -> Tokens:
    random = torch.Generator().manual_seed(seed)
    control = torch.randn(n, P, generator=random) * torch.linspace(0.3, 2, P) + 1
    layers = torch.randn(n, L, D, generator=random) + control[:, None, :D] / 2
    known = control[:, :3].sum(1) - 4
    logits = torch.stack([known + layers[:, 1, 0] - control[:, 0] / 2, known - 1], 1)
    valid = torch.rand(n, 2, generator=random) < 0.9
    return Tokens(Blocks(control, layers), (torch.rand(n, 2, generator=random) < logits.sigmoid()) & valid, valid)


FEW, MANY, FRESH = draw(500, 1), draw(20_000, 2), draw(20_000, 3)


def feed(solver: Any, acts: Any, tokens: Tokens, passes: int = 60) -> None:
    """Until it is final."""
    for _ in range(passes):
        if solver.converged.all():
            break
        solver.step(acts, tokens.targets, tokens.valid)
        solver.end_pass()
    assert solver.converged.all()


def difference(sites: Any, acts: Tensor, tokens: Tokens) -> Tensor:
    means = ClassMeans(sites, COLUMNS, acts.shape[2])
    means.begin(acts, 0)
    means.step(acts, tokens.targets, tokens.valid)
    return means.difference()


def falling(probes: NestedProbes) -> Tensor:
    """A validation that prefers the smallest penalty."""
    return -probes.weight.square().sum(-1)


def solve(tokens: Tokens, *, reliance: Tensor = ZERO) -> NestedSolver:
    """Nested probes of these tokens, as much anchored by MANY; nothing is, where `reliance` [K] is 0."""
    known: dict[str, Any] = {"n_tokens": len(tokens.valid), "l2": L2, "tolerance": 1e-6}
    about = (COLUMNS, P, tokens.positive_weight)
    control = NewtonSolver(control_sites(["joint+chain"]), *about, n_hand_made=HAND_MADE, **known)
    layers = NewtonSolver(layer_sites([5, 7]), COLUMNS, D, tokens.positive_weight, **known)
    pairs = ((control, tokens.blocks.control[:, None]), (layers, tokens.blocks.layers))
    for solver, acts in pairs:
        feed(solver, acts, tokens)
    if reliance.any():
        for (solver, acts), of_all in zip(pairs, (MANY.blocks.control[:, None], MANY.blocks.layers), strict=True):
            # That of a layer by itself is another number, and is not to matter:
            factor = (reliance if solver is control else reliance / 2).repeat(len(solver.sites), 1)
            solver.anchor(difference(solver.sites, of_all, MANY), factor)
            feed(solver, acts, tokens)
    nested = NestedSolver(Start.of(control, layers), layers.sites, COLUMNS, falling, tolerance=2e-6, seed=0)
    feed(nested, tokens.blocks, tokens, 200)
    return nested


def features(tokens: Tokens, layer: int, by: Tokens) -> Tensor:
    """Standardised by the tokens `by`, [N, P + D] float64: but for what the control has that is made by hand."""

    def both(of: Tokens) -> Tensor:
        return torch.cat([of.blocks.control, of.blocks.layers[:, layer]], 1).double()

    scale = both(by).std(0, correction=0)
    scale[P - HAND_MADE : P] = 1
    return (both(tokens) - both(by).mean(0)) / scale


def reference(few: Tokens, layer: int, k: int, reliance: float) -> Tensor:
    """Logits [N] of FRESH tokens by torch's own L-BFGS, of the last penalty, with the line that anchors."""
    p, valid = few.positive_weight[k].double(), few.valid[:, k]
    x, y = features(few, layer, few)[valid], few.targets[valid, k]

    def slope_at_zero(tokens: Tokens) -> Tensor:
        own, valid, y = features(tokens, layer, few), tokens.valid[:, k], tokens.targets[:, k]
        return (own[valid & ~y].mean(0) - own[valid & y].mean(0)) * p / (1 + p) / 2

    line = reliance * (slope_at_zero(MANY) - slope_at_zero(few))
    line[P - HAND_MADE : P] = 0  # what is made by hand is left out
    penalty = torch.tensor([L2] * (P - HAND_MADE) + [HAND_MADE_L2] * HAND_MADE + [PENALTIES[-1]] * D).double()
    theta = torch.zeros(P + D + 1, dtype=torch.float64, requires_grad=True)
    best = torch.optim.LBFGS([theta], max_iter=2000, tolerance_grad=1e-11, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        best.zero_grad()
        w, z = theta[:-1], x @ theta[:-1] + theta[-1]
        j = (torch.where(y, p, 1.0) * softplus(torch.where(y, -z, z))).mean() + penalty @ w.square() + line @ w
        j.backward()
        return j

    best.step(closure)  # type: ignore[arg-type]
    found = theta.detach()
    return features(FRESH, layer, few) @ found[:-1] + found[-1]


def test_an_anchored_nested_probe_is_the_minimum_of_its_problem() -> None:
    reliance = torch.tensor([0.7, 0.4])
    solver = solve(FEW, reliance=reliance)
    assert (solver.penalty[1:] == PENALTIES[-1]).all()
    logits = solver.bank().scores(FRESH.blocks)  # [N, L + 1, K]
    for layer in range(L):
        for k in range(2):
            found, factor = logits[:, layer + 1, k].double(), float(reliance[k])
            expected = reference(FEW, layer, k, factor)
            assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
            for wrong in (0.0, factor / 2):  # the negative controls: without the line, and with that of the layer alone
                assert (found - reference(FEW, layer, k, wrong)).abs().max() > 0.01 * expected.abs().max()


def loss(solver: NestedSolver) -> Tensor:
    """Of FRESH tokens, weighted as in training: [L, K]."""
    z = solver.bank().scores(FRESH.blocks)[:, 1:].double()
    y, v, p = FRESH.targets[:, None], FRESH.valid[:, None], FRESH.positive_weight.double()
    return (torch.where(y, softplus(-z) * p, softplus(z)) * v).sum(0) / v.sum(0)


def test_anchoring_brings_nested_probes_nearer_to_those_of_all_tokens() -> None:
    plain, anchored, whole = loss(solve(FEW)), loss(solve(FEW, reliance=torch.full((2,), 0.6))), loss(solve(MANY))
    assert (whole < anchored).all() and (anchored - whole < 0.6 * (plain - whole)).all()
