"""The tables of report.html, each of which sorts by a click on a column's name."""

from collections.abc import Callable, Sequence
from html import escape

from streamprobe.evaluation.rows import PLACE, Row, place, site_cell
from streamprobe.evaluation.verdict import is_certain
from streamprobe.reporting.grids import best_of, grids, interval, lines_of, number

SORTS = "A click on a column's name sorts."
Table = Sequence[tuple[str, Callable[[Row], str]]]  # the name of each column, and its cell of a row


def _lag(row: Row) -> str:
    return f"{row['lag']:+d}"


def _of(name: str) -> Callable[[Row], str]:
    """The cell of a number."""
    return lambda row: number(row, name)


def _interval(name: str) -> Callable[[Row], str]:
    return lambda row: interval(row, name)


PROBES: Table = [
    ("solver", lambda row: row["solver"]),
    ("label", lambda row: row["label"]),
    ("target", lambda row: row["target"]),
    ("lag", _lag),
    ("layer or control", place),
    ("AUROC", _of("auroc")),
    ("95% interval", _interval("auroc")),
    ("gain mbit", _of("gain_bits")),
    ("95% interval", _interval("gain_bits")),
    ("at least", _of("gain_bits_low_corrected")),
    ("gain within", _of("gain_within")),
    ("at least", _of("gain_within_low_corrected")),
    ("certain", lambda row: "yes" if is_certain(row) else ""),
    ("lift", _of("lift")),
    ("95% interval", _interval("lift")),
    ("over", lambda row: row["best_control"]),
    ("AP", _of("average_precision")),
    ("95% interval", _interval("average_precision")),
    ("F1", _of("f1")),
    ("TPR at 5% FPR", _of("tpr_at_5fpr")),
    ("base rate", _of("base_rate")),
    ("tokens", lambda row: str(row["n_tokens"])),
    ("best pass", lambda row: str(row["best_pass"])),
]
KINDS: Table = [
    *PROBES[:4],
    ("kind and layer", place),
    *PROBES[5:7],
    ("over linear", _of("over_linear")),
    ("95% interval", _interval("over_linear")),
    ("at least", _of("over_linear_low_corrected")),
    *PROBES[7:13],
    ("base rate", _of("base_rate")),
]
TEXTS: Table = [
    *PROBES[:2],
    *PROBES[3:5],
    ("pooling", lambda row: row["pooling"]),
    *PROBES[5:7],
    ("TPR at 1% FPR", _of("tpr_at_1fpr")),
    ("95% interval", _interval("tpr_at_1fpr")),
    ("TPR at 5% FPR", _of("tpr_at_5fpr")),
    ("95% interval", _interval("tpr_at_5fpr")),
    ("texts", lambda row: str(row["n_texts"])),
    ("positive", lambda row: str(row["n_positive"])),
]
CATEGORIES: Table = [
    ("category", lambda row: row["category"]),
    *PROBES[:4],
    ("layer", site_cell),
    *PROBES[5:7],
    ("lift", _of("lift")),
    ("95% interval", _interval("lift")),
    ("over", lambda row: row["best_control"]),
    ("AP", _of("average_precision")),
    ("base rate", _of("base_rate")),
    ("positive", lambda row: str(row["n_positive"])),
    ("tokens", lambda row: str(row["n_tokens"])),
    ("chains", lambda row: str(row["n_chains"])),
]


def draw_table(columns: Table, rows: Sequence[Row]) -> str:
    """Every row, to be sorted, without the columns in which nothing stands."""
    shown = [(name, text) for name, text in columns if any(text(row) for row in rows)]
    head = "".join(f"<th scope=col><span role=button tabindex=0>{name}</span></th>" for name, _ in shown)
    body = []
    for row in rows:
        cells = "".join(f"<td>{escape(text(row))}</td>" for _, text in shown)
        body.append(f"<tr{' class=control' if row['control'] else ''}>{cells}</tr>")
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"
    return f"<div class=scroll tabindex=0>{table}</div>"


def best_in_categories(rows: Sequence[Row], categories: Sequence[Row]) -> list[Row]:
    """Of each category and lag the row of the layer that is the best on all test chains, `rows`.

    So no layer is chosen by the chains of the category that judges it.
    """
    best = [row for grid in grids(rows).values() for row in best_of(lines_of(grid)[0].values()).values()]
    chosen = {tuple(row[name] for name in PLACE) for row in best}
    found = [row for row in categories if not row["control"] and tuple(row[name] for name in PLACE) in chosen]
    order = ("category", "solver", "label", "target", "lag", "layer")
    return sorted(found, key=lambda row: tuple(row[name] for name in order))
