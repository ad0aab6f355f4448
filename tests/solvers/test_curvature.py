"""Drawn tokens, Grams and their factors against plain sums."""

import numpy as np
import pytest
import torch
from torch import Tensor

from streamprobe.solvers import curvature
from streamprobe.solvers.curvature import DrawnTokens, Features, Grams, Place, draw, factorise

N, L, D = 3000, 2, 6
PLACES = [Place(0, 0), Place(0, 2), Place(1, 1)]


def acts(offset: float = 0.0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Activations [N, L, D] of unlike scale on top of an offset."""
    random = torch.Generator().manual_seed(0)
    return (offset + torch.randn(N, L, D, generator=random) * torch.linspace(0.1, 5, D)).to(dtype)


def bends() -> Tensor:
    """What each token counts at the places, [P, N]: most tokens little, and one place nothing at all of its first."""
    random = torch.Generator().manual_seed(1)
    found = torch.rand(3, N, generator=random) ** 8
    found[2, : N // 2] = 0
    return found


def plain_sum(x: Tensor, counts: Tensor, layer: int) -> Tensor:
    """The sum of counts [x, 1] [x, 1]' over tokens in float64, [E, E]."""
    rows = torch.nn.functional.pad(x[:, layer].double(), (0, 1), value=1.0)
    return (rows * counts.double()[:, None]).T @ rows


def all_sums(x: Tensor, counts: Tensor, parts: int) -> list[Tensor]:
    drawn = DrawnTokens(PLACES, torch.zeros(L, D))
    for own, several in zip(x.chunk(parts), counts.chunk(parts, dim=1), strict=True):
        drawn.add(own, several)
    drawn.settle()
    return [drawn.sums.take(place) for place in PLACES]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_features_are_centred_with_a_one_behind(dtype: torch.dtype) -> None:
    features, x, mean = Features(), acts(3.0, dtype), torch.linspace(1, 3, D)
    for n in (100, 40, N):  # whatever was in the room before
        found = features.of(x[:n, 1], mean)
        torch.testing.assert_close(found[:, :-1], x[:n, 1].float() - mean)
        assert (found[:, -1] == 1).all() and found.shape == (n, D + 1)
        found.zero_()


@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_the_scaling_is_numpys(offset: float) -> None:
    x = acts(offset)
    grams, features = Grams(x[:100].mean(0)), Features()
    for part in x.split(700):
        for i in range(L):
            grams.add(i, features.of(part[:, i], grams.centre[i]))
    mean, std = grams.scaling()
    assert grams.n == N
    np.testing.assert_allclose(mean, x.double().mean(0), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(std[:, 0], x.double().numpy().std(0), rtol=1e-5)


def test_the_scaling_fails_without_a_centre() -> None:
    x = acts(1e4)
    grams = Grams(torch.zeros(L, D))
    grams.add(0, Features().of(x[:, 0], grams.centre[0]))
    assert (grams.scaling()[1][0, 0] / x[:, 0].double().std(0) - 1).abs().max() > 1e-3


@pytest.mark.parametrize("value", [0.0, 3.3, 1e4])
def test_a_constant_feature_is_left_at_its_scale(value: float) -> None:
    x = acts()
    x[:, 0, 2] = value
    grams = Grams(x[:10].mean(0) * (1 + 1e-7))
    grams.add(0, Features().of(x[:, 0], grams.centre[0]))
    std = grams.scaling()[1][0, 0]
    assert std[2] == 1 and (std[[0, 1, 3, 4, 5]] != 1).all()


@pytest.mark.parametrize("parts", [1, 7])
@pytest.mark.parametrize("held", [0, 2**29], ids=["settled at once", "settled at the end"])
def test_drawn_tokens_are_the_plain_sum_of_what_counts(parts: int, held: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curvature, "HELD_BYTES", held)
    x, counts = acts(), bends()
    for place, number, found in zip(PLACES, range(3), all_sums(x, counts, parts), strict=True):
        expected = plain_sum(x, counts[number], place.layer)
        assert (found - expected).abs().max() < 1e-2 * expected.diagonal().max()  # factors may be rounded to bfloat16
        torch.linalg.cholesky(found.double() + 1e-6 * torch.eye(D + 1))  # and yet it is definite


def test_the_plain_sum_fails_without_what_tokens_count() -> None:
    x, counts = acts(), bends()
    found = all_sums(x, (counts > 0).float(), 1)[0]
    assert (found - plain_sum(x, counts[0], 0)).abs().max() > 0.5 * found.diagonal().max()


def test_draws_are_as_many_as_asked_and_right_on_average() -> None:
    found, random = bends(), torch.Generator().manual_seed(2)
    rate = 300 / found.sum(1)
    draws = torch.stack([draw(found, rate, torch.rand(N, generator=random)) for _ in range(400)])
    drawn = (draws > 0).float().sum(2).mean(0)
    certain = (found * rate[:, None]).clamp(max=1).sum(1)
    torch.testing.assert_close(drawn, certain, rtol=0.02, atol=0)
    torch.testing.assert_close(draws.sum(2).mean(0), found.sum(1), rtol=0.02, atol=0)
    uniform = torch.stack([found * (torch.rand(N, generator=random) < 300 / N) * N / 300 for _ in range(400)])
    assert (uniform.sum(2).std(0) > 2 * draws.sum(2).std(0)).all()  # without regard to curvature it varies more


def test_draws_are_wrong_on_average_without_their_weights() -> None:
    found, random = bends(), torch.Generator().manual_seed(2)
    rate = 300 / found.sum(1)
    kept = torch.stack([found * (torch.rand(N, generator=random) < found * rate[:, None]) for _ in range(50)])
    assert (kept.sum(2).mean(0) / found.sum(1) < 0.8).all()


def test_where_nothing_bends_nothing_is_drawn() -> None:
    nothing = draw(torch.zeros(1, 5), torch.tensor([torch.inf]), torch.rand(5))
    assert torch.equal(nothing, torch.zeros(1, 5))


def test_what_is_no_number_is_not_drawn() -> None:
    assert torch.equal(
        draw(torch.tensor([[torch.nan, 1.0]]), torch.tensor([2.0]), torch.zeros(2))[0], torch.tensor([0.0, 1.0])
    )


def test_factors_give_the_matrices_back() -> None:
    matrices = [plain_sum(acts(), bends()[number], 0).float() for number in (0, 1)]
    factors, missing = factorise([matrix.clone() for matrix in matrices])
    assert missing is None
    for matrix, factor in zip(matrices, factors, strict=True):
        torch.testing.assert_close(factor @ factor.T, matrix, rtol=1e-4, atol=1e-3)


def test_features_that_say_the_same_have_a_factor() -> None:
    x = acts()[:, 0]
    matrix = torch.cat([x, x], 1).T @ torch.cat([x, x], 1)
    assert torch.linalg.cholesky_ex(matrix)[1]
    factors, missing = factorise([torch.eye(2 * D), matrix.clone()])
    assert missing is None
    torch.testing.assert_close(factors[1] @ factors[1].T, matrix, rtol=1e-3, atol=1)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_has_no_factor(value: float) -> None:
    assert factorise([torch.eye(3), torch.eye(3) * value, torch.eye(3)])[1] == 1


def test_no_matrices_have_no_factors() -> None:
    assert factorise([]) == ([], None)
