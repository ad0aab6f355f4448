"""A device and its host: how much memory there is to use, exact float32, and numbers that the host does not wait for.

Of the host's memory only what its container may have counts.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

CGROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")


class Arriving:
    """Numbers of a device on their way to the host, which waits for what was asked of the device before, not after."""

    def __init__(self, numbers: Tensor):
        """`numbers` of any shape."""
        self.numbers = numbers.to("cpu", non_blocking=True)
        self.there = torch.cuda.current_stream(numbers.device).record_event() if numbers.is_cuda else None

    def get(self) -> Any:
        """The numbers themselves: a list, or what is in it where there is one."""
        if self.there is not None:
            self.there.synchronize()
        return self.numbers.tolist()


def send(x: Tensor, device: torch.device) -> Tensor:
    """x on `device`, by a copy that the host does not wait for."""
    pinned = device.type == "cuda" and x.device.type == "cpu"
    return (x.pin_memory() if pinned else x).to(device, non_blocking=True)


@contextmanager
def _float32_products(cpu: str, cuda: str) -> Iterator[None]:
    """How products of float32 matrices are computed here, in the words of torch's `fp32_precision`."""
    backends: Any = torch.backends
    wanted = [(backends.mkldnn.matmul, cpu), (backends.cuda.matmul, cuda), (backends.cudnn, cuda)]
    before = [backend.fp32_precision for backend, _ in wanted]
    try:
        for backend, precision in wanted:
            backend.fp32_precision = precision
        yield
    finally:
        for (backend, _), precision in zip(wanted, before, strict=True):
            backend.fp32_precision = precision


@contextmanager
def exact_float32() -> Iterator[None]:
    """Products of float32 numbers are computed in float32 here, also where an environment lets them be rounded."""
    with _float32_products(cpu="ieee", cuda="ieee"):
        yield


@contextmanager
def coarse_float32() -> Iterator[None]:
    """Factors of products are rounded to bfloat16 or TF32 here where that is faster; sums are float32."""
    with _float32_products(cpu="bf16", cuda="tf32"):
        yield


def free_bytes(device: torch.device) -> int:
    """Bytes of `device` that this process may still fill; for the CPU at most what its control group leaves."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free
    free, left = psutil.virtual_memory().available, container_bytes()
    return free if left is None else min(free, left)


def container_bytes() -> int | None:
    """Bytes that the control groups of this process (a container, a batch job, `systemd-run -p MemoryMax=`) leave it.

    The least over the group and all above it, cgroup v1 or v2; a page cache that can be dropped counts as free.  None
    where no group has a limit, or the system has no control groups.
    """
    try:
        lines = MEMBERSHIP.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    left = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            root, limit, usage, cache = "memory", "limit_in_bytes", "usage_in_bytes", "total_inactive_file"
        elif not controllers:
            root, limit, usage, cache = "", "max", "current", "inactive_file"
        else:
            continue
        group = CGROUPS / root / path.lstrip("/")
        for folder in (group, *group.parents):
            if not folder.is_relative_to(CGROUPS):
                break
            left.append(_left_in(folder, limit, usage, cache))
    known = [n for n in left if n is not None]
    return min(known) if known else None


def _left_in(folder: Path, limit: str, usage: str, cache: str) -> int | None:
    """Limit less usage of one control group, in bytes, not below 0; None where it has no limit."""
    try:
        most = (folder / f"memory.{limit}").read_text(encoding="ascii").strip()
        used = int((folder / f"memory.{usage}").read_text(encoding="ascii"))
        stat = (folder / "memory.stat").read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return None
    if most == "max" or int(most) >= 1 << 60:  # v1 says "no limit" by a number that no machine has
        return None
    reclaimable = int(stat[stat.index(cache) + 1]) if cache in stat else 0
    return max(0, int(most) - used + reclaimable)
