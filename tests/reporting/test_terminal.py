"""What is printed at the end: the numbers of the rows, in lines that fit a terminal."""

import math
import re
from pathlib import Path

import pytest
import torch
from scored_chains import HOSTILE

from streamprobe.evaluation.rows import Judged, Row
from streamprobe.evaluation.verdict import verdicts
from streamprobe.reporting.terminal import compare, describe_files, describe_outcome, headline, table, text_table


def test_the_table_is_compact_and_names_the_best_layers(rows: list[Row]) -> None:
    lines = table(rows).splitlines()
    assert max(len(line) for line in lines if HOSTILE not in line) <= 120
    marked = re.findall(r"(\d\.\d{3})\*", "\n".join(lines))
    best = [max((r for r in rows if not r["control"] and r["lag"] == lag), key=lambda r: r["auroc"]) for lag in (0, 8)]
    assert marked == [f"{row['auroc']:.3f}" for row in best]
    ladder = [line.split() for line in lines if re.match(r" +\+\d +\d", line)]
    for cells, row in zip(ladder, best, strict=True):
        assert cells[:3] == [f"{row['lag']:+d}", str(row["layer"]), f"{row['auroc']:.3f}"]
        assert f"{row['lift']:+.3f}" in cells and row["best_control"] in cells
    assert "gain mbit" not in "\n".join(lines) and "certain" not in "\n".join(lines), "where no gain is known"


def test_the_gain_has_its_interval_and_its_corrected_low_end_at_any_width(gained_rows: list[Row]) -> None:
    for width in (None, 120, 80):
        text = table(gained_rows, width=width)
        [line] = [line for line in text.splitlines() if re.match(r" +\+8 +\d", line)]
        assert "+31.00  +11.00 to +51.00" in line and "+12.00" in line
        assert "certain   +8: layer 12   (" in text and text.count("certain   ") == 1
    none = [{**row, "gain_within_low_corrected": -0.1} for row in gained_rows]
    assert "certain   at no lag" in table(none)


def words(text: str) -> list[str]:
    return text.split()


@pytest.mark.parametrize("width", [40, 60, 80, 100])
def test_no_line_is_wider_than_the_terminal_and_no_word_is_broken(
    gained_rows: list[Row], texts: list[Row], width: int
) -> None:
    """Labels are plain here: one that is wider than the terminal has to be left to it."""
    plain, of_texts = ([{**row, "label": "backtracking"} for row in each] for each in (gained_rows, texts))
    whole = verdicts([Judged(row, torch.zeros(20)) for row in plain], 1e-3)
    printed = {
        "table": (table(plain, of_texts, width), None),
        "compare": (compare(plain, plain, width), None),
        "outcome": (describe_outcome(whole, Path("runs/demo"), width), describe_outcome(whole, Path("runs/demo"))),
    }
    for name, (text, unbroken) in printed.items():
        assert max(map(len, text.splitlines())) <= width, name
        assert unbroken is None or words(text) == words(unbroken), name
    assert "nan" not in printed["table"][0]


def test_a_line_is_wider_than_the_terminal_without_wrapping(gained_rows: list[Row]) -> None:
    """Negative control: what goes to a file keeps its lines whole."""
    whole = verdicts([Judged(row, torch.zeros(20)) for row in gained_rows], 1e-3)
    assert max(map(len, describe_outcome(whole, Path("runs/demo")).splitlines())) > 80
    assert max(map(len, table(gained_rows).splitlines())) > 80


def test_the_verdicts_and_the_path_of_the_report_come_last() -> None:
    lines = describe_outcome(["one: a verdict", "two: another"], Path("runs/demo")).splitlines()
    assert [line for line in lines if line] == ["one: a verdict", "two: another", "report    runs/demo/report.html"]


def test_many_lags_are_wrapped_evenly(rows: list[Row]) -> None:
    many = [{**row, "lag": lag} for row in rows for lag in range(20) if row["lag"] == 0]
    lines = table(many).splitlines()
    heads = [line.split()[1:] for line in lines if line.startswith("lag  ")]
    assert [len(head) for head in heads] == [10, 10] and max(map(len, lines[1:])) <= 120
    heads = [line.split()[1:] for line in table(many, width=80).splitlines() if line.startswith("lag  ")]
    assert [len(head) for head in heads] == [7, 7, 6]


def test_a_missing_class_is_named(rows: list[Row]) -> None:
    blank = [{**row, "auroc": math.nan} if row["layer"] == 3 and not row["control"] else row for row in rows]
    assert "2 probes have nan" in table(blank)
    assert "nan:" not in table(rows)
    unknown = [{**row, "auroc": math.nan, "lift": math.nan} for row in rows]
    assert headline(unknown, "newton").keys() < headline(rows, "newton").keys()


def test_the_headline_is_of_one_solver_and_does_not_name_it(rows: list[Row]) -> None:
    others = [{**row, "solver": "adam", "auroc": 2.0, "lift": 2.0} for row in rows]
    found = headline([*others, *rows], "newton")
    own = [row for row in rows if not row["control"]]
    assert found[f"test/highest auroc/{rows[0]['label']}/token"] == max(row["auroc"] for row in own)
    assert not [name for name in found if "newton" in name or "adam" in name]
    assert headline([*others, *rows], "adam") != found


def test_the_headline_has_the_furthest_lag_that_is_certain(rows: list[Row], gained_rows: list[Row]) -> None:
    name = f"test/certain up to lag/{rows[0]['label']}/token"
    assert headline(gained_rows, "newton")[name] == 8
    beyond = [{**row, "gain_bits_low_corrected": 0.1, "lag": 16} if row["lag"] == 8 else row for row in gained_rows]
    assert headline(beyond, "newton")[name] == 16
    clear = [{**row, "lift_low_corrected": 0.5} for row in rows]
    assert name not in headline(clear, "newton"), "of lift alone nothing is certain"


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
