"""Sums of matrices: the plain sum, half of it kept where it is large, whatever the order of what is added."""

import pytest
import torch
from torch import Tensor

from streamprobe.solvers import matrix_sums
from streamprobe.solvers.matrix_sums import MatrixSums, SquareSums, kept_numbers, panels_of

CPU = torch.device("cpu")


def parts(size: int, n: int = 6) -> list[Tensor]:
    return list(torch.randn(n, 40, size, generator=torch.Generator().manual_seed(size)))


@pytest.mark.parametrize("size", [1, 5, 20, 21, 35, 64])
def test_a_sum_is_the_plain_one_whatever_is_kept_of_it(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix_sums, "PANEL", 10)
    sums, given = SquareSums(size, CPU), parts(size)
    for x in given:
        sums.add("a", x)
        sums.add("b", 2 * x)
    plain = sum(x.double().T @ x.double() for x in given)
    a, b = sums.take("a"), sums.take("b")
    assert a is not None and b is not None and a.dtype == torch.float64 and torch.equal(a, a.T)
    torch.testing.assert_close(a, plain, rtol=1e-2, atol=0.5)  # factors may be bfloat16
    torch.testing.assert_close(b, 4 * a, rtol=1e-5, atol=1e-5)
    nothing = sums.take("c")
    assert nothing is not None and not nothing.any() and not sums.kept


@pytest.mark.parametrize("size", [20, 35])
def test_the_order_of_what_is_added_is_not_seen(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix_sums, "PANEL", 10)
    found = []
    for order in (parts(size), parts(size)[::-1]):
        sums = SquareSums(size, CPU)
        for x in order:
            sums.add(0, x)
        found.append(sums.of(0))
    assert (found[0] - found[1]).abs().max() < 1e-12
    single = [sum((x.T @ x for x in order), torch.zeros(size, size)) for order in (parts(size), parts(size)[::-1])]
    assert (single[0] - single[1]).abs().max() > 1e-7  # negative control: sums in float32


def test_half_of_a_large_matrix_is_kept() -> None:
    assert kept_numbers(577) == 577**2 and kept_numbers(1024) == 1024**2
    assert 0.5 < kept_numbers(4097) / 4097**2 < 0.57
    for size in (1, 1024, 1025, 4097, 16_385):
        rows = panels_of(size)
        assert [r for part in rows for r in range(part.start, part.stop)] == list(range(size))
    sums = SquareSums(4, CPU)
    sums.add_matrix(0, torch.eye(4))
    assert torch.equal(sums.whole(sums.of(0)), torch.eye(4, dtype=torch.float64))


def test_sums_of_another_shape() -> None:
    sums = MatrixSums((2, 3), CPU)
    for n in (1.0, 2.0):
        sums.add("x", torch.full((2, 3), n))
    x, nothing = sums.take("x", 0), sums.take("y", 0)
    assert x is not None and x.dtype == torch.float64 and (x == 3).all() and nothing is not None and not nothing.any()
