"""What is set for a device is set back, and numbers that arrive later are those that were sent."""

from collections.abc import Iterator

import pytest
import torch
from fake_device import DEVICE, fake_cuda

from streamprobe.errors import out_of_memory
from streamprobe.system.hardware import Arriving, coarse_float32, exact_float32


def precisions() -> tuple[str, str]:
    return torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.fp32_precision


@pytest.fixture
def rounding() -> Iterator[None]:
    """TF32 is on."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = precisions()
    matmul.fp32_precision = cudnn.fp32_precision = "tf32"
    yield
    matmul.fp32_precision, cudnn.fp32_precision = before


@pytest.mark.usefixtures("rounding")
def test_products_are_exact_inside_and_as_they_were_behind_also_after_an_error() -> None:
    @exact_float32()
    def found() -> tuple[str, str]:
        return precisions()

    assert found() == found() == ("ieee", "ieee") and precisions() == ("tf32", "tf32")
    with pytest.raises(KeyError), exact_float32():
        raise KeyError
    assert precisions() == ("tf32", "tf32")


@pytest.mark.usefixtures("rounding")
def test_coarse_products_end_with_their_context_within_exact_ones() -> None:
    cpu = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = cpu.fp32_precision
    with exact_float32():
        with coarse_float32():
            assert precisions() == ("tf32", "tf32") and cpu.fp32_precision == "bf16"
        assert precisions() == ("ieee", "ieee") and cpu.fp32_precision == "ieee"
    assert precisions() == ("tf32", "tf32") and cpu.fp32_precision == before


@pytest.mark.usefixtures("rounding")
def test_products_round_without_it() -> None:
    assert precisions() == ("tf32", "tf32")


def test_a_number_of_a_device_arrives_without_a_wait() -> None:
    assert Arriving(torch.tensor(True)).get() is True
    with fake_cuda() as device:
        number = torch.arange(4, device=DEVICE).sum()
        assert Arriving(number).get() == 6 and not device.waits
        assert number.item() == 6 and device.waits  # negative control


@pytest.mark.parametrize(
    ("said", "is_memory"),
    [
        ("cusolver error: CUSOLVER_STATUS_INTERNAL_ERROR, when calling `cusolverDnCreate(handle)`", True),
        ("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnXpotrf(...)`", True),
        ("CUDA error: out of memory", True),  # of pinned memory, too
        ("cusolver error: CUSOLVER_STATUS_INVALID_VALUE, when calling `cusolverDnXpotrf(...)`", False),
    ],
)
def test_what_libraries_say_when_memory_runs_out(said: str, is_memory: bool) -> None:
    assert out_of_memory(RuntimeError(said)) is is_memory
