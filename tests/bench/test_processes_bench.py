"""What sharing a pass costs: measured in processes that share one, and refused where it cannot be."""

import json
from pathlib import Path

import pytest

from streamprobe import cli


def test_a_pass_is_measured_in_one_process_and_in_two(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "bench.json"
    words = ["--shape", "tiny", "--chains", "20", "--repeats", "1", "--json", str(out)]
    assert cli.main(["bench", "processes", *words, "--processes", "1", "2"]) == 0
    runs = json.loads(out.read_text())["runs"]
    [one], [two] = runs["1"], runs["2"]
    assert (one["processes"], two["processes"]) == (1, 2)
    assert one["pass"]["moved_bytes"] == 0 < two["pass"]["moved_bytes"] and one["pass"]["cpu_seconds"] > 0
    assert "x first" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [(["--processes", "0"], "processes 0; expected 1 to "), (["--chains", "0"], "chains 0; expected 1 to ")],
)
def test_what_cannot_be_measured(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "processes", "--shape", "tiny", *words]) == 2
    assert said in capsys.readouterr().err
