"""Running sums, their merge and their affine maps against numpy and plain sums."""

import numpy as np
import pytest
import torch
from torch import Tensor

from streamprobe.solvers.running_sums import Moments, mapped, mapped_vector


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


def test_mapped_sums_are_the_sums_of_mapped_features() -> None:
    random = torch.Generator().manual_seed(0)
    x, r = torch.randn(50, 4, dtype=torch.float64, generator=random), torch.rand(50, generator=random).double()
    d, c = torch.tensor([2.0, 0.5, 1.0, 3.0]).double(), torch.tensor([0.0, 1.0, -1.0, 2.0]).double()
    before, after = (torch.nn.functional.pad(own, (0, 1), value=1.0) for own in (x, d * x + c))
    torch.testing.assert_close(mapped_vector(r @ before, d, c), r @ after)
    torch.testing.assert_close(mapped((before.T * r) @ before, d, c), (after.T * r) @ after)
    assert (mapped((before.T * r) @ before, d, 0 * c) - (after.T * r) @ after).abs().max() > 1  # without the offset
