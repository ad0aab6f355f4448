"""A stream that is killed, wherever it stands, goes on without a chain lost or read twice."""

import os
import random
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from forked import forked
from streamed import probes_of, standing_of, tensors_of, write_config

from streamprobe.cli import train as main
from streamprobe.data.reservoir import Reservoir
from streamprobe.data.streams import RecordStream
from streamprobe.run import checkpoint
from streamprobe.run.checkpoint import STATE, Checkpoints
from streamprobe.run.streaming import loop
from streamprobe.run.streaming.samples import Samples
from streamprobe.solvers.adam import AdamSolver
from streamprobe.solvers.class_means import ClassMeans

pytestmark = pytest.mark.usefixtures("undrawn")
PLACES = {  # where a stream may end: after each record, each step of a learner, each chain kept, around each checkpoint
    RecordStream: "_record",
    ClassMeans: "step",
    AdamSolver: "step",
    Samples: "add",
    checkpoint: "save_run",
}


class Killed(BaseException):
    """What no `except Exception` stops."""


class Killer:
    """Counts down at every place of PLACES, and then ends the program there, before or after what is done in it."""

    def __init__(self, patch: pytest.MonkeyPatch):
        self.left = 0  # places to pass; none are counted where it is 0
        patch.setattr(Checkpoints, "write_offered", lambda self: None)  # one that is killed does not
        patch.setattr(loop, "Checkpoints", partial(Checkpoints, seconds=0.0))
        for owner, name in PLACES.items():
            patch.setattr(owner, name, self.counted(getattr(owner, name)))

    def counted(self, work: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*args: Any) -> Any:
            self.tick()
            done = work(*args)
            self.tick()
            return done

        return counting

    def tick(self) -> None:
        self.left -= 1
        if self.left == 0:
            raise Killed


def survive(config: str, kills: int, killer: Killer, most: int, seed: int = 0) -> int:
    """A run that is killed so often, after at most so many places each time, then left alone; how often it was."""
    rng, killed = random.Random(seed), 0
    argv = [config, "--output_dir", "killed"]
    while True:
        killer.left = rng.randint(1, most) if killed < kills else 0
        try:
            assert main(argv) == 0
        except Killed:
            killed += 1
            argv = [config, "--output_dir", "killed", "--resume"]
        else:
            return killed


@pytest.fixture
def config(tmp_path: Path, model_dir: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    path = write_config(tmp_path, model_dir, 300, solvers=["newton", "adam"], max_passes=2, lags=[0])
    assert main([path, "--output_dir", "straight"]) == 0
    return path


def test_no_chain_is_lost_or_read_twice_over_fifty_kills(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        assert survive(config, 50, Killer(patch), most=160) == 50
    assert standing_of("killed") == standing_of("straight")
    assert standing_of("killed")["counts"]["used"] == 300
    assert tensors_of("killed") == tensors_of("straight")
    assert probes_of("killed") == probes_of("straight")


def once(reservoir: Reservoir, chain: Any, number: int, add: Callable[..., None] = Reservoir.add) -> None:
    """Takes up a chain that it does not hold."""
    if chain.row not in [kept.row for kept in reservoir.chains]:
        add(reservoir, chain, number)


def test_a_source_that_stands_a_record_off_is_found_out(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: it says where it stood one record before."""
    state, give = RecordStream.state, RecordStream.__iter__

    def late(self: RecordStream) -> Any:
        for record in give(self):
            self.before, self.now = getattr(self, "now", {}), state(self)  # type: ignore[attr-defined]
            yield record

    monkeypatch.setattr(RecordStream, "__iter__", late)
    monkeypatch.setattr(RecordStream, "state", lambda self: self.before)
    monkeypatch.setattr(Reservoir, "add", once)  # which else would stumble over it
    with monkeypatch.context() as patch:
        assert survive(config, 3, Killer(patch), most=400) == 3
    assert standing_of("killed")["counts"]["used"] > 300
    assert tensors_of("killed")["rates.valid"] != tensors_of("straight")["rates.valid"]
    assert probes_of("killed") != probes_of("straight")


def die_in(owner: Any, name: str, at: int, *, after: bool) -> Callable[[], None]:
    """Lets a process die in its call number `at` of a function, before or after what that does."""

    def prepare() -> None:
        work, calls = getattr(owner, name), [0]

        def deadly(*args: Any, **keys: Any) -> Any:
            calls[0] += 1
            if calls[0] == at and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            done = work(*args, **keys)
            if calls[0] == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return done

        setattr(owner, name, deadly)
        loop.Checkpoints = partial(Checkpoints, seconds=0.0)  # type: ignore[assignment,misc]  # as often as it may

    return prepare


DEATHS = {
    "before the first checkpoint": (loop, "learn", 1, False),
    "in the middle of a write": (os, "replace", 4, False),
    "in a round": (AdamSolver, "step", 8, False),
    "once a checkpoint is there": (checkpoint, "save_run", 3, True),
    "in a report on the way": (loop, "report_between", 1, True),
    "in the last report": (loop, "end", 1, False),
}


def test_a_program_that_is_killed_six_times_ends_with_the_same_bytes(config: str) -> None:
    """By kill -9, in turn, with a report on the way, which changes nothing either."""
    argv = [config, "--output_dir", "killed", "--report_tokens", "9000"]
    for where, (owner, name, at, after) in DEATHS.items():
        [done] = forked(argv, prepare=die_in(owner, name, at, after=after))
        assert done.status == -signal.SIGKILL, (where, done)
        argv = [*argv, *["--resume"] * ("--resume" not in argv)]
    [done] = forked(argv)
    assert done.status == 0 and "resumed   at " in done.out
    assert Path("killed", STATE).exists()
    assert standing_of("killed") | {"reports": 0} == standing_of("straight")
    others = ("stream.about", "drift.weight", "drift.bias", "drift.layer")  # the reports, and what they have found
    assert {**tensors_of("killed"), **dict.fromkeys(others)} == {**tensors_of("straight"), **dict.fromkeys(others)}
    assert probes_of("killed") == probes_of("straight")
