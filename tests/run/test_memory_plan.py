"""Where a run's activations lie: the plan against what is free, and what a resumed run keeps."""

import pytest
import torch

from streamprobe.activations.feed import Feed
from streamprobe.errors import InputError
from streamprobe.lags import Column
from streamprobe.probes.nested import Blocks
from streamprobe.probes.sites import Site, control_sites, layer_sites
from streamprobe.run import memory_plan
from streamprobe.run.memory_plan import Kept, Plan, Reserve, Tokens, make_plan, memory_room, plan_memory
from streamprobe.run.solver_sizes import Matrices, NestedSize
from streamprobe.solvers.block_matrices import PENALTIES, Start
from streamprobe.solvers.curvature import curvature_bytes
from streamprobe.solvers.lbfgs import PAIRS, vector_bytes
from streamprobe.solvers.nested import NestedSolver
from streamprobe.solvers.nested_sums import Centres

CPU = torch.device("cpu")
GPU = torch.device("cuda")
GB = 10**9


def plan(monkeypatch: pytest.MonkeyPatch, cap: float | None, device: torch.device, free: dict[str, float], **n: int):
    """`plan_memory` for tokens of 1,000 bytes, with this many GB free, of which one is reserved everywhere."""
    monkeypatch.setattr(memory_plan, "free_bytes", lambda where: int(free[where.type] * GB))
    train = n.get("train", 800_000)
    tokens = Tokens(train, n.get("validation", 100_000), 1000, train)
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
    tokens, rooms = Tokens(800_000, 100_000, 1000, 800_000), {CPU: int(0.9 * GB)}
    before = Kept(20_000, False, True, True)
    assert plan_memory(tokens, rooms, batch_size=64, before=before) == Plan(before, CPU)
    assert plan_memory(tokens, rooms, batch_size=64) == Plan(Kept(800_000, True, True), CPU)  # negative control
    rooms = {CPU: int(0.8 * GB)}
    with pytest.raises(InputError, match="for 800,000 training tokens, as when the run began; fix: raise --memory_gb"):
        plan_memory(tokens, rooms, batch_size=64, before=Kept(800_000, True, True))


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


P, D, L, K = 20, 30, 2, 5  # features of the joint control, those of a layer, layers, columns of the control


def feed(name: str, n_sites: int, n_columns: int, n_features: int) -> Feed:
    return Feed(name, [Site(f"{name}{i}", i, False) for i in range(n_sites)], n_features, list, torch.arange(n_columns))


FEEDS = [feed("layers", L, 8, D), feed("position", 1, 6, 3), feed("joint+chain", 1, K, P)]


def test_nested_probes_take_the_place_of_the_matrices_of_others_but_not_of_their_vectors():
    with_nested, without = Matrices.of(FEEDS), Matrices.of(FEEDS[:2])
    vectors = L * K * (P + 1 + D) * 8 * (7 + 2 * PAIRS)
    assert with_nested.vectors == without.vectors + vector_bytes(1, K, P) + vectors
    assert without.nested.matrix_bytes(False) == without.nested.vector_bytes() == 0
    whole = 8 * K * ((P + 1) ** 2 + L * ((P + 1) * D + D**2))  # the sums, which are wider than the factors
    others = curvature_bytes(L, 9, D) + curvature_bytes(1, 7, 3) + curvature_bytes(1, K + 1, P)
    assert whole != others and with_nested.taken(False) == with_nested.vectors + max(whole, others)
    shared = 8 * (P + 1) ** 2 + 4 * L * ((P + 1) * D + (1 + len(PENALTIES)) * D**2)
    others = curvature_bytes(L, 1, D) + curvature_bytes(1, 1, 3) + curvature_bytes(1, 1, P)
    assert shared > others and with_nested.taken(True) == with_nested.vectors + shared


def test_matrices_are_shared_where_those_of_nested_probes_would_be_too_large():
    """Also where those of the others would not be."""
    own = NestedSize(layers=4, columns=50, control=200, hidden=100)
    matrices = Matrices(vectors=0, all=450, one=50, nested=own)
    whole = own.matrix_bytes(False)
    assert matrices.taken(False) == whole
    assert matrices.must_share(room=whole, activations=10**12, pool=0)
    assert not matrices.must_share(room=3 * whole, activations=10**12, pool=0)
    assert not matrices._replace(nested=NestedSize()).must_share(room=whole, activations=10**12, pool=0)


def trained_nested(groups: list[list[int]]) -> NestedSolver:
    """A solver of the sizes above at the end of its first pass, over noise."""
    random = torch.Generator().manual_seed(0)
    columns = [Column("a", "token", lag) for lag in range(1, K + 1)]
    start = Start(
        control_sites(["joint+chain"])[0],
        torch.zeros(K, P + 1, dtype=torch.float64),
        torch.full((P + 1,), 0.02, dtype=torch.float64),
        torch.zeros(K, dtype=torch.float64),
        Centres(torch.zeros(P), torch.zeros(L, D)),
        torch.ones(L, K, P + 1 + D, dtype=torch.float64),
        torch.ones(K),
        torch.full((K,), 75.0, dtype=torch.float64),
        groups,
        torch.zeros(1, 1, 1, dtype=torch.float64),
    )
    solver = NestedSolver(start, layer_sites([0, 1]), columns, lambda _: torch.zeros(L + 1, K), tolerance=1e-9, seed=0)
    blocks = Blocks(torch.randn(300, P, generator=random), torch.randn(300, L, D, generator=random))
    solver.step(blocks, torch.rand(300, K, generator=random) < 0.5, torch.ones(300, K, dtype=torch.bool))
    solver.end_part()
    return solver


@pytest.mark.parametrize("shared", [False, True])
def test_nested_probes_take_what_was_planned(shared):
    """Behind the first pass, when all have the same penalty."""
    solver = trained_nested([list(range(K))] if shared else [[k] for k in range(K)])
    parts = (solver.curvature.of_control, solver.curvature.of_both, solver.curvature.of_layer)
    summed = sum(t.nbytes for part in parts for t in part.kept.values())
    solver.end_pass()
    size, matrices = NestedSize.of(FEEDS), solver.matrices
    held = sum(t.nbytes for own in (matrices.shifts, matrices.rest, matrices.factors) for t in own.values())
    held += sum(t.nbytes for t in matrices.of_control)
    more = 4 * L * (len(PENALTIES) - 1) * D**2 if shared else 0  # other penalties may come
    if shared:  # with a factor for each penalty the matrices are larger than the sums that they are made of
        assert summed < held + more == size.matrix_bytes(shared) - 4 * (P + 1) ** 2
    else:
        assert held < summed == size.matrix_bytes(shared)
    vectors = [solver.point, solver.best, solver.chosen, solver.best_gradient, solver.past, solver.sums.gradient_]
    vectors.append(solver.start.scale)
    assert 0 <= size.vector_bytes() - sum(t.nbytes for t in vectors) <= solver.point.nbytes


def test_nested_probes_take_so_much_of_the_disk():
    solver, size = trained_nested([[k] for k in range(K)]), NestedSize.of(FEEDS)
    solver.end_pass()
    assert size.state_bytes() == sum(t.nbytes for t in solver.state().values())
    bank = solver.bank()
    grids = 4 * bank.bias.numel() * 8  # threshold, best pass, norm and penalty
    assert size.file_bytes() == sum(t.nbytes for t in bank.tensors().values()) + grids + 4 * K
    assert NestedSize().state_bytes() == NestedSize().file_bytes() == NestedSize().drawn_bytes(10, 10) == 0
