"""Attention over earlier tokens, beside loops over its formula in float64."""

import math

import pytest
import torch
from looking_back import chains_of, in_pieces, logits_before_a_change
from torch import Tensor

from streamprobe.probes import attention
from streamprobe.probes.attention import AttentionScorer

L, K, H, D, S, T = 2, 3, 4, 7, 3, 40
LENGTHS = [90, 37, 1, 64, 120]
SCALE = 1 + torch.arange(L * D).view(L, 1, D) / 10


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def parts(size: float = 1.0) -> dict[str, Tensor]:
    wide = {name: size * drawn(L, K, H, D, seed=seed) for seed, name in enumerate(("query", "value"), 1)}
    return wide | {"pace": drawn(L, K, H, seed=3)}


def decay(pace: Tensor) -> Tensor:
    """p of the paces of heads whose half-lives are 4, 8, 16, ... tokens at the start."""
    return math.log(2) / torch.tensor([4.0 * 2**h for h in range(pace.shape[-1])], dtype=torch.float64) * pace.exp()


def loop(x: Tensor, query: Tensor, value: Tensor, p: Tensor) -> Tensor:
    """The residuals [L, K, T] of a chain x [L, T, D] from the formula."""
    weight = said = torch.zeros_like(p)
    found = []
    for t in range(x.shape[1]):
        e = torch.einsum("lkhd,ld->lkh", query, x[:, t]).exp()
        weight = (-p).exp() * weight + e
        said = (-p).exp() * said + e * torch.einsum("lkhd,ld->lkh", value, x[:, t])
        found.append((said / weight).sum(-1))
    return torch.stack(found, -1)


def loop_of(own: dict[str, Tensor], x: Tensor) -> Tensor:
    every = [loop(x[:, s], own["query"], own["value"], decay(own["pace"])) for s in range(x.shape[1])]
    return torch.stack(every, 2)


def raw() -> dict[str, Tensor]:
    return {name: own.float() for name, own in attention.to_raw(parts(), drawn(L, D, seed=4), SCALE).items()}


def scorer() -> AttentionScorer:
    return AttentionScorer(raw())


def test_residuals_are_those_of_the_formula() -> None:
    x, own = drawn(L, S, T, D), parts()
    found, expected = attention.residual(own, x), loop_of(own, x)
    assert found.shape == (L, K, S, T)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)
    assert not torch.allclose(attention.residual(own | {"pace": own["pace"] + 0.1}, x), expected)  # negative control


def test_derivatives_are_those_of_a_loop() -> None:
    x, weights = drawn(L, S, T, D), drawn(L, K, S, T, seed=9)
    gradients = []
    for residual in (attention.residual, loop_of):
        live = {name: own.requires_grad_() for name, own in parts().items()}
        ((residual(live, x) * weights).sum() + residual(live, x).square().sum()).backward()
        gradients.append([own.grad for own in live.values()])
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)
    assert all(own.abs().max() > 0.1 for own in gradients[0])


def test_derivatives_of_float32_are_much_the_same() -> None:
    x, found = drawn(L, S, T, D), []
    for dtype in (torch.float32, torch.float64):
        live = {name: own.to(dtype).requires_grad_() for name, own in parts(0.3).items()}
        attention.residual(live, x.to(dtype)).square().sum().backward()
        found.append(torch.cat([own.grad.double().flatten() for own in live.values() if own.grad is not None]))
    assert (found[0] - found[1]).norm() < 0.02 * found[1].norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_overflows(dtype: torch.dtype) -> None:
    """Scores of 500 and -500, whose powers of e no float32 holds and float64 does."""
    x = torch.zeros(1, 1, 60, 2, dtype=torch.float64)
    x[..., 0] = 500.0 * (2 * (torch.arange(60) * 7 % 5 % 2) - 1)
    x[..., 1] = drawn(60)
    own = {"query": torch.zeros(1, 1, 2, 2), "value": torch.zeros(1, 1, 2, 2), "pace": torch.zeros(1, 1, 2)}
    own["query"][..., 0], own["value"][..., 1] = 1, 1
    live = {name: part.to(dtype).requires_grad_() for name, part in own.items()}
    found = attention.residual(live, x.to(dtype))
    found.sum().backward()
    expected = loop_of({name: part.double() for name, part in own.items()}, x)
    tolerance = 1e-11 if dtype is torch.float64 else 0.02
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=tolerance)
    assert all(part.grad is not None and part.grad.isfinite().all() for part in live.values())
    scored = AttentionScorer(attention.to_raw(own, torch.zeros(1, 2), torch.ones(1, 1, 2)))
    logits = scored(x[0, 0, :, None].float(), torch.zeros(60, dtype=torch.int64))
    torch.testing.assert_close(logits[:, 0, 0].double(), expected[0, 0, 0], rtol=0, atol=1e-4)


def test_the_formula_in_float32_fails_without_a_logarithm() -> None:
    x = torch.tensor([500.0, -500.0, 500.0]).view(1, 3, 1)
    one = torch.ones(1, 1, 1, 1)
    assert not loop(x, one, one, one[..., 0]).isfinite().all()


def test_the_start_adds_nothing_and_its_heads_differ() -> None:
    own = attention.start(L, K, n_heads=H, n_features=D)
    live = {name: part.requires_grad_() for name, part in own.items()}
    found = attention.residual(live, drawn(L, S, T, D).float())
    assert not found.any()
    found.sum().backward()
    by_value = live["value"].grad
    assert by_value is not None
    assert all(not torch.allclose(by_value[:, :, i], by_value[:, :, i + 1], rtol=1e-2) for i in range(H - 1))


def test_what_comes_behind_changes_nothing() -> None:
    x, own = drawn(L, S, T, D), parts()
    behind = torch.cat([x, 1e3 + drawn(L, S, 9, D, seed=8)], 2)
    torch.testing.assert_close(attention.residual(own, behind)[..., :T], attention.residual(own, x), rtol=0, atol=1e-12)
    before = torch.cat([drawn(L, S, 9, D, seed=8), x], 2)  # negative control
    assert not torch.allclose(attention.residual(own, before)[..., 9:], attention.residual(own, x), atol=0.1)


def test_the_scorer_reads_raw_activations_as_training_reads_standardised_ones() -> None:
    mean, acts = drawn(L, D, seed=4), drawn(sum(LENGTHS), L, D, seed=5)
    standardised = ((acts.transpose(0, 1) - mean[:, None]) / SCALE).split(LENGTHS, 1)
    p = decay(parts()["pace"])
    expected = [loop(x, parts()["query"], parts()["value"], p) for x in standardised]
    found = scorer()(acts.float(), chains_of(LENGTHS))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), torch.cat(expected, 2).permute(2, 0, 1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_pieces_of_chains_give_the_residuals_of_whole_ones(seed: int) -> None:
    acts = drawn(sum(LENGTHS), L, D).float()
    whole = scorer()(acts, chains_of(LENGTHS))
    torch.testing.assert_close(in_pieces(scorer, acts, LENGTHS, seed), whole, rtol=1e-6, atol=2e-6)


def test_pieces_of_chains_fail_without_a_state() -> None:
    acts = drawn(sum(LENGTHS), L, D).float()
    whole = scorer()(acts, chains_of(LENGTHS))
    alone = scorer()(acts, torch.arange(len(acts)))
    assert (alone - whole).abs().max() > 0.1


def test_one_token_of_each_chain_at_a_time_is_a_live_monitor() -> None:
    x = drawn(6, T, L, D).float()
    live, chain = scorer(), torch.tensor([5, 0, 3, 9, 1, 2])
    found = torch.stack([live(x[:, t], chain) for t in range(T)], 1)
    whole = scorer()(x.flatten(0, 1), chain.repeat_interleave(T)).unflatten(0, (6, T))
    torch.testing.assert_close(found, whole, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("at", [2, 30, 36, 64, 100])
def test_no_residual_depends_on_a_later_token(at: int) -> None:
    before, after = logits_before_a_change(scorer, drawn(sum(LENGTHS), L, D).float(), LENGTHS, at)
    assert before.equal(after) and len(before)


def test_residuals_before_a_change_fail_without_causality() -> None:
    def averaged() -> object:
        return lambda acts, chain: scorer()(acts.flip(0), chain.flip(0)).flip(0)

    before, after = logits_before_a_change(averaged, drawn(sum(LENGTHS), L, D).float(), LENGTHS, 30)  # type: ignore[arg-type]
    assert not before.equal(after)


def test_the_mean_of_folds_has_their_mean_residual() -> None:
    acts, own = drawn(sum(LENGTHS), L, D).float(), raw()
    folds = [{name: part * (1 + 0.2 * f) for name, part in own.items()} for f in range(3)]
    stacked = {name: torch.cat([fold[name] for fold in folds], 1) for name in own}
    every = [AttentionScorer(fold)(acts, chains_of(LENGTHS)) for fold in folds]
    found = AttentionScorer(attention.mean_of_folds(stacked, 3))(acts, chains_of(LENGTHS))
    torch.testing.assert_close(found, torch.stack(every).mean(0), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found, every[0], atol=0.01)  # negative control
    single = attention.mean_of_folds(own, 1)
    assert all(single[name].equal(own[name]) for name in own)
