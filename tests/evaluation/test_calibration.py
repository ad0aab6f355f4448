"""Slopes and offsets against scikit-learn's, and what has no such fit."""

import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from streamprobe.evaluation import calibration
from streamprobe.evaluation.calibration import recalibrate


def sample(seed: int = 0, n: int = 600, shape: tuple[int, int] = (3, 2)) -> tuple[Tensor, Tensor, Tensor]:
    """Scores [N, L, K] that tell of the targets more or less and are too sure of it, targets and valid [N, K]."""
    random = torch.Generator().manual_seed(seed)
    targets = torch.rand(n, shape[1], generator=random) < 0.2
    strength = torch.tensor([0.5, 1.0, 4.0])[: shape[0], None]
    scores = 3 * (strength * targets[:, None] + torch.randn(n, *shape, generator=random)) - 7
    return scores, targets, torch.rand(n, shape[1], generator=random) < 0.8


def by_sklearn(scores: Tensor, targets: Tensor, valid: Tensor, i: int, k: int) -> tuple[float, float]:
    """The slope and the offset of one probe."""
    v = valid[:, k]
    model = LogisticRegression(C=np.inf, tol=1e-10, max_iter=10_000)
    model.fit(scores[v, i, k].double().numpy()[:, None], targets[v, k].numpy())
    return float(model.coef_[0, 0]), float(model.intercept_[0])


def test_they_are_those_of_a_logistic_regression() -> None:
    given = sample()
    slope, offset = recalibrate(*given)
    assert slope.shape == offset.shape == (3, 2) and slope.dtype == offset.dtype == torch.float64
    for i in range(3):
        for k in range(2):
            a, b = by_sklearn(*given, i, k)
            assert (float(slope[i, k]), float(offset[i, k])) == pytest.approx((a, b), abs=1e-5), (i, k)
    everywhere = recalibrate(given[0], given[1], torch.ones_like(given[2]))
    assert (everywhere[0] - slope).abs().max() > 1e-3  # negative control: with the tokens that are not valid


def test_they_do_not_depend_on_the_probes_beside() -> None:
    scores, targets, valid = sample()
    both = recalibrate(scores, targets, valid)
    alone = recalibrate(scores[:, 1:2], targets, valid)
    for each, own in zip(both, alone, strict=True):
        torch.testing.assert_close(each[1:2], own, atol=1e-9, rtol=0)


def test_recalibrated_logits_need_nothing_more() -> None:
    scores, targets, valid = sample(1)
    slope, offset = recalibrate(scores, targets, valid)
    again = recalibrate((slope * scores + offset).float(), targets, valid)
    torch.testing.assert_close(again[0], torch.ones_like(slope), atol=1e-5, rtol=0)
    torch.testing.assert_close(again[1], torch.zeros_like(slope), atol=1e-5, rtol=0)


@pytest.mark.parametrize("change", [lambda x: 1000 * x, lambda x: x / 1000 + 50, lambda x: x.pow(3)])
def test_a_scale_or_an_outlier_does_no_harm(change) -> None:
    """At the optimum the gradient is 0, whatever the scores are like."""
    scores, targets, valid = sample(2)
    scores = change(scores)
    slope, offset = recalibrate(scores, targets, valid)
    for k in range(2):
        v = valid[:, k]
        x = scores[v, :, k].double()
        error = (slope[:, k] * x + offset[:, k]).sigmoid() - targets[v, k, None].double()
        assert error.mean(0).abs().max() < 1e-9 and ((error * x).mean(0) / x.std(0)).abs().max() < 1e-7


def test_a_slope_is_not_negative() -> None:
    scores, targets, valid = sample()
    slope, offset = recalibrate(-scores, targets, valid)
    assert (slope == 0).all()
    for k in range(2):
        rate = targets[valid[:, k], k].double().mean()
        torch.testing.assert_close(offset[:, k], rate.logit().expand(3))
    assert by_sklearn(-scores, targets, valid, 2, 0)[0] < 0  # negative control: it would be


def test_scores_without_a_fit_are_left_as_they_are() -> None:
    """A class that is absent, and classes that the scores part; beside them a probe that has a fit."""
    scores, targets, valid = sample(shape=(2, 2))
    expected = recalibrate(scores, targets, valid)
    scores[:, 0, 0] = targets[:, 0].float() + 0.1 * torch.rand(len(targets))
    parted = recalibrate(scores, targets, valid)
    assert (float(parted[0][0, 0]), float(parted[1][0, 0])) == (1, 0)
    torch.testing.assert_close(parted[0][1], expected[0][1], atol=1e-9, rtol=0)
    scores[:, 0, 0] *= -1  # which parts them the wrong way
    assert float(recalibrate(scores, targets, valid)[0][0, 0]) == 0
    for absent in (torch.zeros_like(targets), torch.ones_like(targets)):
        slope, offset = recalibrate(scores, absent, valid)
        assert (slope == 1).all() and (offset == 0).all()
    slope, offset = recalibrate(scores, targets, torch.zeros_like(valid))
    assert (slope == 1).all() and (offset == 0).all()


def test_scores_that_are_all_the_same_give_the_log_odds() -> None:
    scores, targets, valid = sample(shape=(2, 1))
    scores[:, 0] = 3.0
    slope, offset = recalibrate(scores, targets, valid)
    rate = float(targets[valid[:, 0], 0].double().mean())
    assert float(slope[0, 0]) == 0 and float(offset[0, 0]) == pytest.approx(math.log(rate / (1 - rate)))


def nearly_parted() -> tuple[Tensor, Tensor, Tensor]:
    """Scores that part the classes but for one token."""
    x = torch.cat([torch.linspace(-9, -1, 500), torch.linspace(1, 9, 500)])
    targets = x > 0
    targets[200] = True
    return x[:, None, None], targets[:, None], torch.ones(1000, 1, dtype=torch.bool)


def test_one_error_in_a_thousand_ends_in_a_fit() -> None:
    given = nearly_parted()
    slope, offset = recalibrate(*given)
    assert (float(slope), float(offset)) == pytest.approx(by_sklearn(*given, 0, 0), rel=1e-4, abs=1e-4)


def test_a_fit_of_rare_positives_fails_without_halved_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the log-odds a whole first step goes much too far."""
    random = torch.Generator().manual_seed(0)
    targets = torch.rand(2000, generator=random) < 0.005
    x = torch.randn(2000, generator=random) + 3 * targets
    given = (x[:, None, None], targets[:, None], torch.ones(2000, 1, dtype=torch.bool))
    expected = pytest.approx(by_sklearn(*given, 0, 0), abs=1e-5)
    assert tuple(float(each) for each in recalibrate(*given)) == expected
    monkeypatch.setattr(calibration, "MOST_HALVINGS", 1)
    assert tuple(float(each) for each in recalibrate(*given)) != expected
