"""Where a run's activations lie: the plan against what is free, and what a resumed run keeps."""

import pytest
import torch

from streamprobe.errors import InputError
from streamprobe.run import memory_plan
from streamprobe.run.memory_plan import Kept, Matrices, Plan, Reserve, Tokens, make_plan, memory_room, plan_memory

CPU = torch.device("cpu")
GPU = torch.device("cuda")
GB = 10**9


def plan(monkeypatch: pytest.MonkeyPatch, cap: float | None, device: torch.device, free: dict[str, float], **n: int):
    """`plan_memory` for tokens of 1,000 bytes, with this many GB free, of which one is reserved everywhere."""
    monkeypatch.setattr(memory_plan, "free_bytes", lambda where: int(free[where.type] * GB))
    tokens = Tokens(n.get("train", 800_000), n.get("validation", 100_000), 1000)
    reserve = Reserve(0, GB) if device.type == "cpu" else Reserve(GB, GB)
    about = {"device": device, "memory_gb": cap, "reserve": reserve, "batch_size": n.get("batch", 64), "before": None}
    return make_plan(tokens, None, **about)


PLANS = {  # memory_gb, device, GB free, tokens -> plan; all tokens are 0.9 GB; 1 GB and a tenth of what is free stay free
    "fits": (None, CPU, {"cpu": 5}, {}, Plan(Kept(800_000, True, True), CPU)),
    "fits to the byte": (0.9, CPU, {"cpu": 2.2}, {}, Plan(Kept(800_000, True, True), CPU)),
    "fits on the device": (None, GPU, {"cuda": 2.2, "cpu": 9}, {}, Plan(Kept(800_000, True, True), GPU)),
    "fits in RAM only": (None, GPU, {"cuda": 2.1, "cpu": 9}, {}, Plan(Kept(800_000, True, True), CPU)),
    "fits nowhere": (None, GPU, {"cuda": 2.1, "cpu": 2.1}, {}, Plan(Kept(65_536, False, True), GPU)),
    "capped": (0.5, CPU, {"cpu": 9}, {}, Plan(Kept(65_536, False, True), CPU)),
    "capped on the device": (0.5, GPU, {"cuda": 9, "cpu": 9}, {}, Plan(Kept(65_536, False, True), GPU)),
    "pool beside validation": (0.13, CPU, {"cpu": 9}, {"validation": 65_000}, Plan(Kept(65_000, False, True), CPU)),
    "validation is over half": (0.13, CPU, {"cpu": 9}, {"validation": 65_001}, Plan(Kept(65_536, False, False), CPU)),
    "free memory counts, too": (5, CPU, {"cpu": 1.14}, {}, Plan(Kept(26_000, False, False), CPU)),
    "a large mini-batch": (0.5, CPU, {"cpu": 9}, {"batch": 90_000}, Plan(Kept(90_000, False, True), CPU)),
    "no pool beside validation": (0.002, CPU, {"cpu": 9}, {"validation": 1_000}, Plan(Kept(2_000, False, False), CPU)),
    "the least": (0.001024, CPU, {"cpu": 9}, {}, Plan(Kept(1_024, False, False), CPU)),
    "a short train split": (
        0.007,
        CPU,
        {"cpu": 9},
        {"train": 5_000, "validation": 9_000},
        Plan(Kept(5_000, False, False), CPU),
    ),
}


@pytest.mark.parametrize("name", PLANS)
def test_plan(monkeypatch, name):
    cap, device, free, tokens, expected_plan = PLANS[name]
    assert plan(monkeypatch, cap, device, free, **tokens) == expected_plan


@pytest.mark.parametrize("name", PLANS)
def test_plan_keeps_to_the_budget(monkeypatch, name):
    cap, device, free, tokens, _ = PLANS[name]
    got = plan(monkeypatch, cap, device, free, **tokens)
    kept = tokens.get("validation", 100_000) * got.kept.validation
    assert (got.kept.rows + kept) * 1000 <= min(free[got.home.type], cap or 1e9) * GB


@pytest.mark.parametrize(("cap", "free"), [(0.001023, {"cpu": 9}), (None, {"cpu": 1.1})], ids=["capped", "full"])
def test_too_little_memory(monkeypatch, cap, free):
    with pytest.raises(InputError, match="MB for activations; expected at least 1.02 MB, .* raise --memory_gb"):
        plan(monkeypatch, cap, CPU, free)


def test_a_resumed_run_keeps_what_it_kept():
    """Whatever is free now: the pool decides the order of the tokens."""
    tokens, rooms = Tokens(800_000, 100_000, 1000), {CPU: int(0.9 * GB)}
    before = Kept(20_000, False, True, True)
    assert plan_memory(tokens, rooms, batch_size=64, before=before) == Plan(before, CPU)
    assert plan_memory(tokens, rooms, batch_size=64) == Plan(Kept(800_000, True, True), CPU)  # negative control
    with pytest.raises(InputError, match="for 900,000 training tokens, as when the run began; fix: raise --memory_gb"):
        plan_memory(tokens, rooms, batch_size=64, before=Kept(900_000, True, True))


def test_the_reserve_lies_where_it_is_needed(monkeypatch):
    """On a device the forward pass takes the device's memory and the scores the host's; on the CPU the larger counts."""
    monkeypatch.setattr(memory_plan, "free_bytes", lambda where: 10 * GB)
    reserve = Reserve(device=2 * GB, host=GB)
    rooms = [memory_room(None, home, reserve.on(home, device)) for home, device in ((GPU, GPU), (CPU, GPU), (CPU, CPU))]
    assert rooms == [7 * GB, 8 * GB, 7 * GB]


def test_matrices_are_shared_where_they_would_take_the_place_of_the_least_pool():
    matrices = Matrices(vectors=0, all=450, one=50)
    assert not matrices.must_share(room=1000, activations=10_000, pool=500)
    assert matrices.must_share(room=1000, activations=10_000, pool=501)
