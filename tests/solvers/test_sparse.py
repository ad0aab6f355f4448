"""Sparse probes against planted truths, scikit-learn and every subset there is."""

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from on_ranks import on_ranks
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from streamprobe.activations.drawn import ColumnSample, SampledTokens
from streamprobe.solvers import sparse
from streamprobe.solvers.pointwise import PointwiseTokens
from streamprobe.solvers.refit import Asked, refit
from streamprobe.solvers.sparse import Linear, next_size, sparse_probes

L, K, U, L2 = 2, 3, 1500, 0.01
TRUTH = {(site, k): [site, 3 + k, 6] for site in range(L) for k in range(K)}  # the features that a column goes by


def tokens(n_features: int, noise: float = 1.0) -> PointwiseTokens:
    """Tokens of correlated features, of which three make each column's targets; some of each column are left out."""
    random = torch.Generator().manual_seed(n_features)
    mix = torch.eye(n_features) + torch.randn(n_features, n_features, generator=random) * 0.1
    acts = (torch.randn(U, L, n_features, generator=random) @ mix * 3 + 1).double()
    columns = []
    for k in range(K):
        rows = torch.randperm(U, generator=random)[: U - 100 * k].sort().values
        logit = sum(acts[rows, site][:, TRUTH[site, k]] @ torch.tensor([2.0, -1.5, 1]).double() for site in range(L))
        targets = logit / 3 + torch.randn(len(rows), generator=random) * noise > 1
        weight = torch.where(targets, float((~targets).sum() / targets.sum()), 1.0)
        columns.append(ColumnSample(rows, targets, weight * (1 + torch.rand(len(rows), generator=random))))
    base = torch.zeros(L, K, U).double()
    return PointwiseTokens(SampledTokens(acts, columns), base, acts.mean(0), acts.std(0)[:, None])


def standardised(given: PointwiseTokens, site: int, k: int) -> Tensor:
    return (given.sample.acts[given.sample.columns[k].rows, site] - given.mean[site]) / given.scale[site, 0]


def n_valid(given: PointwiseTokens) -> Tensor:
    return torch.tensor([int(column.weight.sum() / 2) for column in given.sample.columns])


def converged(given: PointwiseTokens) -> tuple[PointwiseTokens, Linear]:
    """The probes of all features, and the tokens with their logits."""
    weight = torch.zeros(L, K, given.mean.shape[1]).double()
    bias, base = torch.zeros(L, K).double(), given.base.clone()
    for k, (column, n) in enumerate(zip(given.sample.columns, n_valid(given), strict=True)):
        x = torch.stack([standardised(given, site, k) for site in range(L)])
        asked = Asked(column.targets, column.weight.double() / n)
        point = refit(x, asked, L2, torch.zeros(L, x.shape[2] + 1).double()).point
        weight[:, k], bias[:, k] = point[:, :-1], point[:, -1]
        base[:, k, column.rows] = (x @ point[:, :-1, None])[..., 0] + point[:, -1:]
    return given._replace(base=base), Linear(weight, bias)


def found_in(given: PointwiseTokens, sizes: list[int]) -> dict[int, Linear]:
    known, probes = converged(given)
    return dict(sparse_probes(known, probes, sizes, n_valid=n_valid(given), l2=L2))


def reference(given: PointwiseTokens, site: int, k: int, features: list[int]) -> np.ndarray:
    """scikit-learn's probe [S + 1] of these standardised features, the bias last."""
    column, n = given.sample.columns[k], float(n_valid(given)[k])
    model = LogisticRegression(C=1 / (2 * n * L2), tol=1e-10, max_iter=5000)
    x = standardised(given, site, k)[:, features].numpy()
    model.fit(x, column.targets.numpy(), sample_weight=column.weight.double().numpy())
    return np.append(model.coef_[0], model.intercept_)


@pytest.mark.parametrize("quadratic", [False, True])
def test_a_planted_truth_is_found(quadratic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if quadratic:
        monkeypatch.setattr(sparse, "EXACT", 10)
    given = tokens(40, noise=0.5)
    probes = found_in(given, [3, 1])[3]
    for (site, k), features in TRUTH.items():
        assert probes.weight[site, k].nonzero()[:, 0].tolist() == features
        assert probes.bias[site, k].isfinite()


def test_a_planted_truth_is_lost_without_its_saliency(monkeypatch: pytest.MonkeyPatch) -> None:
    def least(weight: Tensor, inverse: Tensor, size: int) -> Tensor:
        return weight.abs().argsort(dim=-1)[..., :size].sort(dim=-1).values

    monkeypatch.setattr(sparse, "_most_salient", least)
    probes = found_in(tokens(40, noise=0.5), [3])[3]
    assert probes.weight[0, 0].nonzero()[:, 0].tolist() != TRUTH[0, 0]


@pytest.mark.parametrize("size", [1, 4, 16])
def test_a_probe_is_scikit_learns_of_its_features(size: int) -> None:
    given = tokens(20)
    probes = found_in(given, [1, 4, 16])[size]
    for site in range(L):
        for k in range(K):
            features = probes.weight[site, k].nonzero()[:, 0].tolist()
            assert len(features) == size
            expected = reference(given, site, k, features)
            weight = probes.weight[site, k] * given.scale[site, 0]
            np.testing.assert_allclose(weight[features], expected[:-1], atol=1e-5)
            bias = probes.bias[site, k] + probes.weight[site, k] @ given.mean[site]
            np.testing.assert_allclose(bias, expected[-1], atol=1e-5)


def test_no_pair_of_features_is_better() -> None:
    given = tokens(8, noise=2.0)
    probes = found_in(given, [2])[2]
    for k, (column, n) in enumerate(zip(given.sample.columns, n_valid(given), strict=True)):
        asked, x = Asked(column.targets, column.weight.double() / n), standardised(given, 0, k)
        losses = {}
        for pair in combinations(range(8), 2):
            own = x[None, :, pair]
            point = refit(own, asked, L2, torch.zeros(1, 3).double()).point
            logits = (own @ point[:, :-1, None])[0, :, 0] + point[0, -1]
            loss = torch.nn.functional.binary_cross_entropy_with_logits(
                logits, column.targets.double(), weight=asked.weight, reduction="sum"
            )
            losses[pair] = float(loss + L2 * point[0, :-1].square().sum())
        assert tuple(probes.weight[0, k].nonzero()[:, 0].tolist()) == min(losses, key=losses.__getitem__)


def test_more_features_than_there_are_is_all_of_them() -> None:
    given = tokens(8)
    probes = found_in(given, [64, 2])
    known, whole = converged(given)
    torch.testing.assert_close(probes[64].weight * known.scale, whole.weight, rtol=0, atol=1e-6)
    assert (probes[2].weight != 0).sum(-1).eq(2).all()


def test_rounds_halve_and_pass_through_what_is_asked() -> None:
    n, seen = 576, []
    while n > 1:
        n = next_size(n, [1, 4, 16, 64])
        seen.append(n)
    assert seen == [288, 144, 72, 64, 32, 16, 8, 4, 2, 1]


def test_every_number_of_ranks_finds_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse, "EXACT", 10)
    given = tokens(24)
    alone = found_in(given, [4, 1])
    for probes in on_ranks(lambda: found_in(given, [4, 1]), 2, tmp_path / "ranks"):
        for size, expected in alone.items():
            assert torch.equal(probes[size].weight, expected.weight)
            assert torch.equal(probes[size].bias, expected.bias)


def test_separable_classes_are_solved_with_a_penalty() -> None:
    x = torch.linspace(-1, 1, 50).double()[None, :, None]
    asked = Asked(x[0, :, 0] > 0, torch.full((50,), 0.02).double())
    found = refit(x, asked, 1e-4, torch.full((1, 2), 30.0).double())
    reference = LogisticRegression(C=1 / (2 * 50 * 0.02 * 1e-4), tol=1e-10, max_iter=5000)
    reference.fit(x[0], asked.targets, sample_weight=asked.weight)
    assert abs(float(found.point[0, 0]) - float(reference.coef_[0, 0])) < 1e-3
