"""A line a second is printed of passes, and always that of the last one."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from streamprobe.errors import InputError
from streamprobe.run import pass_end
from streamprobe.run.pass_end import PassEnd
from streamprobe.trainer import Done


class Quiet:
    """What takes any call, and notes nothing."""

    def __getattr__(self, name: str) -> Any:
        return lambda *given: None


@pytest.fixture
def end(monkeypatch: pytest.MonkeyPatch) -> PassEnd:
    """The end of the passes of no jobs, at a time that `pass_end.time.now` says."""
    clock = SimpleNamespace(now=0.0, perf_counter=lambda: clock.now)
    monkeypatch.setattr(pass_end, "time", clock)
    monkeypatch.setattr(pass_end, "describe_progress", lambda jobs: "newton")
    nothing: Any = Quiet()
    return PassEnd(nothing, {}, nothing, [], nothing, torch.device("cpu"), begun=Done(), lap=0.0)


def passes(end: PassEnd, seconds: list[float]) -> None:
    """A pass of each of these lengths."""
    for number, each in enumerate(seconds, 1):
        pass_end.time.now += each  # type: ignore[attr-defined]  # the clock of the fixture
        end(Done(number, 100 * number))


def numbers(printed: str) -> list[int]:
    return [int(line.split()[1]) for line in printed.splitlines()]


def test_fast_passes_print_a_line_a_second_and_the_last(end: PassEnd, capsys: Any) -> None:
    passes(end, [0.01] * 65)
    end.finish()
    assert numbers(capsys.readouterr().out) == [1, 65]
    end.finish()
    assert capsys.readouterr().out == "", "a line is printed once"


def test_lines_are_a_second_apart(end: PassEnd, capsys: Any) -> None:
    passes(end, [0.25] * 11)
    end.finish()
    assert numbers(capsys.readouterr().out) == [1, 5, 9, 11]


def test_slow_passes_print_a_line_each(end: PassEnd, capsys: Any) -> None:
    passes(end, [1.5, 2.0, 1.0])
    assert numbers(capsys.readouterr().out) == [1, 2, 3]


def test_the_last_line_is_printed_before_a_run_ends_in_an_error(end: PassEnd, capsys: Any) -> None:
    passes(end, [0.1])

    def fail() -> None:
        raise InputError("no room", "some", "make some")

    end.tracker = SimpleNamespace(number=lambda *given: None, flush=fail)  # type: ignore[assignment]  # all it is asked
    with pytest.raises(InputError):
        passes(end, [0.1, 0.1])
    assert len(numbers(capsys.readouterr().out)) == 2
