"""Several processes share a stream: every chain is seen by one of them, once, also where others go on behind a kill."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from forked import Done, forked
from launched import launched, said
from streamed import distance, standing_of, tensors_of, write_config
from test_streaming_kills import die_in

from streamprobe.reporting import files
from streamprobe.run.checkpoint import load_run
from streamprobe.run.streaming import loop
from streamprobe.run.streaming.underway import Underway
from streamprobe.system.files import unwritable

pytestmark = pytest.mark.usefixtures("undrawn")


@pytest.fixture
def config(tmp_path: Path, model_dir: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    more = {"solvers": ["newton", "adam"], "controls": ["position", "permuted"], "bad_chains": "skip"}
    return write_config(tmp_path, model_dir, 120, reservoir_tokens=4096, lags=[4], **more)


def run(size: int, *argv: str, **keys: object) -> list[Done]:
    """What becomes of a launch of so many processes."""
    return launched(argv, size, **keys) if size > 1 else forked(list(argv), **keys)  # type: ignore[arg-type]


def fine(every: list[Done]) -> None:
    assert [done.status for done in every] == [0] * len(every), every
    assert not any(map(said, every)) and not any(done.out for done in every[1:])


def test_two_processes_end_where_one_does(config: str) -> None:
    fine(run(1, config, "--output_dir", "one"))
    fine(run(2, config, "--output_dir", "two"))
    assert distance("two", "one") < 1e-5
    assert standing_of("two") == standing_of("one") and standing_of("one")["counts"]["used"] == 120
    for name in ("rates.valid", "rates.positive", "train.about", "train.ids", "test.about", "seen.hashes"):
        assert tensors_of("two")[name] == tensors_of("one")[name], name
    one, two = (load_run(Path(name)) for name in ("one", "two"))
    assert one and two and one.states["means-layers"]["n"].equal(two.states["means-layers"]["n"])
    fine(run(1, config, "--output_dir", "other", "--split_seed", "1"))
    assert distance("other", "one") > 1e-3  # negative control


@pytest.mark.parametrize("before, after", [(2, 1), (1, 2)])
def test_a_run_that_is_killed_goes_on_in_another_number_of_processes(config: str, before: int, after: int) -> None:
    fine(run(1, config, "--output_dir", "straight"))
    every = run(before, config, "--output_dir", "killed", prepare=die_in(loop, "learn", 5, after=False))
    assert -signal.SIGKILL in [done.status for done in every], every
    assert 0 < standing_of("killed")["rounds"] < standing_of("straight")["rounds"]
    fine(run(after, config, "--output_dir", "killed", "--resume"))
    assert standing_of("killed") == standing_of("straight")
    assert distance("killed", "straight") < 1e-5


def asked_to_stop() -> None:
    """Lets a process be asked to end while it learns of its third round."""
    learn, rounds = loop.learn, iter(range(10**6))

    def learning(*args: Any, **keys: Any) -> None:
        if next(rounds) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        learn(*args, **keys)

    loop.learn = learning


@pytest.mark.parametrize("rank", [0, 1])
def test_all_end_with_a_report_where_one_is_asked_to_stop(config: str, rank: int) -> None:
    every = run(2, config, "--output_dir", "run", prepare=asked_to_stop, only=rank)
    assert [done.status for done in every] == [0, 0], every
    assert standing_of("run")["rounds"] == 3 and Path("run/results.csv").exists()


def without_a_disk() -> None:
    """Lets nothing be written but the last report."""

    def full(path: Path, *_: Any) -> None:
        raise unwritable(path, OSError(28, "No space left on device"))

    write, end, checkpoint = files.write_atomic, loop.end, Underway.checkpoint

    def with_a_disk(under_way: Underway) -> None:
        files.write_atomic = write
        end(under_way)

    def flush() -> None:
        full(Path("events"))

    def flushing(under_way: Underway) -> Any:
        under_way.tracker.flush = flush  # type: ignore[method-assign]
        return checkpoint(under_way)

    files.write_atomic, loop.end, Underway.checkpoint = full, with_a_disk, flushing  # type: ignore[assignment, method-assign]


def test_a_disk_that_is_full_for_one_process_stops_none(config: str) -> None:
    more = ["--report_tokens", "3000"]
    fine(run(2, config, "--output_dir", "straight", *more))
    every = run(2, config, "--output_dir", "run", *more, prepare=without_a_disk, only=0)
    fine(every)
    assert "disk      report not written" in every[0].out and "disk      curves not written" in every[0].out
    assert distance("run", "straight") == 0
