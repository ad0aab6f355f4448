"""Probes of a running mean, beside loops over the formula."""

import pytest
import torch
from looking_back import chains_of, in_pieces, logits_before_a_change
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from torch import Tensor

from streamprobe.probes.ema import EmaScorer, MeanState, running_mean

L, K, D = 2, 3, 11
LENGTHS = [150, 37, 1, 64, 200]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def loop(x: Tensor, half_life: float) -> Tensor:
    """m_t [T, ...] by its definition, float64."""
    a = 2 ** (-1 / half_life)
    means = []
    for t in range(len(x)):
        weights = [a ** (t - s) for s in range(t + 1)]
        means.append(torch.tensor(weights, dtype=torch.float64) @ x[: t + 1].double().flatten(1) / sum(weights))
    return torch.stack(means).view(x.shape)


def scorer(half_life: float = 16) -> EmaScorer:
    return EmaScorer(drawn(L, K, D, seed=1), drawn(L, K, seed=2), half_life)


@pytest.mark.parametrize("half_life", [0.5, 16, 300])
def test_logits_are_those_of_the_formula(half_life: float) -> None:
    acts = drawn(sum(LENGTHS), L, D)
    own = scorer(half_life)
    means = torch.cat([loop(x, half_life) for x in acts.split(LENGTHS)])
    expected = torch.einsum("nld,lkd->nlk", means, own.weight.double()) + own.bias
    found = own(acts, chains_of(LENGTHS))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-5)
    assert (scorer(half_life * 2)(acts, chains_of(LENGTHS)) - expected).abs().max() > 1e-2  # negative control


@pytest.mark.parametrize("seed", range(3))
def test_pieces_of_chains_give_the_logits_of_whole_ones(seed: int) -> None:
    acts = drawn(sum(LENGTHS), L, D)
    whole = scorer()(acts, chains_of(LENGTHS))
    torch.testing.assert_close(in_pieces(scorer, acts, LENGTHS, seed), whole, rtol=1e-6, atol=1e-6)


def test_pieces_fail_without_a_state() -> None:
    acts = drawn(sum(LENGTHS), L, D)
    whole = scorer()(acts, chains_of(LENGTHS))
    alone = torch.cat([scorer()(acts[i : i + 1], torch.tensor([0])) for i in range(len(acts))])
    assert (alone - whole).abs().max() > 0.1


@pytest.mark.parametrize("at", [2, 30, 64, 140])
def test_no_logit_depends_on_a_later_token(at: int) -> None:
    before, after = logits_before_a_change(scorer, drawn(sum(LENGTHS), L, D), LENGTHS, at)
    assert before.equal(after) and len(before)


@pytest.mark.parametrize("half_life", [2, 16])
def test_running_means_of_features_are_those_of_the_formula(half_life: float) -> None:
    x = drawn(3, 201, D)
    support = torch.rand(3, 201, generator=torch.Generator().manual_seed(3)) < 0.8
    support[0, :90] = False  # the problem
    poisoned = torch.where(support[..., None], x, torch.nan)
    found = running_mean(poisoned, support, half_life).values
    for own, expected, asked in zip(found, x, support, strict=True):
        torch.testing.assert_close(own[asked].double(), loop(expected[asked], half_life), rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [[1] * 40 + [161], [64, 64, 73], [100, 1, 100], [5, 190, 6]])
def test_chunks_of_features_give_the_means_of_the_whole(sizes: list[int], dtype: torch.dtype) -> None:
    x, support = drawn(2, 201, D).to(dtype), torch.rand(2, 201, generator=torch.Generator().manual_seed(3)) < 0.8
    whole, state, found = running_mean(x, support, 16), None, []
    for own, asked in zip(x.split(sizes, 1), support.split(sizes, 1), strict=True):
        values, state = running_mean(own, asked, 16, state)
        found.append(values)
    torch.testing.assert_close(torch.cat(found, 1), whole.values, rtol=0, atol=1e-6)
    assert isinstance(state, MeanState)
    torch.testing.assert_close(tuple(state), tuple(whole.state), rtol=1e-6, atol=1e-6)
    lost = running_mean(x[:, 64:], support[:, 64:], 16).values  # negative control: a state that is not carried over
    assert (lost - whole.values[:, 64:]).abs().max() > 0.1


def test_the_scorer_is_a_linear_probe_of_running_means() -> None:
    acts, own = drawn(sum(LENGTHS), L, D), scorer()
    padded = torch.nn.utils.rnn.pad_sequence(list(acts.split(LENGTHS)), batch_first=True)
    support = torch.arange(padded.shape[1]) < torch.tensor(LENGTHS)[:, None]
    means = torch.stack([running_mean(padded[:, :, i], support, 16).values[support] for i in range(L)], 1)
    expected = torch.einsum("nld,lkd->nlk", means, own.weight) + own.bias
    torch.testing.assert_close(own(acts, chains_of(LENGTHS)), expected, rtol=1e-5, atol=1e-5)


def test_a_planted_mean_is_found_in_means_and_fails_without_them() -> None:
    """The event is a shift of one feature by less than a sixth of what it varies from token to token."""
    x = drawn(200, 120, D, seed=5)
    events = (torch.arange(200) % 2 == 0)[:, None].expand(-1, 60)
    x[..., 0] += torch.where(events[:, :1], 0.15, -0.15)
    means = running_mean(x, torch.ones(x.shape[:2], dtype=torch.bool), 16).values
    aurocs = {}
    for name, features in {"mean": means[:, 60:], "token": x[:, 60:]}.items():
        probe = LogisticRegression().fit(features[:100].flatten(0, 1), events[:100].flatten())
        aurocs[name] = roc_auc_score(events[100:].flatten(), probe.decision_function(features[100:].flatten(0, 1)))
    assert aurocs["mean"] > 0.9 and aurocs["token"] < 0.6, aurocs
