"""Intervals against a loop that repeats the tokens of the chains drawn."""

import numpy as np
import pytest
import torch
from scored_samples import KINDS, columns, sample
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import Tensor

from streamprobe.evaluation import bootstrap
from streamprobe.evaluation.bootstrap import chain_bootstrap, percentiles, rank_chains
from streamprobe.evaluation.metrics import auroc, average_precision, rank


def drawn(n_chains: int, resamples: int, seed: int) -> Tensor:
    """Weights [R, C]: how often each resample drew each chain."""
    p = np.full(n_chains, 1 / n_chains)
    return torch.from_numpy(np.random.default_rng(seed).multinomial(n_chains, p, size=resamples))


def chained_sample(kind: str, seed: int, n_chains: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    """Scores [N, P], targets [N] and chain [N], chains of unlike length in mixed order."""
    scores, targets = sample(kind, seed, n=200, n_probes=2)
    chain = (n_chains * torch.rand(200, generator=torch.Generator().manual_seed(seed)).square()).long()
    return scores, targets, chain


def bootstrap_by_loop(
    scores: Tensor, targets: Tensor, chain: Tensor, weights: Tensor, *levels: float
) -> list[tuple[np.ndarray, np.ndarray]]:
    """The intervals [P, 2] of each level from repeated tokens and scikit-learn; resamples without both classes left out."""
    areas, precisions = [], []
    for row in weights.numpy():
        index = np.repeat(np.arange(len(chain)), row[chain.numpy()])
        y = targets.numpy()[index]
        if 0 < y.sum() < len(y):
            areas.append([roc_auc_score(y, s[index]) for s in columns(scores)])
            precisions.append([average_precision_score(y, s[index]) for s in columns(scores)])
    ends = [[(1 - level) / 2, (1 + level) / 2] for level in levels]
    return [(np.quantile(areas, end, axis=0).T, np.quantile(precisions, end, axis=0).T) for end in ends]


@pytest.mark.parametrize("kind", KINDS[:4])
def test_chain_bootstrap_is_a_loop_over_repeated_chains(kind: str) -> None:
    """With one positive or one negative, every third resample lacks a class and is left out by both."""
    scores, targets, chain = chained_sample(kind, 3)
    weights = drawn(12, 20, 1)
    for level, by_loop in zip((0.95, 0.5), bootstrap_by_loop(scores, targets, chain, weights, 0.95, 0.5), strict=True):
        for ours, reference in zip(chain_bootstrap(scores, targets, chain, weights), by_loop, strict=True):
            np.testing.assert_allclose(percentiles(ours, level).numpy(), reference, rtol=0, atol=1e-6)


def test_an_interval_fails_without_the_weights_of_its_own_chains() -> None:
    scores, targets, chain = chained_sample("many ties", 3)
    weights = drawn(12, 20, 1)
    [by_loop] = bootstrap_by_loop(scores, targets, chain, weights, 0.95)
    for ours, reference in zip(chain_bootstrap(scores, targets, chain, weights.roll(1, dims=1)), by_loop, strict=True):
        assert np.abs(percentiles(ours).numpy() - reference).max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_each_chain_drawn_once_gives_the_point_estimates(kind: str) -> None:
    scores, targets, chain = chained_sample(kind, 4)
    areas, precisions = chain_bootstrap(scores, targets, chain, torch.ones(3, 12, dtype=torch.int64))
    ranking = rank(scores, targets)
    for ours, point in ((areas, auroc(ranking)), (precisions, average_precision(ranking))):
        assert torch.allclose(ours, point.expand(3, -1), rtol=0, atol=1e-6)


def test_without_a_usable_resample_there_is_no_interval() -> None:
    """Chain 0 holds all positives and nothing else: a resample has both classes only if it draws both chains."""
    scores, targets = sample("no ties", 0, n_probes=2)
    chain = (~targets).long()
    for result in chain_bootstrap(scores, targets, chain, torch.tensor([[2, 0], [0, 2]])):
        assert result.shape == (2, 2) and result.isnan().all() and percentiles(result).isnan().all()
    areas, _ = chain_bootstrap(scores, targets, chain, torch.tensor([[2, 0], [0, 2], [1, 1]]))
    assert torch.allclose(percentiles(areas), auroc(rank(scores, targets))[:, None].expand(-1, 2), rtol=0, atol=1e-6)


def test_an_interval_fails_without_chains_as_the_unit_that_is_drawn() -> None:
    """40 chains of 25 copies of one token hold 40 observations, not 1,000: resampled tokens give a fifth of the width."""
    random = torch.Generator().manual_seed(2)
    targets = torch.arange(40) < 15
    scores = torch.randn(40, 3, generator=random) + targets[:, None]
    copies = torch.arange(40).repeat_interleave(25)
    by_chain = chain_bootstrap(scores[copies], targets[copies], copies, drawn(40, 200, 3))
    by_token = chain_bootstrap(scores[copies], targets[copies], torch.arange(1000), drawn(1000, 200, 3))
    once = chain_bootstrap(scores, targets, torch.arange(40), drawn(40, 200, 3))
    for chains, tokens in zip(map(percentiles, by_chain), map(percentiles, by_token), strict=True):
        ratio = (chains[:, 1] - chains[:, 0]) / (tokens[:, 1] - tokens[:, 0])
        assert (ratio > 3).all() and (ratio < 8).all()
    assert torch.allclose(by_chain[0], once[0], rtol=0, atol=1e-6)  # copies add nothing


def test_a_probe_without_ties_is_resampled_alike_beside_one_with_ties() -> None:
    """Tables of tied negatives are only made where a probe has some."""
    scores, targets, chain = chained_sample("no ties", 5)
    weights = drawn(12, 20, 1)
    mixed = torch.cat([scores, scores.mul(2).round()], 1)
    tied = [bool(rank_chains(each, targets, chain, 12)[0].tied.any()) for each in (scores, mixed)]
    assert tied == [False, True]
    (areas, precisions), beside = (chain_bootstrap(each, targets, chain, weights) for each in (scores, mixed))
    torch.testing.assert_close(beside[0][:, :2], areas, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(beside[1][:, :2], precisions, rtol=0, atol=1e-6, equal_nan=True)


def test_areas_fail_without_ties_that_count_half() -> None:
    """Negative control: ties that are broken by position are not what the loop finds."""
    scores, targets, chain = chained_sample("many ties", 5)
    weights = drawn(12, 20, 1)
    broken = scores - 1e-3 * targets[:, None]
    areas, unlike = (chain_bootstrap(each, targets, chain, weights)[0] for each in (scores, broken))
    assert (areas - unlike).abs().nanquantile(0.0) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_resamples_do_not_depend_on_how_many_counts_are_made_at_once(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores, targets, chain = chained_sample(kind, 6)
    weights = drawn(12, 20, 1)
    whole = chain_bootstrap(scores, targets, chain, weights)
    monkeypatch.setattr(bootstrap, "COUNTS", 1)
    for at_once, row_by_row in zip(whole, chain_bootstrap(scores, targets, chain, weights), strict=True):
        torch.testing.assert_close(at_once, row_by_row, rtol=0, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("level", [0.95, 0.5, 1.0])
def test_percentiles_are_torchs_quantiles(level: float) -> None:
    resampled = torch.randn(101, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    resampled[::3, 1] = torch.nan
    resampled[:, 2] = torch.nan
    resampled[1:, 3, 0] = torch.nan
    ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    expected = resampled.nanquantile(ends, dim=0).movedim(0, -1)
    torch.testing.assert_close(percentiles(resampled, level), expected, rtol=0, atol=1e-15, equal_nan=True)
