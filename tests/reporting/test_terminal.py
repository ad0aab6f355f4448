"""What is printed at the end: the numbers of the rows, in lines that fit a terminal."""

import math
import re
from pathlib import Path

from scored_chains import HOSTILE

from streamprobe.evaluation.results import ScoredProbes, judge
from streamprobe.evaluation.rows import Row
from streamprobe.evaluation.verdict import verdicts
from streamprobe.reporting.terminal import compare, describe_files, headline, table, text_table


def test_the_table_is_compact_and_ends_in_its_verdict(groups: list[ScoredProbes], rows: list[Row]) -> None:
    given = verdicts(judge(groups, len(groups[0].scored.chain.unique()), 20, 0), 1e-3)
    lines = table(rows, given).splitlines()
    assert max(len(line) for line in lines if HOSTILE not in line) <= 120
    assert lines[-1] == given[-1]
    marked = re.findall(r"(\d\.\d{3})\*", "\n".join(lines))
    best = [max((r for r in rows if not r["control"] and r["lag"] == lag), key=lambda r: r["auroc"]) for lag in (0, 8)]
    assert marked == [f"{row['auroc']:.3f}" for row in best]
    ladder = [line.split() for line in lines if re.match(r" +\+\d +\d", line)]
    for cells, row in zip(ladder, best, strict=True):
        assert cells[:3] == [f"{row['lag']:+d}", str(row["layer"]), f"{row['auroc']:.3f}"]
        assert f"{row['lift']:+.3f}" in cells and row["best_control"] in cells


def test_many_lags_are_wrapped(rows: list[Row]) -> None:
    many = [{**row, "lag": lag} for row in rows for lag in range(20) if row["lag"] == 0]
    lines = table(many, ["verdict"]).splitlines()
    assert sum(line.startswith("lag  ") for line in lines) == 2 and max(map(len, lines[1:])) <= 120


def test_a_missing_class_is_named(rows: list[Row]) -> None:
    blank = [{**row, "auroc": math.nan} if row["layer"] == 3 and not row["control"] else row for row in rows]
    assert "2 probes have nan" in table(blank, ["verdict"])
    assert "nan:" not in table(rows, ["verdict"])
    unknown = [{**row, "auroc": math.nan, "lift": math.nan} for row in rows]
    assert headline(unknown, "newton").keys() < headline(rows, "newton").keys()


def test_the_headline_is_of_one_solver_and_does_not_name_it(rows: list[Row]) -> None:
    others = [{**row, "solver": "adam", "auroc": 2.0, "lift": 2.0} for row in rows]
    found = headline([*others, *rows], "newton")
    own = [row for row in rows if not row["control"]]
    assert found[f"test/highest auroc/{rows[0]['label']}/token"] == max(row["auroc"] for row in own)
    assert not [name for name in found if "newton" in name or "adam" in name]
    assert headline([*others, *rows], "adam") != found


def test_other_chains_are_judged_by_the_layer_that_the_runs_own_test_chose(rows: list[Row]) -> None:
    """Also where another layer is better there; the lines fit a terminal."""
    turned = {3: 0.2, 12: 0.9}
    here = [{**row, "auroc": turned[row["layer"]]} if not row["control"] else row for row in rows]
    before = [{**row, "auroc": 1 - turned[row["layer"]]} if not row["control"] else row for row in rows]
    for now, expected in ((here, ["3", "0.800", "0.200"]), (before, ["3", "0.800", "0.800"])):
        lines = compare(before, now).splitlines()
        assert max(len(line) for line in lines if HOSTILE not in line) <= 120
        found = [line.split() for line in lines if re.match(r" +\+\d +\d", line)]
        assert [[cells[1], cells[2], cells[4]] for cells in found] == [expected, expected]


def test_files_are_listed_with_their_sizes(folder: Path) -> None:
    (folder / "checkpoint").mkdir()
    (folder / "checkpoint/state.safetensors").write_bytes(bytes(2_500_000))
    text = describe_files(folder)
    assert (
        "checkpoint/ 2.5 MB" in text
        and f"results.csv {round((folder / 'results.csv').stat().st_size / 1e3)} kB" in text
    )


def test_whole_texts_have_a_line_for_each_pooling(texts: list[Row]) -> None:
    head, blank, names, *lines = text_table(texts).splitlines()
    assert HOSTILE in head and "17 of 1,234 positive" in head and not blank
    assert names.split()[:3] == ["pooling", "layer", "AUROC"] and max(len(line) for line in (names, *lines)) <= 120
    for line, pooling in zip(lines, ("mean", "max", "last"), strict=True):
        assert line.split()[:3] == [pooling, "3", "0.800"] and line.split()[-2:] == ["embed", "0.600"]
        assert "0.250 to 0.250" in line and "nan" not in line
    alone = text_table([row for row in texts if not row["control"]])
    assert "embed" not in alone and alone.splitlines()[-1].startswith("last")
    both = text_table([*texts, *({**row, "solver": "adam"} for row in texts)])
    assert both.count("whole texts") == 2 and both.count("\nmean") == 2
