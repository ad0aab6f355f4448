"""Activations that cannot be right are named as they are read, and the host need not wait for it."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from builders import sites_of
from fake_device import DEVICE, fake_cuda
from torch import Tensor

from streamprobe.activations.batch import TokenBatch
from streamprobe.activations.finite import check_finite
from streamprobe.data.tokenize import Chain
from streamprobe.errors import InputError

SITES = sites_of([3, 5, "embed"])
CHAINS: list[Any] = [Chain("x", torch.zeros(1), torch.zeros(1, 1), torch.ones(1))]


def make_batch(acts: Tensor) -> TokenBatch:
    n = len(acts)
    none = torch.empty(n, 0)
    chain, token, fold = torch.zeros(3, n, dtype=torch.int64)
    return TokenBatch(acts, none, none.bool(), none.bool(), chain, token, fold, torch.zeros(n))


def acts(seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(7, 3, 4, generator=torch.Generator().manual_seed(seed)).to(dtype)


def read(*batches: Tensor) -> int:
    """How many batches come through."""
    return sum(1 for _ in check_finite(map(make_batch, batches), CHAINS, SITES))


def with_zeros(site: int, dtype: torch.dtype = torch.float32) -> Tensor:
    x = acts(1, dtype)
    x[:, site] = 0
    return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_layer_that_is_zero_in_a_batch_is_refused(place: int, dtype: torch.dtype) -> None:
    batches = [acts(i, dtype) for i in range(3)]
    batches[place] = with_zeros(1, dtype)
    with pytest.raises(
        InputError, match="^activations that are 0 at all 7 tokens of a batch: layer 5; expected .*--device_map"
    ):
        read(*batches)


def test_the_refusal_fails_without_zeros_in_a_whole_layer() -> None:
    """A token of zeros, numbers whose sums are 0, a control of zeros, a batch without tokens, and one of one token."""
    token, cancelling = acts(), acts()
    token[3, 0] = 0
    cancelling[:, 1] = torch.tensor([1.0, -1.0, 2.0, -2.0])
    assert not cancelling.sum(2)[:, 1].any()
    assert read(token, cancelling, with_zeros(2), acts()[:0], acts()[:1]) == 5


def test_an_infinite_number_is_named_first() -> None:
    x = with_zeros(1)
    x[4, 0, 2] = torch.inf
    with pytest.raises(InputError, match="^activations that are infinite or not numbers: chain 'x', token 0, layer 3;"):
        read(acts(), x)


def test_a_batch_is_judged_when_the_next_is_on_its_way() -> None:
    taken: list[int] = []

    def batches() -> Iterator[TokenBatch]:
        for i, x in enumerate((with_zeros(0), acts())):
            taken.append(i)
            yield make_batch(x)

    looked_through = check_finite(batches(), CHAINS, SITES)
    next(looked_through)
    assert taken == [0]
    with pytest.raises(InputError, match="layer 3"):
        next(looked_through)
    assert taken == [0, 1]


def test_the_host_does_not_wait_for_the_device() -> None:
    with fake_cuda() as fake:
        batches = [make_batch(acts(i).to(DEVICE)) for i in range(3)]
        before = fake.waits.copy()
        for _ in check_finite(iter(batches), CHAINS, SITES):
            pass
        assert not fake.waits - before
        with pytest.raises(InputError, match="layer 3"):
            list(check_finite(iter([make_batch(with_zeros(0).to(DEVICE))]), CHAINS, SITES))
        assert fake.waits - before  # negative control: the closer look waits
