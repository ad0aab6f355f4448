"""Weighted sums of logits, beside scikit-learn."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torch.nn.functional import softplus

from streamprobe.evaluation.mixing import RIDGE, mean_loss, mix

NOTHING = (0.0, 0.0, 0.0)


def samples(n: int = 400) -> tuple[Tensor, Tensor]:
    """Three logits of two sums each, and targets that the second one knows."""
    random = torch.Generator().manual_seed(3)
    x = torch.randn(2, 3, n, generator=random) * torch.tensor([1.0, 2.0, 0.5])[:, None] + 0.3
    targets = torch.rand(n, generator=random) < (1.5 * x[0, 1] - 1).sigmoid()
    return x, targets


def test_a_mix_is_the_penalised_logistic_regression_of_the_targets() -> None:
    x, targets = samples()
    found = mix(x, targets, near=NOTHING)
    for own, weight, offset in zip(x.double(), found.weight, found.offset, strict=True):
        model = LogisticRegression(C=1 / (2 * RIDGE), tol=1e-12, max_iter=10_000)
        centred = own - own.mean(1, keepdim=True)
        said = torch.from_numpy(model.fit(centred.T.numpy(), targets.numpy()).decision_function(centred.T.numpy()))
        torch.testing.assert_close(weight @ own + offset, said, atol=1e-5, rtol=1e-5)
    assert found.weight[0, 1] > 3 * found.weight[0, [0, 2]].abs().max()


def test_a_mix_near_other_weights_is_the_least_of_its_penalised_loss() -> None:
    x, targets = samples(60)
    near = torch.tensor([1.0, 0.0, 2.0], dtype=torch.float64)
    found = mix(x, targets, near=near.tolist())
    weight, offset = found.weight[0].clone().requires_grad_(), found.offset[0].clone().requires_grad_()
    logits = weight @ x[0].double() + offset
    loss = softplus(torch.where(targets, -logits, logits)).sum() + RIDGE * (weight - near).square().sum()
    by_weight, by_offset = torch.autograd.grad(loss, [weight, offset])
    # Of centred logits: a step of a weight moves the offset, too.
    assert (by_weight - by_offset * x[0].double().mean(1)).abs().max() < 1e-6 and by_offset.abs() < 1e-6
    few = mix(x[..., :4], torch.tensor([True, False, True, False]), near=near.tolist())
    assert (few.weight - near).norm(dim=1).max() < 2, "little data leave weights where they were"


def test_its_loss_is_that_of_its_sums_and_lower_than_of_any_logit_alone() -> None:
    x, targets = samples()
    found = mix(x, targets, near=NOTHING)
    said = torch.einsum("pm,pmn->pn", found.weight, x.double()) + found.offset[:, None]
    p = said.sigmoid().numpy()
    by_hand = -np.where(targets.numpy(), np.log(p), np.log1p(-p)).mean(1)
    np.testing.assert_allclose(found.loss, by_hand, atol=1e-12)
    assert all(found.loss[0] < mean_loss(x[0, m].double(), targets) for m in range(3))


def test_a_logit_that_is_constant_keeps_its_weight_and_equal_ones_share() -> None:
    x, targets = samples()
    x[0, 0], x[0, 2] = 5.0, x[0, 1]
    weight = mix(x, targets, near=(0.7, 0.0, 0.0)).weight[0]
    assert float(weight[0]) == pytest.approx(0.7) and float(weight[1]) == pytest.approx(float(weight[2]), rel=1e-6)


@pytest.mark.parametrize("value", [True, False])
def test_without_both_classes_the_weights_are_what_they_were_near(value: bool) -> None:
    x, targets = samples()
    found = mix(x, torch.full_like(targets, value), near=(1.0, 0.0, 0.5))
    assert found.weight.tolist() == [[1, 0, 0.5]] * 2 and found.offset.tolist() == [0, 0]


def test_a_mix_that_parts_the_classes_stays_finite() -> None:
    x = torch.tensor([[[-2.0, -1.0, 1.0, 2.0]]])
    found = mix(x, torch.tensor([False, False, True, True]), near=(1.0,))
    assert found.weight.isfinite().all() and 0 < found.weight[0, 0] < 100


def test_noise_beside_a_logit_that_knows_gets_no_weight() -> None:
    x, targets = samples(20_000)
    both = torch.stack([1.5 * x[0, 1] - 1, 3 * torch.randn(20_000, generator=torch.Generator().manual_seed(9))])[None]
    weight = mix(both, targets, near=(1.0, 0.0)).weight[0]
    assert float(weight[0]) == pytest.approx(1, abs=0.05) and float(weight[1]) == pytest.approx(0, abs=0.02)
