"""Metrics against scikit-learn."""

import numpy as np
import pytest
import torch
from scored_samples import KINDS, columns, sample
from sklearn.metrics import (
    average_precision_score,
    brier_score_loss,
    f1_score,
    precision_recall_curve,
    roc_auc_score,
    roc_curve,
)
from torch import Tensor

from streamprobe.evaluation.metrics import (
    auroc,
    average_precision,
    best_threshold,
    brier,
    f1_at,
    measure,
    point_metrics,
    rank,
    tpr_at_fpr,
)


def same(ours: Tensor, reference: list[float]) -> None:
    """Equal to rounding of float64, NaN where the reference has it."""
    assert ours.dtype == torch.float64
    np.testing.assert_allclose(ours.numpy(), reference, rtol=0, atol=1e-12)


every_kind = pytest.mark.parametrize("kind", KINDS)
seeds = pytest.mark.parametrize("seed", range(3))


@every_kind
@seeds
def test_auroc_is_scikit_learns(kind: str, seed: int) -> None:
    scores, targets = sample(kind, seed)
    same(auroc(rank(scores, targets)), [roc_auc_score(targets, s) for s in columns(scores)])


@every_kind
@seeds
def test_average_precision_is_scikit_learns(kind: str, seed: int) -> None:
    scores, targets = sample(kind, seed)
    same(average_precision(rank(scores, targets)), [average_precision_score(targets, s) for s in columns(scores)])


@every_kind
@seeds
def test_the_best_threshold_is_the_highest_with_scikit_learns_best_f1(kind: str, seed: int) -> None:
    scores, targets = sample(kind, seed)
    threshold = best_threshold(rank(scores, targets))
    for s, cut in zip(columns(scores), threshold.tolist(), strict=True):
        precision, recall, cuts = precision_recall_curve(targets, s)
        f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-300)
        best = f1.max()
        assert f1_score(targets, s >= cut) == pytest.approx(best, abs=1e-12)
        assert cut == cuts[f1[:-1] >= best - 1e-12].max()


@every_kind
@pytest.mark.parametrize("threshold", [-50.0, -1.0, 0.0, 0.5, 50.0])
def test_f1_is_scikit_learns(kind: str, threshold: float) -> None:
    scores, targets = sample(kind, 5)
    expected = [f1_score(targets, s >= threshold, zero_division=0) for s in columns(scores)]
    ranking = rank(scores, targets)
    same(f1_at(ranking, threshold), expected)
    same(f1_at(ranking, torch.full((4,), threshold)), expected)


def test_f1_takes_a_threshold_for_each_probe() -> None:
    scores, targets = sample("no ties", 6)
    cuts = torch.tensor([-1.0, 0.0, 0.3, 2.0])
    same(
        f1_at(rank(scores, targets), cuts),
        [f1_score(targets, s >= cut) for s, cut in zip(columns(scores), cuts.tolist(), strict=True)],
    )


@every_kind
@seeds
def test_tpr_at_fpr_is_read_off_scikit_learns_curve(kind: str, seed: int) -> None:
    scores, targets = sample(kind, seed)
    curves = [roc_curve(targets, s, drop_intermediate=False)[:2] for s in columns(scores)]
    for fpr in (0.0, 0.05, 0.1, 0.5, 1.0):
        same(tpr_at_fpr(rank(scores, targets), fpr), [true[false <= fpr].max() for false, true in curves])


@every_kind
def test_brier_is_scikit_learns(kind: str) -> None:
    scores, targets = sample(kind, 0)
    expected = [brier_score_loss(targets, 1 / (1 + np.exp(-s))) for s in columns(scores)]
    np.testing.assert_allclose(brier(rank(scores, targets)).numpy(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("n_negative", range(20, 420, 20))
def test_a_false_positive_rate_of_just_5_percent_is_allowed(n_negative: int) -> None:
    scores = torch.cat(
        [torch.full((n_negative // 20,), 2.0), torch.zeros(n_negative - n_negative // 20), torch.ones(1)]
    )
    assert tpr_at_fpr(rank(scores[:, None], torch.arange(n_negative + 1) == n_negative), 0.05).tolist() == [1.0]


def test_ranking_fails_without_ranks_that_ties_share() -> None:
    """Ties that are broken by position rank otherwise."""
    scores, targets = sample("many ties", 0)
    broken = scores - 1e-3 * torch.arange(len(scores))[:, None] / len(scores)
    right = np.array([roc_auc_score(targets, s) for s in columns(scores)])
    assert np.abs(auroc(rank(broken, targets)).numpy() - right).min() > 1e-3
    right = np.array([average_precision_score(targets, s) for s in columns(scores)])
    assert np.abs(average_precision(rank(broken, targets)).numpy() - right).min() > 1e-3


@pytest.mark.parametrize("present", [True, False, None])
def test_an_absent_class_is_nan(present: bool | None) -> None:
    """No negatives, no positives, no tokens at all."""
    n = 0 if present is None else 9
    scores, targets = torch.randn(n, 3, generator=torch.Generator().manual_seed(0)), torch.full((n,), bool(present))
    ranking = rank(scores, targets)
    for value in (auroc(ranking), average_precision(ranking), tpr_at_fpr(ranking)):
        assert value.shape == (3,) and value.isnan().all()
    for value in (best_threshold(ranking), f1_at(ranking, 0.0)):
        assert value.shape == (3,) and value.isnan().all() == (present is not True)


def test_a_nan_score_is_refused() -> None:
    with pytest.raises(AssertionError, match="NaN"):
        rank(torch.tensor([[0.0], [float("nan")]]), torch.tensor([True, False]))


def masked_sample() -> tuple[Tensor, Tensor, Tensor]:
    """Scores [N, L, K], targets and valid [N, K]; column 3 has no positives, column 4 no tokens."""
    random = torch.Generator().manual_seed(7)
    targets = torch.rand(200, 5, generator=random) < 0.3
    valid = torch.rand(200, 5, generator=random) < torch.tensor([1.0, 0.7, 0.3, 0.7, 0.0])
    targets[:, 3] &= ~valid[:, 3]  # positive only where it does not count
    scores = torch.randn(200, 2, 5, generator=random) + targets[:, None]
    scores[:, 1] = (2 * scores[:, 1]).round()
    return scores, targets, valid


@pytest.mark.parametrize("given", [False, True])
def test_measure_is_scikit_learn_on_the_valid_tokens_of_each_column(given: bool) -> None:
    scores, targets, valid = masked_sample()
    threshold = torch.linspace(-1, 1, 10).reshape(2, 5)
    result = measure_at(scores, targets, valid, threshold) if given else measure(scores, targets, valid)
    assert all(value.shape == (2, 5) and value.dtype == torch.float64 for value in result.values())
    for i in range(2):
        for k in range(3):
            s, y = scores[valid[:, k], i, k].double().numpy(), targets[valid[:, k], k].numpy()
            false, true, _ = roc_curve(y, s, drop_intermediate=False)
            cut = result["threshold"][i, k].item()
            if given:
                assert cut == threshold[i, k]
            else:
                precision, recall, _ = precision_recall_curve(y, s)
                best = (2 * precision * recall / np.maximum(precision + recall, 1e-300)).max()
                assert result["f1"][i, k].item() == pytest.approx(best, abs=1e-12)
            expected = {
                "auroc": roc_auc_score(y, s),
                "average_precision": average_precision_score(y, s),
                "f1": f1_score(y, s >= cut),
                "threshold": cut,
                "f1_at_half": f1_score(y, 1 / (1 + np.exp(-s)) >= 0.5),
                "tpr_at_5fpr": true[false <= 0.05].max(),
            }
            assert {name: value[i, k].item() for name, value in result.items()} == pytest.approx(expected, abs=1e-12)
    for name in result.keys() - {"threshold"}:
        assert result[name][:, 3:].isnan().all(), name


def measure_at(scores: Tensor, targets: Tensor, valid: Tensor, threshold: Tensor) -> dict[str, Tensor]:
    """What `measure` gives, with thresholds [L, K] that were chosen before."""
    columns = []
    for k in range(targets.shape[1]):
        ranking = rank(scores[:, :, k], targets[:, k], valid[:, k])
        columns.append(point_metrics(ranking, threshold=threshold[:, k], half=torch.zeros(2)))
    return {name: torch.stack([each[name] for each in columns], dim=1) for name in columns[0]}


def test_measure_fails_without_the_mask() -> None:
    scores, targets, valid = masked_sample()
    masked, unmasked = measure(scores, targets, valid), measure(scores, targets, torch.ones_like(valid))
    assert (masked["auroc"] - unmasked["auroc"])[:, 1:3].abs().min() > 1e-3
