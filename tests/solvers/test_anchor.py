"""Newton's probes on few tokens, corrected by what many more say: against a plain optimiser, and for what it is for.

Shapes: N tokens, L = 2 sites, K = 2 columns, D features.
"""

import pytest
import torch
from torch.nn.functional import softplus

from streamprobe.activations.batch import TokenBatch
from streamprobe.activations.feed import Feed
from streamprobe.activations.store import Part
from streamprobe.lags import Column
from streamprobe.probes.sites import layer_sites
from streamprobe.solvers.class_means import ClassMeans
from streamprobe.solvers.newton import NewtonSolver
from streamprobe.solvers.reliance import Asked, reliance

D, L2 = 12, 0.02  # a gradient of 1e-7 leaves weights 1e-7 / (2 L2) off, at most
COLUMNS = [Column("a", "token", 0), Column("a", "token", 8)]


def make_tokens(n, seed):
    g = torch.Generator().manual_seed(seed)
    acts = torch.randn(n, 2, D, generator=g) * torch.linspace(0.5, 3, D) + 2
    truth = torch.randn(2, D, generator=torch.Generator().manual_seed(1))
    logits = ((acts[:, 0] - 2) @ truth.T) / 4 - 1.5
    valid = torch.rand(n, 2, generator=g) < 0.9
    return acts, (torch.rand(n, 2, generator=g) < logits.sigmoid()) & valid, valid


def solve(solver, tokens, passes=60):
    acts, targets, valid = tokens
    for _ in range(passes):
        solver.begin(acts, 0)
        for part in torch.arange(len(acts)).split(256):
            solver.step(acts[part], targets[part], valid[part])
        solver.end_pass()
        if bool(solver.converged.all()):
            break
    return solver


def weight_of(tokens):
    _, targets, valid = tokens
    return (valid.sum(0) - targets.sum(0)) / targets.sum(0)


def make_solver(tokens, l2=L2):
    return NewtonSolver(
        layer_sites([0, 1]), COLUMNS, D, weight_of(tokens), n_tokens=len(tokens[0]), l2=l2, tolerance=1e-7
    )


def difference_of(tokens):
    means = ClassMeans(layer_sites([0, 1]), COLUMNS, D)
    for part in torch.arange(len(tokens[0])).split(100):
        acts, targets, valid = (x[part] for x in tokens)
        means.begin(acts, 0)
        means.step(acts, targets, valid)
    return means.difference()


def reliance_of(solver, tokens):
    acts, targets, valid = tokens
    n = len(acts)
    zeros = torch.zeros(n, dtype=torch.int64)
    batch = TokenBatch(acts, torch.empty(n, 0), targets, valid, zeros, zeros, zeros, torch.zeros(n))
    feed = Feed("layers", layer_sites([0, 1]), D, lambda batch: batch.acts, torch.arange(2))
    return reliance([Asked(solver.bank(), feed, weight_of(tokens))], [Part(0, iter([batch]))])[0]


def reference(few, many, factor):
    """The same problem by torch's own L-BFGS, each probe alone, in float64: bias and weights of raw features."""
    found = torch.zeros(2, 2, D + 1)
    for i in range(2):
        for k in range(2):
            acts, y, valid = few[0][:, i].double(), few[1][:, k], few[2][:, k]
            mean, std = acts.mean(0), acts.std(0, correction=0)
            x, y, p = ((acts - mean) / std)[valid], y[valid], weight_of(few)[k].double()
            w = torch.where(y, p, 1.0)

            def slope_at_zero(tokens, i=i, k=k, mean=mean, std=std, p=p):
                acts, targets, valid = tokens
                x = ((acts[:, i].double() - mean) / std)[valid[:, k]]
                y = targets[valid[:, k], k]
                ours = weight_of(few)[k].double()
                own = (x[y].mean(0) - x[~y].mean(0)) * ours / (1 + ours) / 2
                return -own

            line = factor[i, k].double() * (slope_at_zero(many) - slope_at_zero(few))
            theta = torch.zeros(D + 1, dtype=torch.float64, requires_grad=True)
            best = torch.optim.LBFGS([theta], max_iter=500, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

            def closure(x=x, y=y, w=w, line=line, theta=theta, best=best):
                best.zero_grad()
                z = x @ theta[:-1] + theta[-1]
                j = (w * softplus(torch.where(y, -z, z))).mean() + L2 * theta[:-1].square().sum() + line @ theta[:-1]
                j.backward()
                return j

            best.step(closure)
            weight = theta.detach()[:-1] / std
            found[i, k] = torch.cat([weight, (theta.detach()[-1] - weight @ mean)[None]])
    return found


FEW, MANY, FRESH = make_tokens(400, 2), make_tokens(20_000, 3), make_tokens(20_000, 4)


def test_an_anchored_probe_is_the_minimum_of_its_problem():
    solver = solve(make_solver(FEW), FEW)
    factor = reliance_of(solver, FEW)
    solver.anchor(difference_of(MANY), factor)
    solve(solver, FEW)
    assert bool(solver.converged.all())
    bank = solver.bank()
    found = torch.cat([bank.weight, bank.bias[..., None]], -1)
    expected = reference(FEW, MANY, factor)
    assert (found - expected).abs().max() < 2e-5 * expected.abs().max()
    plain = reference(FEW, MANY, torch.zeros(2, 2))  # the negative control: the same without the line
    assert (found - plain).abs().max() > 0.02 * expected.abs().max()


def test_anchored_by_their_own_tokens_probes_stay_where_they_are():
    solver = solve(make_solver(FEW), FEW)
    before = solver.bank()
    solver.anchor(difference_of(FEW), reliance_of(solver, FEW))
    solve(solver, FEW)
    assert (solver.bank().weight - before.weight).abs().max() < 1e-5 * before.weight.abs().max()


def loss_of(solver, tokens):
    acts, targets, valid = tokens
    logits = solver.bank().scores(acts)[:, 0] - weight_of(tokens).log()
    losses = softplus(torch.where(targets, -logits, logits))
    return (losses * valid).sum(0) / valid.sum(0)


def test_anchoring_brings_a_probe_nearer_to_that_of_all_tokens():
    few = solve(make_solver(FEW, l2=0.003), FEW)
    plain = loss_of(few, FRESH)
    few.anchor(difference_of(MANY), reliance_of(few, FEW))
    anchored, whole = loss_of(solve(few, FEW), FRESH), loss_of(solve(make_solver(MANY, l2=0.003), MANY), FRESH)
    assert (whole < anchored).all() and (anchored - whole < 0.6 * (plain - whole)).all()


def test_reliance_is_that_of_the_definition():
    solver = solve(make_solver(FEW), FEW)
    acts, targets, valid = FEW
    bank, found = solver.bank(), reliance_of(solver, FEW)
    for k in range(2):
        w = torch.where(targets[:, k], weight_of(FEW)[k], 1.0)[valid[:, k]]
        y = targets[valid[:, k], k]
        p = bank.probabilities(acts)[:, 0, k][valid[:, k]]
        wrong = torch.where(y, 1 - p, p)
        assert float(found[0, k]) == pytest.approx(float((w**2 * wrong).sum() / (w**2 / 2).sum()), rel=1e-5)
    assert (found > 0).all() and (found <= 1).all()


def test_sums_of_a_stream_go_on_where_they_were_left():
    whole = ClassMeans(layer_sites([0, 1]), COLUMNS, D)
    cut = ClassMeans(layer_sites([0, 1]), COLUMNS, D)
    for number, part in enumerate(torch.arange(400).split(100)):
        acts, targets, valid = (x[part] for x in FEW)
        if number == 2:
            state, cut = cut.state(), ClassMeans(layer_sites([0, 1]), COLUMNS, D)
            cut.load(state)
        for each in (whole, cut):
            each.begin(acts, 0)
            each.step(acts, targets, valid)
    assert torch.equal(whole.difference(), cut.difference())
    acts, targets, valid = FEW
    for k in range(2):
        y, x = targets[valid[:, k], k], acts[valid[:, k]].double()
        assert torch.allclose(whole.difference()[:, k], x[y].mean(0) - x[~y].mean(0), atol=1e-6)
