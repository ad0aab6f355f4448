"""How long everything takes that the bench measures.

Shapes: N tokens, L layers, K columns, D hidden size.
"""

import io
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch
from torch import Tensor

from streamprobe.activations.store import ActivationMemory
from streamprobe.bench import offline
from streamprobe.bench.synthetic import BASE_RATE, BATCH, L2, LAGS, SEED, Workbench, count, make_model
from streamprobe.evaluation.bootstrap import chain_bootstrap, draw_chains
from streamprobe.evaluation.metrics import measure
from streamprobe.evaluation.scores import evaluate
from streamprobe.probes.base import Probes
from streamprobe.probes.early_stopping import BestProbes
from streamprobe.reporting.tracking.tensorboard import TensorBoard
from streamprobe.reporting.tracking.tracker import Tracker
from streamprobe.run.checkpoint import Checkpoints
from streamprobe.run.memory_plan import Kept
from streamprobe.run.pipeline import PassEnd
from streamprobe.run.provenance import peak_memory
from streamprobe.solvers.base import Solver
from streamprobe.system.console import say, warn
from streamprobe.trainer import Done, Job, train

MAX_PASSES = 50
FORWARD = "bare forward of the truncated model"
JOB = "whole job, 70 probes: Newton to convergence, with metrics and checkpoints"
OFFLINE = "offline way: whole"
PASSES = {  # name -> labels, solvers; a label has 70 probes
    "pass 1, 70 probes: Adam": (1, ("adam",)),
    "pass 1, 70 probes: Newton": (1, ("newton",)),
    "pass 1, 70 probes: both": (1, ("adam", "newton")),
}
MANY = {
    "pass 1, 700 probes: Adam": (10, ("adam",)),
    "pass 1, 700 probes: Newton, one matrix per layer": (10, ("newton",)),
    "pass 1, 7,000 probes: Adam": (100, ("adam",)),
    "pass 1, 7,000 probes: Newton, one matrix per layer": (100, ("newton",)),
}
REPLAYS = {"Adam, batch 64": ("adam", 64), f"Adam, batch {BATCH:,}": ("adam", BATCH), "Newton": ("newton", BATCH)}
FIRST_STEP = "Newton on collected activations, 70 probes: first pass"
LATER_STEPS = "Newton on collected activations, 70 probes: passes after it, to convergence"
T = TypeVar("T")


class Ledger:
    """Every time taken, by the name of what was timed, and what was extrapolated from them."""

    def __init__(self, device: torch.device):
        self.device = device
        self.measured: dict[str, list[float]] = {}
        self.peak: dict[str, int] = {}  # bytes in use at most, from the start of the process until it was done once
        self.extrapolated: dict[str, float] = {}

    def clock(self) -> float:
        """Seconds, read once the device has done all that it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def time(self, name: str, work: Callable[[], T]) -> T:
        """Does the work, and notes and reports how long it took."""
        start = self.clock()
        result = work()
        self.measured.setdefault(name, []).append(self.clock() - start)
        self.peak.setdefault(name, peak_memory(self.device))
        warn(f"{self.measured[name][-1]:>10.2f} s  {name}")
        return result

    def rows(self) -> list[dict[str, Any]]:
        """A row per name: the median of its times, and that over the median of the bare forward."""
        limit = median(self.measured[FORWARD])
        rows: list[dict[str, Any]] = []
        for name, times in self.measured.items():
            about = {"kind": "measured", "times": times, "peak_memory_gb": self.peak[name] / 1e9}
            rows.append({"what": name, "seconds": median(times), **about})
        rows += [{"what": k, "seconds": v, "kind": "extrapolated"} for k, v in self.extrapolated.items()]
        return [{**row, "ratio": row["seconds"] / limit} for row in rows]


def measure_passes(bench: Workbench, ledger: Ledger, repeats: int) -> dict[str, int]:
    """The bare forward, every first pass and the whole job in turn, so that a drift of the machine meets them all."""
    warm = bench.grids[1]._replace(train=bench.grids[1].train[:2])
    bench.train_pass(warm, [bench.solver(name, warm) for name in ("adam", "newton")], bench.memories(warm)[0])
    job: dict[str, int] = {}
    for _ in range(repeats):
        ledger.time(FORWARD, partial(bench.forward, bench.grids[1].train))
        first_passes(bench, ledger, PASSES)
        job = measure_job(bench, ledger)
        first_passes(bench, ledger, MANY)
    return job


def first_passes(bench: Workbench, ledger: Ledger, passes: Mapping[str, tuple[int, Sequence[str]]]) -> None:
    """Each of the passes once, with fresh solvers and an empty memory."""
    for name, (n_labels, names) in passes.items():
        grid = bench.grids[n_labels]
        solvers = [bench.solver(solver, grid) for solver in names]
        memory = bench.memories(grid)[0]
        ledger.time(name, partial(bench.train_pass, grid, solvers, memory))
        del solvers, memory  # before the next ones are made


def measure_replays(bench: Workbench, ledger: Ledger, repeats: int, memory: ActivationMemory) -> Probes:
    """Passes that read the activation memory and leave the model alone: later ones, and all that Newton makes.

    Returns Newton's probes.
    """
    grid = bench.grids[1]
    solvers = {name: bench.solver(kind, grid, batch_size) for name, (kind, batch_size) in REPLAYS.items()}
    bench.train_pass(grid, list(solvers.values()), memory)  # the first pass, which makes Newton's matrices
    for _ in range(repeats):
        for name, solver in solvers.items():
            ledger.time(f"replayed pass, 70 probes: {name}", partial(bench.train_pass, grid, [solver], memory))
        fresh = bench.solver("newton", grid)
        ledger.time(FIRST_STEP, partial(bench.train_pass, grid, [fresh], memory))
        ledger.time(LATER_STEPS, partial(converge, bench, fresh, memory))
    return fresh.bank()


def converge(bench: Workbench, solver: Solver, memory: ActivationMemory) -> None:
    """Passes from memory until all probes have converged."""
    for _ in range(MAX_PASSES):
        if solver.converged.all():
            return
        bench.train_pass(bench.grids[1], [solver], memory)


def measure_validation(bench: Workbench, ledger: Ledger, repeats: int, held: ActivationMemory) -> None:
    """Scores and exact metrics of 70 probes, on the validation tokens and on a round number of others."""
    grid, tokens = bench.grids[1], 100_000
    bank = bench.solver("adam", grid).bank()
    random = torch.Generator().manual_seed(SEED)
    scores = torch.randn(tokens, len(bench.layers), len(LAGS), generator=random)
    targets = torch.rand(tokens, len(LAGS), generator=random) < BASE_RATE
    chain, weights = torch.arange(tokens) * 200 // tokens, draw_chains(200, 1000, SEED)
    for _ in range(repeats):
        name = f"validation, 70 probes: scores and metrics of {grid.n_validation:,} tokens"
        ledger.time(name, partial(validate, bench, bank, held))
        ledger.time(f"metrics of 70 probes on {tokens:,} tokens", partial(measure, scores, targets, targets | True))
        name = f"intervals of 70 probes on {tokens:,} tokens of 200 chains, 1,000 resamples"
        ledger.time(name, partial(resample, scores, targets, chain, weights))


def validate(bench: Workbench, bank: Probes, held: ActivationMemory) -> None:
    """What a run does with its validation tokens after each pass."""
    grid = bench.grids[1]
    batches = held.all_chunks(partial(bench.trip, grid, grid.validation))
    [scored] = evaluate([(bank, bench.everything(grid))], batches)
    measure(scored.scores, scored.targets, scored.valid)


def resample(scores: Tensor, targets: Tensor, chain: Tensor, weights: Tensor) -> None:
    """The intervals of every column of scores [N, L, K] and targets [N, K], for the chain of each token [N]."""
    for k in range(targets.shape[1]):
        chain_bootstrap(scores[:, :, k], targets[:, k], chain, weights)


def measure_job(bench: Workbench, ledger: Ledger) -> dict[str, int]:
    """All that a run does between the loaded model and its test, TensorBoard and checkpoints among it."""
    grid = bench.grids[1]
    solver = bench.solver("newton", grid)
    job = Job(solver, BestProbes(solver.bank(), None), bench.everything(grid))
    memory, held = bench.memories(grid)
    with TemporaryDirectory() as name:
        tracker = Tracker([TensorBoard(Path(name), {})], [solver])
        with Checkpoints(Path(name)) as checkpoints:
            kept = Kept(memory.rows, True, True)
            save = PassEnd(checkpoints, {}, kept, [job], tracker, bench.device, begun=Done())
            validation = partial(held.all_chunks, partial(bench.trip, grid, grid.validation))
            work = partial(
                train,
                [job],
                memory,
                lambda number: bench.trip(grid, grid.train),
                validation,
                tracker=tracker,
                save=save,
                max_passes=MAX_PASSES,
                batch_size=BATCH,
                seed=SEED,
            )
            with redirect_stdout(io.StringIO()):
                done = ledger.time(JOB, work)
            save.finish()
        tracker.close()
    return {"passes": done.passes, "converged": int(solver.converged.sum())}


def measure_offline(bench: Workbench, ledger: Ledger, n_chains: int, epochs: int) -> None:
    """The usual way on some training chains, and from that, by tokens, on all of them."""
    shape, grid = bench.shape, bench.grids[1]
    some, middle, column = grid.train[:n_chains], shape.layers[len(shape.layers) // 2], grid.columns[LAGS.index(0)]
    weight, dtype = grid.positive_weight[LAGS.index(0)].item(), getattr(torch, shape.dtype)
    steps = ("full model, a file per chain and layer", "load the files of one probe", "one epoch of one probe")
    extracting, loading, fitting = (f"offline, {len(some)} chains: {step}" for step in steps)
    model = make_model(shape, shape.blocks, bench.device)
    with TemporaryDirectory() as name:
        folder = Path(name)
        offline.extract(model, some[:1], shape.layers, folder)
        ledger.time(extracting, partial(offline.extract, model, some, shape.layers, folder))
        load = partial(offline.load, some, middle, column, labels=grid.labels, dtype=dtype, folder=folder)
        acts, targets = ledger.time(loading, partial(load, device=bench.device))
    offline.fit_epoch(acts[:64], targets[:64], weight, L2)
    ledger.time(fitting, partial(offline.fit_epoch, acts, targets, weight, L2))
    extraction, loads, epoch = (ledger.measured[step][0] / count(some) for step in (extracting, loading, fitting))
    probes, tokens, known = len(shape.layers) * len(LAGS), count(grid.train), ledger.extrapolated
    known["offline way: full model over all chains"] = extraction * (tokens + count(grid.validation))
    known[f"offline way: load the files of {probes} probes"] = loads * tokens * probes
    known[f"offline way: {epochs} epochs of {probes} probes"] = epoch * tokens * epochs * probes
    known[OFFLINE] = sum(known.values())


def measure_peer(bench: Workbench, ledger: Ledger, memory: ActivationMemory, probes: Probes) -> dict[str, Any]:
    """probelab on activations that are already collected, if it is installed.

    Returns the mean AUROC on these of its probes and of ours of the same layer, and how far two are apart at most.
    """
    if not offline.has_probelab():
        say("peer      probelab is not installed, so it has no row: pip install probelab")
        return {}
    pool, layer = memory.pool, len(bench.layers) // 2
    one = pool.acts[:, layer].to(bench.device)
    targets, valid = pool.targets.to(bench.device), pool.valid.to(bench.device)
    name = f"probelab: Logistic on collected activations, {len(LAGS)} probes of one layer"
    theirs = ledger.time(name, partial(offline.fit_probelab, one, targets, valid, L2))
    with torch.no_grad():
        logits = torch.stack([torch.cat([probe(part.float()) for part in one.split(4096)]) for probe in theirs], 1)
        own = torch.cat([probes.scores(part)[:, layer] for part in pool.acts.split(4096)])
    area = [measure(scores[:, None].cpu(), targets.cpu(), valid.cpu())["auroc"][0] for scores in (own, logits)]
    return {
        "auroc of streamprobe": float(area[0].mean()),
        "auroc of probelab": float(area[1].mean()),
        "largest difference": float((area[0] - area[1]).abs().max()),
    }
