"""Which kinds of probes the terminal and the report show: those that are certainly above linear probes, and no other."""

import math
from typing import Any

import pytest

from streamprobe.evaluation.rows import COMPARED, FIELDS, Row, place, reads
from streamprobe.reporting.grids import beyond_linear, grids, other_kinds
from streamprobe.reporting.html.tables import KINDS, draw_table
from streamprobe.reporting.terminal import headline, table


def row(kind: str, layer: int | str, lag: int, auroc: float, low: float = math.nan, **other: Any) -> Row:
    """A row of a probe of a kind; `low` is what is certain of it over linear ones."""
    named = {
        "solver": "newton",
        "kind": kind,
        "site": "resid_post",
        "layer": layer,
        "label": "event",
        "target": "onset",
    }
    above = {"over_linear": low + 0.02, "over_linear_low": low, "over_linear_high": low + 0.04}
    numbers = {"auroc": auroc, "auroc_low": auroc - 0.01, "auroc_high": auroc + 0.01, "over_linear_low_corrected": low}
    rest = {"lag": lag, "control": "", "split": "test", "n_positive": 10, "n_tokens": 100}
    return {**dict.fromkeys(FIELDS, 0.5), **COMPARED, **named, **above, **numbers, **rest, **other}


ROWS = [
    row("linear", 3, 0, 0.90),
    row("linear", 3, 4, 0.80),
    row("mlp64", 3, 0, 0.91, -0.001),
    row("mlp64", 3, 4, 0.84, 0.01),
    row("attn4", 3, 4, 0.83, 0.02),
    row("attn4", 5, 4, 0.70, 0.03),
    row("concat", "", 4, 0.86, -0.01),
]


def test_of_each_lag_the_best_kind_is_shown_if_it_is_certain() -> None:
    [family] = other_kinds(ROWS)
    best = beyond_linear(other_kinds(ROWS)[family])
    assert [(each["kind"], each["lag"]) for each in best] == [("mlp64", 4)]
    assert beyond_linear([row("mlp64", 3, 4, 0.99, 0.0)]) == []  # negative control: not above 0
    assert beyond_linear([row("mlp64", 3, 4, 0.99, 1e-4)]) == []  # nor above what training leaves open


def test_the_table_of_layers_is_that_of_linear_probes_and_kinds_stand_below() -> None:
    printed = table(ROWS)
    [grid] = grids(ROWS).values()
    assert list(grid) == ["layer03"]
    assert "kinds     of mlp64, attn4, concat the best of each lag" in printed
    [line] = [line for line in printed.splitlines() if "mlp64" in line and "kinds" not in line]
    assert line.split()[:4] == ["+4", "mlp64", "3", "0.840"] and "+0.030" in line
    assert "attn4 " not in printed.split("at least")[-1], "only the best of a lag"


def test_another_site_is_named_in_a_column_that_is_wide_enough() -> None:
    rows = [*ROWS[:2], row("mlp64", 3, 4, 0.84, 0.01, site="attn_out"), row("concat", "", 0, 0.93, 0.01)]
    head, *lines = table(rows).split("above the linear probe of its layer\n\n")[1].splitlines()[:3]
    assert [line.split()[:3] for line in lines] == [["+0", "concat", "all"], ["+4", "mlp64", "attn_out03"]]
    for line, cell in zip(lines, ("all", "attn_out03"), strict=True):
        assert line.index(cell) + len(cell) == head.index("layer") + len("layer")


def test_where_none_is_certain_a_line_says_so_and_nothing_without_other_kinds() -> None:
    none = [each for each in ROWS if each["kind"] in ("linear", "concat")]
    assert "none of concat is certainly above linear probes at any lag" in table(none)
    assert "kinds" not in table([each for each in ROWS if each["kind"] == "linear"])


def test_of_all_kinds_the_furthest_lag_is_the_one_by_which_runs_compare() -> None:
    sure = {"gain_bits_low_corrected": 0.01, "gain_within_low_corrected": 0.01}
    rows = [
        row("linear", 3, 4, 0.8, **sure),
        row("mlp64", 3, 8, 0.9, 0.01, **sure),
        row("mlp64", 3, 16, 0.9, -0.01, **sure),
    ]
    found = headline(rows, "newton")
    assert found["test/certain up to lag/event/onset"] == 8, "what is not certainly above linear probes is not named"
    assert found["test/highest auroc/event/onset"] == 0.8 and found["test/highest auroc of mlp64/event/onset"] == 0.9


@pytest.mark.parametrize(
    "named, short, long",
    [
        (row("linear", 12, 0, 0.5), "layer12", "layer 12"),
        (row("mlp64", 12, 0, 0.5), "mlp64 layer12", "mlp64 of layer 12"),
        (row("concat", "", 0, 0.5), "concat layers", "concat of all layers"),
        (row("attn4", 3, 0, 0.5, site="attn_out"), "attn4 attn_out03", "attn4 of attn_out of layer 3"),
        (row("linear", "", 0, 0.5, control="text", site=""), "text", None),
        (row("linear", 12, 0, 0.5, control="permuted"), "permuted layer12", None),
    ],
)
def test_every_probe_has_a_short_name_and_one_for_sentences(named: Row, short: str, long: str | None) -> None:
    assert place(named) == short
    assert long is None or reads(named) == long


def test_the_report_has_a_row_for_each_of_them() -> None:
    drawn = draw_table(KINDS, beyond_linear(ROWS))
    assert drawn.count("<tr") == 2 and "<td>mlp64 layer03</td>" in drawn and "<td>0.030</td>" in drawn
