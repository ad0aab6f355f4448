"""Lines are broken between words and stand below where their text began; a file or pipe gets them whole."""

import io
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from streamprobe.system import wrapping
from streamprobe.system.wrapping import columns_of, wrapped

LINE = "memory    1.21 GB at most; 25467 tokens on cpu, kept; newton's matrices one per layer and column, and more"
PROSE = "backtracking, target onset, solver newton: lag +8 is the largest at which a layer is above every control"


@pytest.mark.parametrize("width", [30, 40, 79, 80])
@pytest.mark.parametrize("text", [LINE, PROSE, f"    {PROSE}", f"{LINE}\n\n{PROSE}"])
def test_every_line_fits_and_every_word_is_whole(text: str, width: int) -> None:
    broken = wrapped(text, width)
    assert max(map(len, broken.split("\n"))) <= width and broken.split() == text.split()
    assert wrapped(broken, width) == broken or "    " in broken


def test_what_follows_stands_below_where_the_text_began() -> None:
    first, *rest = wrapped(LINE, 60).split("\n")
    assert first.startswith("memory    1.21") and rest and all(re.match(r" {10}\S", line) for line in rest)
    _, *rest = wrapped(PROSE, 60).split("\n")
    assert rest and all(re.match(r" {4}\S", line) for line in rest)
    _, *rest = wrapped(f"      41  {PROSE}", 60).split("\n")
    assert rest and all(re.match(r" {10}\S", line) for line in rest)


def test_short_lines_and_spaces_in_them_stay() -> None:
    text = "lag     -8     -4\nlayer0  0.1\n\n  a    b  "
    assert wrapped(text, 30) == text


def test_a_word_that_is_wider_is_left_whole() -> None:
    path = "/a/very/long/path/" + "x" * 50
    assert path in wrapped(f"report    {path}", 40)


def test_nothing_is_broken_without_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    assert columns_of(io.StringIO()) is None and columns_of(None) is None
    assert wrapped(LINE, None) == LINE
    monkeypatch.setattr(wrapping.shutil, "get_terminal_size", lambda: os.terminal_size((10, 24)))
    with open(os.devnull) as file:
        assert columns_of(file) is None


def test_a_terminal_gets_lines_that_fit_it(tmp_path: Path) -> None:
    """A real one of 50 columns: both what is printed and the line of an error."""
    script = tmp_path / "prints.py"
    script.write_text(f"from streamprobe.system.console import say, warn\nsay({LINE!r})\nwarn({PROSE!r})\n")
    near, far = pty.openpty()
    environment = {**os.environ, "COLUMNS": "50", "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([sys.executable, str(script)], stdout=far, stderr=far, env=environment, check=True)
    os.close(far)
    shown = b""
    try:
        while piece := os.read(near, 4096):
            shown += piece
    except OSError:  # the end of a pseudo-terminal
        pass
    os.close(near)
    lines = shown.decode().replace("\r", "").splitlines()
    assert max(map(len, lines)) <= 50 and " ".join(lines).split() == f"{LINE} {PROSE}".split()
