"""`streamprobe compare`: runs side by side, and bad input in a line."""

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from streamprobe.cli import main
from streamprobe.evaluation.rows import COMPARED, FIELDS, Row
from streamprobe.reporting.files import pack_rows

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>'\"&"
GAINS = ("gain_bits", "gain", "gain_within")


def row(label: str, layer: int | str, lag: int, *, auroc: float, gain: float = math.nan) -> Row:
    """A row of results.csv; a `gain` of which half is certain."""
    control = {} if isinstance(layer, int) else {"layer": "", "control": layer}
    gains = {f"{name}{end}": gain for name in GAINS for end in ("", "_low", "_high")}
    lows = {f"{name}_low_corrected": gain / 2 for name in GAINS}
    named = {
        "kind": "linear",
        "site": "resid_post",
        "solver": "newton",
        "label": label,
        "target": "onset",
        "layer": layer,
        "lag": lag,
        "control": "",
    }
    ends = {"auroc": auroc, "auroc_low": auroc - 0.01, "auroc_high": auroc + 0.01, "split": "test"}
    return {**dict.fromkeys(FIELDS, 1), **COMPARED, **named, **control, **ends, **gains, **lows}


def write_run(folder: Path, labels: list[str], gain: float, model: str = "m") -> Path:
    """The files of a finished run that a comparison reads: layers 0 and 1 and a control at lags 0 and 4."""
    folder.mkdir()
    places = [(layer, lag) for layer in (0, 1, "embed") for lag in (0, 4)]
    rows = []
    for label in labels:
        for layer, lag in places:
            of = gain * (layer + 1) if isinstance(layer, int) and lag > 0 else math.nan
            rows.append(row(label, layer, lag, auroc=0.6 if layer == "embed" else 0.8 + 0.1 * layer, gain=of))
    (folder / "results.csv").write_bytes(pack_rows(rows, FIELDS))
    verdicts = [f"{label}, target onset, solver newton: a verdict of {folder.name}" for label in sorted(labels)]
    run = {"config": {"model": model, "data": "chains.json", "layers": [0, 1]}, "verdicts": verdicts}
    (folder / "summary.json").write_text(json.dumps({"run": run}))
    return folder


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with runs a, b and old: b has a second label, old no joint control."""
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "a", ["back"], 0.02)
    write_run(tmp_path / "b", ["back", HOSTILE], -0.01, HOSTILE)
    write_run(tmp_path / "old", ["back"], math.nan)
    return tmp_path


def printed(capsys: Any, *argv: str) -> str:
    assert main(["compare", *argv]) == 0
    said = capsys.readouterr()
    assert not said.err
    return said.out


def test_each_run_has_its_lines_and_each_label_the_runs_that_have_it(here: Path, capsys: Any) -> None:
    text = printed(capsys, "a", "b", "old")
    back, other = text.split(f"{HOSTILE}, target onset")[0], text.split(f"{HOSTILE}, target onset")[1]
    assert re.search(r"AUROC\n  a +0\.900  0\.900\n  b +0\.900  0\.900\n  old +0\.900  0\.900\n", back)
    assert re.search(r"gain mbit\n  a +\+40\.00\n  b +-10\.00\n  old\n", back)
    assert re.search(r"at least\n  a +\+20\.00\n  b +-5\.00\n", back)
    for said in (
        "run       a: model m, layers 0 1; data chains.json",
        "certain   a: up to lag +4 (layer 1, +40.00 mbit a token)",
        "certain   b: at no lag",
        "certain   old: unknown, without a joint control",
        "verdict   a: a verdict of a\n",
    ):
        assert said in back
    assert "  b " in other and "  a " not in other and "  old" not in other


def test_the_page_holds_all_runs_and_text_stays_text(here: Path, capsys: Any) -> None:
    assert printed(capsys, "a", "b", "old", "--html", "page.html").endswith("wrote page.html\n")
    page = Path("page.html").read_text()
    assert "<img" not in page and page.count("<script") == 2 and "alert(1)</script>" not in page
    assert "default-src 'none'" in page and "http:" not in page and "https:" not in page
    links, ids = re.findall(r"href='#(\w+)'", page), re.findall(r"<h2 id=(\w+)>", page)
    assert links == ids == ["family0", "family1"]
    first, second = page.split("<h2 id=family1>")
    first = first[first.index("<h2 id=family0>") :]
    for name in ("a", "b", "old"):
        assert f"<h3>AUROC: {name}</h3>" in first and first.count(f"<b>{name}</b>") == 1
    assert (
        "<h3>Gain in thousandths of a bit a token: a</h3>" in first
        and "<h3>Gain in thousandths of a bit a token: old</h3>" not in first
    )
    assert "<h3>AUROC: b</h3>" in second and "AUROC: a<" not in second
    assert page.count("<dl class=identity>") == 3


def test_lines_fit_a_terminal_of_80_columns(here: Path) -> None:
    from streamprobe.reporting.comparison import describe, read_runs

    runs = read_runs([Path("a"), Path("old")])
    narrow, whole = describe(runs, 40), describe(runs)
    assert max(map(len, narrow.splitlines())) <= 40 < max(map(len, whole.splitlines()))
    assert narrow.split() == whole.split()


def test_runs_of_one_name_are_shown_by_their_path_and_long_names_by_their_end(here: Path, capsys: Any) -> None:
    write_run(here / ("long" * 12 + "end"), ["back"], 0.01)
    Path("x").mkdir()
    shutil.copytree("a", "x/a")
    text = printed(capsys, "a", "x/a", "long" * 12 + "end")
    assert "run       x/a: " in text and re.search(r"\n  \.\.\.(long|ong|ng|g)(long)*end +0\.900", text)


BAD = {
    "one run": (["a"], "a alone; expected two runs or more"),
    "no folder": (["a", "gone"], "gone, which is no folder"),
    "no run": (["a", "empty"], "empty/results.csv, which cannot be read"),
    "twice": (["a", "./a"], "a, given twice"),
    "an earlier version": (["a", "earlier"], "no column gain_bits in it"),
    "no summary": (["a", "half"], "half/summary.json, which cannot be read"),
    "other verdicts": (["a", "odd"], "odd/summary.json, which cannot be read"),
    "no page": (["a", "b", "--html", "gone/page.html"], "--html"),
    "a file of a run": (["a", "b", "--html", "b/results.csv"], "which is a file of the run"),
    "no option": (["a", "b", "--page", "x"], "--page"),
}


@pytest.mark.parametrize("how", BAD)
def test_what_the_user_got_wrong_is_one_line(here: Path, how: str, capsys: Any) -> None:
    Path("empty").mkdir()
    for name in ("earlier", "half", "odd"):
        shutil.copytree("a", name)
    old = Path("earlier/results.csv")
    old.write_text(old.read_text().replace("gain_bits", "gone_bits"))
    Path("half/summary.json").unlink()
    Path("odd/summary.json").write_text('{"run": {"config": {}, "verdicts": []}}')
    argv, said = BAD[how]
    before = Path("b/results.csv").read_bytes()
    assert main(["compare", *argv]) == 2
    error = capsys.readouterr().err
    assert error.startswith("streamprobe: ") and error.count("\n") == 1 and said in error
    assert error.count("; expected ") == error.count("; fix: ") == 1
    assert Path("b/results.csv").read_bytes() == before
