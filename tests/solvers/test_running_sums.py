"""Running sums and their merge against numpy and plain sums."""

from itertools import product

import numpy as np
import pytest
import torch
from demo_tokens import Tokens, chunks, demo_problem, weights
from torch import Tensor

from streamprobe.solvers.running_sums import Grams, Moments, first_scaling, with_one


def numbers(offset: float, n: int = 500) -> Tensor:
    """Float64 features [N, 3, 4] of unlike scale, on top of an offset."""
    random = torch.Generator().manual_seed(0)
    return offset + torch.randn(n, 3, 4, dtype=torch.float64, generator=random) * torch.linspace(0.1, 5, 4)


@pytest.mark.parametrize("offset", [0.0, 1e6])
@pytest.mark.parametrize("sizes", [[500], [1] * 20 + [480], [100, 150, 250], [499, 1]])
def test_moments_of_shards_are_numpys_of_the_whole(offset: float, sizes: list[int]) -> None:
    x = numbers(offset)
    shards = [Moments(3, 4).add(part) for part in x.split(sizes)]
    streamed, merged, backwards = Moments(3, 4), Moments(3, 4), Moments(3, 4)
    for part, shard in zip(x.split(sizes), shards, strict=True):
        streamed.add(part)
        merged.merge(shard)
    for shard in reversed(shards):
        backwards.merge(shard)
    for moments in (streamed, merged, backwards):
        assert moments.n == 500
        np.testing.assert_allclose(moments.mean, x.numpy().mean(0), rtol=1e-14, atol=1e-13)
        np.testing.assert_allclose(moments.std, x.numpy().std(0), rtol=1e-9 if offset else 1e-13)


def test_a_deviation_under_a_large_offset_fails_without_the_merge() -> None:
    """A sum of squares loses it."""
    x = numbers(1e6)
    naive = (x.square().mean(0) - x.mean(0).square()).clamp_min(0).sqrt()
    assert (naive / x.std(0, correction=0) - 1).abs().max() > 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_moments_take_any_float(dtype: torch.dtype) -> None:
    x = numbers(2.0).to(dtype)
    moments = Moments(3, 4).add(x)
    np.testing.assert_allclose(moments.mean, x.double().numpy().mean(0), rtol=1e-13)
    np.testing.assert_allclose(moments.std, x.double().numpy().std(0), rtol=1e-13)


def naive(tokens: Tokens, mean: Tensor, scale: Tensor, p: Tensor, i: int, k: int) -> Tensor:
    """The Gram [E, E] of column k's valid tokens in layer i, in float64."""
    x = torch.nn.functional.pad((tokens.acts[:, i].double() - mean[i]) / scale[i], (0, 1), value=1.0)
    weight = tokens.valid[:, k] * torch.where(tokens.targets[:, k], p[k].double(), 1.0)
    return (x * weight[:, None]).T @ x


@pytest.mark.parametrize("shared", [False, True])
def test_grams_are_the_plain_sums_and_shards_merge(shared) -> None:
    """Each shard has the scaling of its own first chunk; what is merged is what one stream sums."""
    tokens = demo_problem().tokens
    p, parts = weights(tokens), list(chunks(tokens, 1500))
    one, left, right = (Grams(*first_scaling(part.acts), p, shared) for part in (parts[0], parts[0], parts[2]))
    for number, part in enumerate(parts):
        for grams in (one, left if number < 2 else right):
            grams.add(with_one(part.acts, grams.mean, grams.scale), part.targets, part.valid)
    assert not torch.equal(left.mean, right.mean)
    alone = left.curvature(0, 0, left.mean.double(), left.scale.double()).clone()
    left.merge(right)
    mean, scale = one.final_scaling()
    x = tokens.acts.double()
    torch.testing.assert_close(mean, x.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(scale, x.std(0, correction=0), rtol=1e-5, atol=0)
    for merged, single in zip(left.final_scaling(), (mean, scale), strict=True):
        torch.testing.assert_close(merged, single, rtol=1e-6, atol=1e-6)
    for i, k in product(range(2), range(6)):
        expected = naive(tokens, mean, scale, p, i, k)
        if shared:
            expected = torch.stack([naive(tokens, mean, scale, p, i, j) for j in range(6)]).mean(0)
        bound = 1e-5 * float(expected.diagonal().max())
        assert float((one.curvature(i, k, mean, scale) - expected).abs().max()) < bound
        assert float((left.curvature(i, k, mean, scale) - expected).abs().max()) < bound
    assert float((alone - left.curvature(0, 0, left.mean.double(), left.scale.double())).abs().max()) > 10 * bound
