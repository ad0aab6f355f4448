"""Small networks and squares: what they add to logits, in any space, for own and shared tokens, and over folds."""

from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from streamprobe.probes import network, quadratic

L, K, N, D, H, F = 2, 3, 11, 5, 4, 2


def parts_of(kind: ModuleType, n_columns: int = K) -> dict[str, Tensor]:
    """Parts of which each number is drawn."""
    random = torch.Generator().manual_seed(1)
    start = network.start(L, range(n_columns), D, width=H, seed=0) | (
        {"bias": torch.zeros(L, n_columns)} if kind is quadratic else {}
    )
    return {name: torch.randn(part.shape, generator=random).double() for name, part in start.items()}


def features() -> Tensor:
    return torch.randn(L, N, D, generator=torch.Generator().manual_seed(2)).double()


def alone(kind: ModuleType, parts: dict[str, Tensor], x: Tensor, at: tuple[int, int]) -> Tensor:
    """What one probe adds [N], by torch's own layers."""
    inner, outer = nn.Linear(D, H).double(), nn.Linear(H, 1, bias=False).double()
    with torch.no_grad():
        inner.weight.copy_(parts["inner"][at])
        inner.bias.copy_(parts["inner_bias"][at])
        outer.weight.copy_(parts["outer"][at])
        if kind is network:
            return outer(inner(x).relu())[:, 0]
        return outer(inner(x) ** 2)[:, 0] - parts["outer"][at].sum() + parts["bias"][at]


KINDS = pytest.mark.parametrize("kind", [network, quadratic], ids=["network", "quadratic"])


@KINDS
def test_a_residual_is_that_of_torchs_layers_for_own_and_shared_tokens(kind: ModuleType) -> None:
    parts, x = parts_of(kind), features()
    shared, own = kind.residual(parts, x), kind.residual(parts, x[:, None].expand(-1, K, -1, -1))
    assert shared.shape == (L, K, N)
    for site in range(L):
        for k in range(K):
            expected = alone(kind, parts, x[site], (site, k))
            for found in (shared[site, k], own[site, k]):
                torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@KINDS
@pytest.mark.parametrize("n_scales", [1, K])
def test_raw_parts_say_the_same_of_raw_features(kind: ModuleType, n_scales: int) -> None:
    parts, raw = parts_of(kind), features() * 3 + 7
    mean, scale = raw.mean(1), torch.rand(L, n_scales, D).double() + 0.5
    x = (raw[:, None] - mean[:, None, None]) / scale[:, :, None]
    expected = kind.residual(parts, x.expand(-1, K, -1, -1))
    torch.testing.assert_close(kind.residual(kind.to_raw(parts, mean, scale), raw), expected, rtol=0, atol=1e-10)
    assert (kind.residual(parts, raw) - expected).abs().max() > 1e-3  # negative control: as they are


@KINDS
def test_the_mean_of_folds_says_the_mean_of_what_they_say(kind: ModuleType) -> None:
    parts, x = parts_of(kind, F * K), features()
    expected = kind.residual(parts, x).unflatten(1, (F, K)).mean(1)
    means = kind.mean_of_folds(parts, F)
    assert means["inner"].shape == (L, K, F * H, D)
    torch.testing.assert_close(kind.residual(means, x), expected, rtol=0, atol=1e-12)


@KINDS
def test_the_mean_of_folds_fails_without_their_order(kind: ModuleType) -> None:
    parts, x = parts_of(kind, F * K), features()
    by_column = kind.residual(parts, x).unflatten(1, (K, F)).mean(2)
    assert (kind.residual(kind.mean_of_folds(parts, F), x) - by_column).abs().max() > 1e-3


def test_a_start_adds_nothing_and_depends_on_seed_and_column_alone() -> None:
    some, all_of_them = (network.start(L, columns, 100, width=H, seed=5) for columns in ([2], range(K)))
    other = network.start(L, [2], 100, width=H, seed=6)
    for name, part in some.items():
        assert torch.equal(part[:, 0], all_of_them[name][:, 2])
    assert not torch.equal(some["inner"], other["inner"])
    assert not torch.equal(all_of_them["inner"][:, 0], all_of_them["inner"][:, 1])
    for drawn in (some["inner"], some["inner_bias"]):
        assert drawn.abs().max() <= 0.1 and drawn.abs().max() > 0.05
    assert not network.residual(some, torch.randn(L, N, 100)).any()
    assert not quadratic.residual(quadratic.start(torch.randn(L, K, H, D)), torch.randn(L, N, D)).any()
