"""The scaling of features and affine maps of sums, against numpy and plain sums."""

import numpy as np
import pytest
import torch

from streamprobe.solvers.scaling import first_scaling, mapped_vector, shifted


@pytest.mark.parametrize("offset", [0.0, 1e6])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_first_scaling_is_numpys(dtype: torch.dtype, offset: float) -> None:
    random = torch.Generator().manual_seed(0)
    x = (offset * (dtype == torch.float32) + torch.randn(500, 3, 4, generator=random) * torch.linspace(0.1, 5, 4)).to(
        dtype
    )
    x[:, 1, 2] = 7
    mean, std = first_scaling(x)
    expected = x.double().numpy().std(0)
    expected[1, 2] = 1  # a constant
    np.testing.assert_allclose(mean, x.double().numpy().mean(0), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(std, expected, rtol=1e-6)


def test_a_deviation_under_a_large_offset_fails_without_float64() -> None:
    x = 1e6 + torch.randn(500, 3, 4, generator=torch.Generator().manual_seed(0))
    naive = (x.square().mean(0) - x.mean(0).square()).clamp_min(0).sqrt()
    assert (naive / first_scaling(x)[1] - 1).abs().max() > 0.1


def test_mapped_sums_are_the_sums_of_mapped_features() -> None:
    random = torch.Generator().manual_seed(0)
    x, r = torch.randn(50, 4, dtype=torch.float64, generator=random), torch.rand(50, generator=random).double()
    d, c = torch.tensor([2.0, 0.5, 1.0, 3.0]).double(), torch.tensor([0.0, 1.0, -1.0, 2.0]).double()
    before, after = (torch.nn.functional.pad(own, (0, 1), value=1.0) for own in (x, d * x + c))
    torch.testing.assert_close(mapped_vector(r @ before, d, c), r @ after)
    assert (mapped_vector(r @ before, d, 0 * c) - r @ after).abs().max() > 1  # without the offset


def test_a_shifted_gram_is_that_of_shifted_features() -> None:
    random = torch.Generator().manual_seed(0)
    x, r = torch.randn(50, 4, dtype=torch.float64, generator=random), torch.rand(50, generator=random).double()
    c = torch.tensor([0.0, 1.0, -1.0, 2.0]).double()
    before, after = (torch.nn.functional.pad(own, (0, 1), value=1.0) for own in (x, x + c))
    gram, expected = (before.T * r) @ before, (after.T * r) @ after
    torch.testing.assert_close(shifted(gram, c), expected)
    assert (shifted(gram, -c) - expected).abs().max() > 1
