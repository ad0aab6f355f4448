"""How much memory is there to use: of a device, or of the host less what its container may not have."""

from pathlib import Path

import psutil
import torch

CGROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")


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
