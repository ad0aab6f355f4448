"""A run's files make its report anew, and those that cannot be read are refused in a line."""

import json
import math
import shutil
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

import pytest
from scored_chains import HOSTILE

from streamprobe.cli import main
from streamprobe.evaluation.results import TestResults
from streamprobe.evaluation.rows import FIELDS, Row
from streamprobe.evaluation.texts import POOLINGS
from streamprobe.reporting import files


def test_the_report_is_rebuilt_from_the_files_of_a_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files.write_report(folder)
    first = (folder / "report.html").read_bytes()
    (folder / "report.html").unlink()
    assert main(["report", str(folder)]) == 0
    assert (folder / "report.html").read_bytes() == first
    assert capsys.readouterr().out == f"wrote {folder / 'report.html'}\n"


def edit(folder: Path, name: str, old: str, new: str) -> None:
    """Replaces the first `old` in a file of the folder."""
    text = (folder / name).read_text()
    assert old in text
    (folder / name).write_text(text.replace(old, new, 1))


def with_texts(folder: Path, results: TestResults, texts: list[Row]) -> None:
    """Adds the file of whole texts to a run's files."""
    (folder / "texts.csv").write_bytes(files.FILES["texts.csv"].make(replace(results, texts=texts)) or b"")


def test_whole_texts_have_a_file_and_a_table_in_the_report(
    folder: Path, results: TestResults, texts: list[Row]
) -> None:
    assert files.FILES["texts.csv"].make(results) is None, "of data with sections"
    without = files.draw_report(folder).decode()
    with_texts(folder, results, texts)
    page = files.draw_report(folder).decode()
    assert "Whole texts" not in without and "<h2 id=texts>Whole texts</h2>" in page
    table = page[page.index("<h2 id=texts>") : page.index("<h2 id=run>")]
    assert table.count("<tr") == 1 + len(texts) and table.count("<tr class=control>") == len(POOLINGS)
    for shown in (*POOLINGS, "layer03", "embed", "0.800", "0.250 to 0.250", "1234", "17"):
        assert f"<td>{shown}</td>" in table
    assert HOSTILE not in table and escape(HOSTILE) in table


def test_a_broken_file_of_whole_texts_is_refused_in_a_line(
    folder: Path, results: TestResults, texts: list[Row], capsys: Any
) -> None:
    for old, new in ((",0.8,", ",x,"), (",0.8,", ",1e300,"), ("pooling", "pooled"), (",1234,", ",inf,")):
        with_texts(folder, results, texts)
        edit(folder, "texts.csv", old, new)
        assert main(["report", str(folder)]) == 2
        error = capsys.readouterr().err
        assert "texts.csv, which cannot be read" in error and error.count("\n") == 1


def curve_of(folder: Path) -> dict[str, Any]:
    """A curve of the first probe of the folder's transcripts."""
    place = json.loads((folder / "transcripts.json").read_text())["probes"][0]
    return place | {"recall": [0.5], "precision": [0.5], "tp": 1, "fp": 1, "fn": 1, "tn": 1}


def test_a_curve_that_is_whole_is_read(folder: Path) -> None:
    """Negative control: what the tests below break can be read."""
    (folder / "curves.json").write_text(json.dumps([curve_of(folder)]))
    assert '"counts":[1,1,1,1]' in files.draw_report(folder).decode()


BROKEN = {
    "no folder": shutil.rmtree,
    "no rows": lambda f: (f / "results.csv").unlink(),
    "an empty table": lambda f: (f / "results.csv").write_text(""),
    "a header alone": lambda f: (f / "results.csv").write_text(",".join(FIELDS)),
    "another table": lambda f: (f / "results.csv").write_text("a,b\n1,2\n"),
    "a word for a number": lambda f: edit(f, "results.csv", ",0.", ",x"),
    "a cut-off row": lambda f: (f / "results.csv").write_text((f / "results.csv").read_text()[:-80]),
    "no summary": lambda f: (f / "summary.json").unlink(),
    "a cut-off summary": lambda f: (f / "summary.json").write_text('{"run": {'),
    "an older summary": lambda f: (f / "summary.json").write_text('{"run": {"config": {}}}'),
    "no transcripts": lambda f: (f / "transcripts.json").unlink(),
    "a list": lambda f: (f / "transcripts.json").write_text("[]"),
    "no text": lambda f: (f / "transcripts.json").write_bytes(b"\xff\xfe\x00"),
    "curves in no list": lambda f: (f / "curves.json").write_text("{}"),
    "a curve without its probe": lambda f: (f / "curves.json").write_text('[{"recall": []}]'),
    "a curve of words": lambda f: (f / "curves.json").write_text(json.dumps([curve_of(f) | {"recall": ["x"]}])),
    "a curve that no script can read": lambda f: (f / "curves.json").write_text(
        json.dumps([curve_of(f) | {"recall": [math.nan]}])
    ),
    "bins without a column": lambda f: (f / "reliability.csv").write_text("solver,layer\nnewton,3\n"),
    "categories cut off": lambda f: (f / "categories.csv").write_text("category,solver\n"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_run_that_cannot_be_read_is_refused_in_a_line(
    folder: Path, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    BROKEN[how](folder)
    assert main(["report", str(folder)]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and len(printed.err.splitlines()) == 1
    assert (
        printed.err.startswith("streamprobe: ")
        and printed.err.count("; expected ") == printed.err.count("; fix: ") == 1
    )
    assert str(folder) in printed.err
    assert main(["report"]) == 2 and main(["report", "a", "b"]) == 2


def test_a_report_that_cannot_be_written_or_drawn_is_refused_in_a_line(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, capsys: Any
) -> None:
    for number, spoil in enumerate(
        (
            lambda f: (f / "report.html").mkdir(),
            lambda f: (f / "results.csv").write_text((f / "results.csv").read_text().replace(",embed,", ",emblem,")),
            lambda f: (f / "transcripts.json").write_text(
                (f / "transcripts.json").read_text().replace('"kind"', '"sort"')
            ),
        )
    ):
        copy = tmp_path_factory.mktemp("runs") / str(number)
        shutil.copytree(folder, copy)
        (copy / "report.html").unlink(missing_ok=True)
        spoil(copy)
        assert main(["report", str(copy)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("streamprobe: ") and error.count("\n") == 1 and "Traceback" not in error
