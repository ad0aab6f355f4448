"""Ctrl-C and SIGTERM end a stream with everything written, also while it waits; the second one ends it at once."""

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from builders import make_rows
from forked import FORK, _child
from streamed import counts_of, standing_of, tensors_of, write_config

from streamprobe.cli import train as main
from streamprobe.run.streaming import loop

pytestmark = pytest.mark.usefixtures("undrawn")
SECONDS = 60.0
REPORT = ("results.csv", "probes.safetensors", "report.html", "summary.json", "checkpoint/state.safetensors")


class Started:
    """A command line in a process of its own, with a pipe for its standard input."""

    def __init__(self, argv: list[str], prepare: Callable[[], None]):
        self.out, self.err = Path("out.txt"), Path("err.txt")
        read, self.input = os.pipe()

        def prepared() -> None:
            os.close(self.input)
            os.dup2(read, 0)
            sys.stdin = open(0)  # noqa: SIM115  (it lasts as long as the process)
            prepare()

        files = [os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC) for path in (self.out, self.err)]
        self.process = FORK.Process(target=_child, args=(argv, *files, prepared))
        self.process.start()
        for number in (read, *files):
            os.close(number)

    def wait_for(self, text: str) -> None:
        """Waits until this was printed."""
        end = time.monotonic() + SECONDS
        while text not in self.out.read_text():
            assert self.process.is_alive() and time.monotonic() < end, (self.out.read_text(), self.err.read_text())
            time.sleep(0.02)

    def send(self, sign: int) -> None:
        assert self.process.pid
        os.kill(self.process.pid, sign)

    def status(self) -> int | None:
        """With which it ended: negative is the signal that ended it."""
        self.process.join(SECONDS)
        return self.process.exitcode


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Started]]:
    """Begins a command line; whatever becomes of it, it is gone in the end."""
    monkeypatch.chdir(tmp_path)
    begun: list[Started] = []

    def starting(*argv: str, prepare: Callable[[], None] = lambda: None) -> Started:
        begun.append(Started(list(argv), prepare))
        return begun[-1]

    yield starting
    for each in begun:
        each.process.kill()
        each.process.join()


def slowly() -> None:
    """Lets a round take a while."""
    learn = loop.learn
    loop.QUIET = 0.0

    def slow(*args: Any, **keys: Any) -> None:
        learn(*args, **keys)
        time.sleep(0.3)

    loop.learn = slow


def never_ending() -> None:
    """Lets the last report take for ever."""
    loop.end = lambda run: time.sleep(SECONDS)  # type: ignore[assignment]


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_a_stream_that_is_stopped_reports_what_came_and_can_go_on(
    sign: int, start: Callable[..., Started], tmp_path: Path, model_dir: str
) -> None:
    config = write_config(tmp_path, model_dir, 200)
    run = start(config, "--output_dir", "run", prepare=slowly)
    run.wait_for("round 3")
    run.send(sign)
    assert run.status() == 0
    assert run.err.read_text().strip().startswith("stopping  what is under way is ended")
    assert all(Path("run", name).exists() for name in REPORT)
    stopped = standing_of("run")
    assert 3 <= stopped["rounds"] < 12 and counts_of("run")["used"] == stopped["counts"]["used"] < 200
    assert f"report    at {stopped['tokens']:,} training tokens of the stream" in run.out.read_text()
    assert main([config, "--output_dir", "run", "--resume"]) == 0
    assert main([config, "--output_dir", "straight"]) == 0
    assert standing_of("run")["counts"] == standing_of("straight")["counts"]
    for name in ("rates.valid", "train.ids", "test.ids", "means-layers.n"):
        assert tensors_of("run")[name] == tensors_of("straight")[name], name


@pytest.mark.parametrize("sign, status", [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)])
def test_the_second_sign_ends_it_at_once(
    sign: int, status: int, start: Callable[..., Started], tmp_path: Path, model_dir: str
) -> None:
    config = write_config(tmp_path, model_dir, 200)
    run = start(config, "--output_dir", "run", prepare=lambda: (slowly(), never_ending()))
    run.wait_for("round 2")
    run.send(sign)
    time.sleep(2)
    assert run.process.is_alive()
    begun = time.monotonic()
    run.send(sign)
    assert run.status() == status and time.monotonic() - begun < 10
    assert Path("run/checkpoint/state.safetensors").exists() and not Path("run/results.csv").exists()


@pytest.mark.parametrize("n", [80, 40], ids=["behind all rounds", "before the first"])
def test_a_stream_that_waits_for_standard_input_stops_too(
    n: int, start: Callable[..., Started], tmp_path: Path, model_dir: str
) -> None:
    """Of 40 chains it waits for more by which to find the format; those are then used."""
    config = write_config(tmp_path, model_dir, 1, round_tokens=5000)
    run = start(config, "--data", "-", "--output_dir", "run")
    for row in make_rows(n, seed=7):
        os.write(run.input, json.dumps(row).encode() + b"\n")
    run.wait_for("waiting for more of standard input")
    run.send(signal.SIGINT)
    assert run.status() == 0, (run.out.read_text(), run.err.read_text())
    assert all(Path("run", name).exists() for name in REPORT)
    assert counts_of("run")["used"] == n


def test_standard_input_that_is_closed_ends_it_as_a_file_does(
    start: Callable[..., Started], tmp_path: Path, model_dir: str
) -> None:
    config = write_config(tmp_path, model_dir, 80)
    run = start(config, "--data", "-", "--output_dir", "run")
    os.write(run.input, Path("chains.jsonl").read_bytes()[:-1])  # also without the last line's end
    os.close(run.input)
    assert run.status() == 0 and main([config, "--output_dir", "straight"]) == 0
    assert Path("run/results.csv").read_bytes() == Path("straight/results.csv").read_bytes()


def test_nothing_that_came_is_an_error_in_a_line(start: Callable[..., Started], tmp_path: Path, model_dir: str) -> None:
    config = write_config(tmp_path, model_dir, 1)
    run = start(config, "--data", "-", "--output_dir", "run")
    run.wait_for("waiting for more of standard input")
    run.send(signal.SIGINT)
    assert run.status() == 2
    *_, line = run.err.read_text().splitlines()
    assert line.startswith("streamprobe: data -, stopped before its first row")
