"""The memory of a container or a batch job counts, not that of the machine around it."""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

from streamprobe.errors import InputError
from streamprobe.model.backbone import load_backbone
from streamprobe.model.hooks import read
from streamprobe.system import hardware
from streamprobe.system.console import guard

CPU = torch.device("cpu")
GB = 10**9
NO_LIMIT_V1 = 9223372036854771712


def v2_group(folder: Path, most: int | str, used: int, cache: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{most}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\nfile 7\nactive_file 3\ninactive_file {cache}\nshmem 0\n")


def v1_group(folder: Path, most: int, used: int, cache: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.limit_in_bytes").write_text(f"{most}\n")
    (folder / "memory.usage_in_bytes").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"cache 9\ninactive_file 1\ntotal_inactive_file {cache}\n")


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A made-up tree of control groups, and a machine with 20 GB free."""

    class Memory:
        available = 20 * GB

    monkeypatch.setattr(hardware, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(hardware, "MEMBERSHIP", tmp_path / "membership")
    monkeypatch.setattr(psutil, "virtual_memory", Memory)
    return tmp_path / "cgroup"


def test_cgroup_v2_the_tightest_group_above_counts(root: Path) -> None:
    hardware.MEMBERSHIP.write_text("0::/user.slice/run-1.scope\n")
    v2_group(root / "user.slice" / "run-1.scope", "max", GB, 0)
    v2_group(root / "user.slice", 8 * GB, 3 * GB, GB)  # 6 GB: the page cache can be dropped
    v2_group(root, "max", 9 * GB, 0)
    assert hardware.container_bytes() == hardware.free_bytes(CPU) == 6 * GB


def test_cgroup_v1_in_a_container_that_sees_its_own_group_at_the_root(root: Path) -> None:
    hardware.MEMBERSHIP.write_text("5:cpu:/docker/abc\n4:memory:/docker/abc\n1:name=systemd:/\n0::/\n")
    v1_group(root / "memory", 800 * 10**6, 500 * 10**6, 50 * 10**6)
    assert hardware.free_bytes(CPU) == 350 * 10**6


def test_a_group_over_its_limit_leaves_nothing(root: Path) -> None:
    hardware.MEMBERSHIP.write_text("0::/\n")
    v2_group(root, GB, 2 * GB, 0)
    assert hardware.free_bytes(CPU) == 0


def test_without_a_limit_the_machine_counts(root: Path) -> None:
    """Negative control: groups that set none change nothing, nor does a system that has no groups."""
    assert hardware.free_bytes(CPU) == 20 * GB
    hardware.MEMBERSHIP.write_text("4:memory:/a\n0::/b\n")
    v1_group(root / "memory" / "a", NO_LIMIT_V1, GB, 0)
    v2_group(root / "b", "max", GB, 0)
    assert hardware.container_bytes() is None
    assert hardware.free_bytes(CPU) == 20 * GB


def test_of_a_device_its_driver_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (20 * GB, 80 * GB))
    assert hardware.free_bytes(torch.device("cuda")) == 20 * GB


def test_a_model_that_does_not_fit_is_refused_before_its_weights_are_read(
    model_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = load_backbone(model_dir, [3], "float32", device_map="cpu")
    needed = sum(p.nbytes for p in load_backbone(model_dir, [1], "float32", device_map="cpu").parameters())
    assert needed < sum(p.nbytes for p in whole.parameters())
    monkeypatch.setattr("streamprobe.model.backbone.free_bytes", lambda device: needed)
    load_backbone(model_dir, [1], "float32", device_map="cpu")  # negative control: it fits to the byte
    with pytest.raises(InputError, match="whose first 3 blocks take .* GB while they are read; expected at most"):
        load_backbone(model_dir, [2], "float32", device_map="cpu")


SAID = {
    "the host's": RuntimeError("[enforce fail at alloc_cpu.cpp:121] data. DefaultCPUAllocator: can't allocate memory"),
    "numpy's": MemoryError("Unable to allocate 8.00 GiB for an array"),
    "a device's": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "the driver's": RuntimeError("CUDA error: out of memory"),
    "cuBLAS's": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
}


@pytest.mark.parametrize("whose", SAID)
def test_memory_that_runs_out_is_no_fault_of_the_model(whose, model_dir, monkeypatch, capsys) -> None:
    """While the weights are read, and while the model reads a text."""
    model = load_backbone(model_dir, [1], "float32", device_map="cpu")

    def fail(*_: object, **__: object) -> None:
        raise SAID[whose]

    monkeypatch.setattr(type(model), "forward", fail)
    with pytest.raises(type(SAID[whose])):
        read(model, torch.zeros(1, 3, dtype=torch.int64))
    monkeypatch.setattr(type(model), "from_pretrained", fail)
    assert guard(lambda: load_backbone(model_dir, [1], "float32", device_map="cpu")) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "memory (" in told and "check --model" not in told
    with pytest.raises(InputError, match="choose another --model"):  # negative control
        monkeypatch.setattr(type(model), "forward", lambda *_, **__: 1 / 0)
        read(model, torch.zeros(1, 3, dtype=torch.int64))


GROUP = Path(f"/sys/fs/cgroup/memory/streamprobe-test-{os.getpid()}")
ASK = """
import pathlib, sys
pathlib.Path(sys.argv[1]).write_text(str(__import__("os").getpid()))
import psutil, torch
from streamprobe.system.hardware import free_bytes
print(free_bytes(torch.device("cpu")), psutil.virtual_memory().available)
"""


@pytest.fixture
def group() -> Path:
    """A real control group of 800 MB, where one can be made."""
    limits = [(GROUP, "memory.limit_in_bytes"), (GROUP.parents[1] / GROUP.name, "memory.max")]
    for folder, limit in limits:
        try:
            folder.mkdir()
            (folder / limit).write_text("800000000")
        except OSError:
            if folder.is_dir():
                folder.rmdir()
            continue
        yield folder
        folder.rmdir()
        return
    pytest.skip("no control group can be made here")


def test_a_real_group_is_seen_and_the_machine_alone_would_not_do(group: Path) -> None:
    argv = [sys.executable, "-c", ASK, str(group / "cgroup.procs")]
    done = subprocess.run(argv, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    ours, machine = map(int, done.stdout.split())
    assert ours < 800_000_000
    assert machine > ours  # the negative control: what psutil says is not what the group may have
