"""What needs no second process: who is who, which GPUs are whose, and that one process alone needs nobody."""

import os

import pytest
import torch

from streamprobe.system import distributed
from streamprobe.system.launch import World, own_devices, was_launched


@pytest.mark.parametrize(
    ("local", "n", "visible", "expected"),
    [
        ((0, 1), 4, None, "0,1,2,3"),  # a process alone may spread its model over all
        ((1, 2), 4, None, "2,3"),
        ((3, 4), 4, None, "3"),
        ((1, 2), 2, "5,7", "7"),
        ((1, 2), 2, "GPU-a,GPU-b", "GPU-b"),
        ((2, 3), 4, None, "2"),  # one is left over
    ],
)
def test_every_process_has_gpus_of_its_own(local: tuple[int, int], n: int, visible: str | None, expected: str) -> None:
    assert own_devices(World(0, 8, *local), n, visible) == expected


def test_processes_of_a_machine_together_have_all_its_gpus_once() -> None:
    for size in (1, 2, 4, 8):
        parts = [own_devices(World(rank, size, rank, size), 8, None).split(",") for rank in range(size)]
        assert sorted(name for part in parts for name in part) == [str(number) for number in range(8)]


@pytest.mark.parametrize(
    "known",
    [{}, {"RANK": "0", "WORLD_SIZE": "2"}, {"RANK": "0", "WORLD_SIZE": "x"}, {"RANK": "3", "WORLD_SIZE": "2"}],
    ids=["nothing", "no address", "no number", "no such rank"],
)
def test_without_a_launcher_a_process_works_alone(known: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in known.items():
        monkeypatch.setenv(name, value)
    assert not was_launched()
    with distributed.joined():
        x = torch.arange(3.0)
        distributed.add(x)
        distributed.add_at(x, 0)
        assert distributed.share(x) is x and distributed.gather([x], [3])[0] is x
        assert distributed.least(7) == 7 and distributed.each(7) == [7] and distributed.share_bytes(b"ab") == b"ab"
        distributed.agree("keys", "the same")
        assert distributed.is_main() and all(map(distributed.is_own, range(5)))
    assert torch.equal(x, torch.arange(3.0)) and "CUDA_VISIBLE_DEVICES" not in os.environ | known
