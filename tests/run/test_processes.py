"""Several processes that share the work of a run: the same numbers as one, and an end that says why, whoever is gone."""

import os
import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from forked import Done, forked
from killed import killed_after
from launched import launched, pooled, rows_of, said
from safetensors.torch import load_file

from streamprobe.errors import InputError
from streamprobe.run import memory_plan, pipeline
from streamprobe.run.checkpoint import load_run
from streamprobe.system import distributed, heartbeat

pytestmark = pytest.mark.usefixtures("undrawn")
SOLVERS = {"newton": ["newton"], "both": ["adam", "newton"]}


@pytest.fixture
def config(tmp_path: Path, model_dir: str, chains_file: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    keys = {
        "model": model_dir,
        "data": str(chains_file),
        "dtype": "float32",
        "layers": [0, 2],
        "lags": [-2, 0, 4],
        "labels": ["backtracking"],
        "targets": ["token", "onset"],
        "max_chains": 40,
        "max_passes": 3,
        "max_batch_tokens": 512,
        "bootstrap": 20,
        "report_to": ["none"],
    }
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(yaml.safe_dump(keys))
    return "tiny.yaml"


def distance(one: str, other: str) -> float:
    """The largest difference between any two numbers of two runs; fails where they have not the same ones."""
    worst = 0.0
    for name in ("probes.safetensors", "controls.safetensors"):
        ours, theirs = (load_file(Path(folder, name)) for folder in (one, other))
        assert ours.keys() == theirs.keys()
        for key, tensor in ours.items():
            a, b = tensor.double(), theirs[key].double()
            apart = (a - b).abs().masked_fill((a == b) | (a.isnan() & b.isnan()), 0)
            worst = max(worst, float(apart.max()) if apart.numel() else 0.0)
    for ours, theirs in zip(rows_of(one), rows_of(other), strict=True):
        for key, value in ours.items():
            if value != theirs[key]:
                worst = max(worst, abs(float(value) - float(theirs[key])))
    return worst


def alone(*argv: str, prepare: Callable[[], Any] = lambda: None) -> Done:
    [done] = forked(list(argv), prepare=prepare)
    return done


@pytest.mark.parametrize("solvers", SOLVERS)
@pytest.mark.parametrize("store", ["kept", "streamed"])
def test_any_number_of_processes_gives_the_numbers_of_one(config: str, store: str, solvers: str) -> None:
    prepare, argv = pooled if store == "streamed" else (lambda: None), [config, "--solvers", *SOLVERS[solvers]]
    assert alone(*argv, "--output_dir", "one", prepare=prepare).status == 0
    for size in (2, 4):
        every = launched([*argv, "--output_dir", f"of{size}"], size, prepare=prepare)
        assert [done.status for done in every] == [0] * size, every
        assert all(not done.out for done in every[1:]) and "verdict" in every[0].out
        assert distance("one", f"of{size}") < 1e-5
    assert alone(*argv, "--shards", "5", "--output_dir", "five", prepare=prepare).status == 0
    assert distance("one", "five") > 1e-5  # negative control: other sums are seen


def test_folds_and_bad_chains_that_are_left_out(config: str) -> None:
    argv = [config, "--folds", "3", "--bad_chains", "skip", "--max_passes", "2", "--targets", "token"]
    assert alone(*argv, "--output_dir", "one").status == 0
    assert [done.status for done in launched([*argv, "--output_dir", "two"], 2)] == [0, 0]
    assert distance("one", "two") < 1e-5


def test_more_processes_than_chains(config: str) -> None:
    argv = [config, "--max_chains", "12", "--max_passes", "1", "--controls", "position", "--targets", "token"]
    assert alone(*argv, "--output_dir", "one").status == 0
    every = launched([*argv, "--output_dir", "six"], 6)
    assert [done.status for done in every] == [0] * 6, every
    assert distance("one", "six") < 1e-5


def test_what_is_wrong_is_said_once(config: str) -> None:
    every = launched([config, "--layers", "99"], 3)
    assert [done.status for done in every] == [2] * 3
    [line] = [said(done) for done in every if said(done)]
    assert line.startswith("streamprobe: ") and line.count("\n") == 1 and "layer" in line, every


def fail_in_pass_two(rank: int) -> None:
    read = pipeline.Setup.read_pass

    def broken(self: Any, number: int) -> Any:
        if number == 2 and os.environ["RANK"] == str(rank):
            raise InputError("a card that is broken", "a whole one", "mend it")
        return read(self, number)

    pooled()
    pipeline.Setup.read_pass = broken  # type: ignore[method-assign]


@pytest.mark.parametrize("rank", [0, 1])
def test_what_is_wrong_on_one_rank_ends_all(config: str, rank: int) -> None:
    started = time.monotonic()
    every = launched([config, "--output_dir", "run"], 2, prepare=partial(fail_in_pass_two, rank))
    assert [done.status for done in every] == [2, 2], every
    assert said(every[rank]).startswith("streamprobe: a card that is broken; ") and not said(every[1 - rank])
    assert time.monotonic() - started < 60


def silent_after(seconds: float) -> None:
    heartbeat.SILENT, heartbeat.GRACE = seconds, seconds


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_killed_ends_the_run_which_any_number_of_processes_resumes(config: str, rank: int) -> None:
    assert alone(config, "--output_dir", "straight").status == 0
    started = time.monotonic()
    every = launched([config, "--output_dir", "run"], 2, prepare=killed_after(2, saved=1), only=rank)
    assert time.monotonic() - started < 60
    assert every[rank].status == -signal.SIGKILL and every[1 - rank].status == 2, every
    line = said(every[1 - rank])
    assert line.startswith(f"streamprobe: rank {rank} on ") and line.count("\n") == 1, every
    assert "which has ended without a word" in line
    for size in (1, 2, 4):
        folder = f"resumed{size}"
        Path("run").rename(folder) if size == 4 else os.system(f"cp -r run {folder}")
        argv = [config, "--output_dir", folder, "--resume"]
        every = launched(argv, size) if size > 1 else [alone(*argv)]
        assert [done.status for done in every] == [0] * size and "resumed   after pass" in every[0].out, every
        assert distance("straight", folder) < 1e-5


def stopped_after(number: int) -> Callable[[], None]:
    """Lets a process stand still after a pass, with all its connections open."""

    def prepare() -> None:
        end = pipeline.PassEnd.__call__

        def standing(self: Any, done: Any) -> None:
            end(self, done)
            if done.passes == number:
                os.kill(os.getpid(), signal.SIGSTOP)

        silent_after(3)
        pipeline.PassEnd.__call__ = standing  # type: ignore[method-assign]

    return prepare


def test_a_rank_that_stands_still_is_named(config: str) -> None:
    """As one whose machine has lost its network: no connection says so."""
    found: list[list[Done]] = []

    def prepare(rank_stops: Callable[[], None]) -> None:
        silent_after(3)
        if os.environ["RANK"] == "1":
            rank_stops()

    def run() -> None:
        found.append(launched([config, "--output_dir", "run"], 2, prepare=partial(prepare, stopped_after(1))))

    watched = threading.Thread(target=run)
    watched.start()
    watched.join(0.1)
    ended = time.monotonic() + 60
    while watched.is_alive() and time.monotonic() < ended:
        children = psutil.Process().children()
        if len(children) == 1 and children[0].status() == psutil.STATUS_STOPPED:
            children[0].kill()
        time.sleep(0.2)
    watched.join()
    main, stopped = found[0]
    assert main.status == 2 and stopped.status == -signal.SIGKILL
    assert said(main).startswith("streamprobe: rank 1 on ") and "without a word" in said(main)
    assert Path("run/checkpoint/state.safetensors").exists()


def late() -> None:
    distributed.joined.__wrapped__.__defaults__ = (3.0,)  # type: ignore[attr-defined]
    read = pipeline.Setup.read_pass

    def slow(self: Any, number: int) -> Any:
        if number == 2 and os.environ["RANK"] == "1":
            time.sleep(30)
        return read(self, number)

    pooled()
    pipeline.Setup.read_pass = slow  # type: ignore[method-assign]


def test_a_rank_that_is_late_is_named(config: str) -> None:
    started = time.monotonic()
    main, _ = launched([config, "--output_dir", "run"], 2, prepare=late)
    assert main.status == 2 and said(main).startswith("streamprobe: rank 1 on "), main
    assert "did not come to what all ranks do together" in said(main) and "within 3 s" in said(main)
    assert time.monotonic() - started < 60


def test_a_launcher_that_starts_ranks_anew_resumes_the_run(config: str) -> None:
    assert alone(config, "--output_dir", "straight").status == 0
    launched([config, "--output_dir", "run"], 2, prepare=killed_after(2, saved=1), only=1)
    every = launched([config, "--output_dir", "run"], 2, restart=1)
    assert [done.status for done in every] == [0, 0] and "resumed   after pass" in every[0].out
    assert distance("straight", "run") < 1e-5


def test_ranks_that_would_run_another_run_are_refused(config: str) -> None:
    def other() -> None:
        from streamprobe.run import provenance

        provenance.PACKAGES = []  # type: ignore[assignment]

    every = launched([config, "--output_dir", "run"], 2, prepare=other, only=1)
    assert [done.status for done in every] == [2, 2]
    [line] = [said(done) for done in every if said(done)]
    assert line.startswith("streamprobe: versions on rank 1 of 2 that differ from those on rank 0; ")


def test_memory_is_planned_by_the_rank_that_has_least_room(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def less() -> None:
        memory_plan.memory_room = lambda *_: 350_000  # type: ignore[assignment]

    argv = [config, "--controls", "none", "--solvers", "adam", "--max_passes", "1", "--output_dir"]
    every = launched([*argv, "run"], 2, prepare=less, only=1)
    assert [done.status for done in every] == [0, 0], every
    found = load_run(Path("run"))
    assert found and not found.kept.train
    assert [done.status for done in launched([*argv, "roomy"], 2)] == [0, 0]
    roomy = load_run(Path("roomy"))
    assert roomy and roomy.kept.train  # negative control
