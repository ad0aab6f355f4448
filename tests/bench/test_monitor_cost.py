"""What watching costs is measured in turns."""

from streamprobe.bench.monitor_cost import time_rounds
from streamprobe.cli import main


def test_the_cost_of_watching_is_measured_in_turns(capsys):
    calls, now = [], [0.0]

    def work(name, seconds):
        calls.append(name)
        now[0] += seconds

    rounds = time_rounds([lambda: work("a", 1), lambda: work("b", 3)], 2, lambda: now[0])
    assert rounds == [[1, 3], [1, 3]] and calls == ["b", "a", "a", "b", "b", "a"]
    assert main(["bench", "watching", "--shape", "tiny", "--tokens", "5", "--rounds", "1"]) == 0
    assert "70 probes" in capsys.readouterr().out
    for argv in (["--shape", "huge"], ["--tokens", "0"], ["--rounds", "x"]):
        assert main(["bench", "watching", *argv]) == 2 and capsys.readouterr().err.count("\n") == 1
