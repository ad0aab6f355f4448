"""report.html: one page that holds all it shows and asks the network for nothing.  Text from the data is escaped."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from streamprobe.controls.table import CONTROLS
from streamprobe.evaluation.rows import Row, place
from streamprobe.reporting.html.charts import lag_curves, metric_map
from streamprobe.reporting.html.document import document, own_file
from streamprobe.reporting.terminal import Grid, grids

KINDS = {
    "hit": ("Best hits", "sections, or their beginnings, with the highest mean probability"),
    "miss": ("Worst misses", "those whose highest probability is the lowest"),
    "false alarm": ("Worst false alarms", "tokens with the highest probability that are not what was asked for"),
}
NUMBERS = (
    "All numbers are of held-out test chains; intervals are 95% over resampled chains. Lag k: the activation at token "
    "t predicts the label at token t + k, so a positive lag looks ahead. Lift: AUROC above that of the best control."
)

SORTS = "A click on a column's name sorts."
TEXTS = (
    "A text's score is the mean, the maximum or the last of the probabilities at its tokens; intervals are over "
    "resampled texts. TPR at 1% FPR: the share of positive texts above a threshold that at most 1% of the others reach."
)


def render(
    name: str,
    rows: Sequence[Row],
    run: Mapping[str, Any],
    transcripts: Mapping[str, Any],
    *,
    texts: Sequence[Row] = (),
) -> str:
    """The page of a run: its rows, the `run` part of its summary.json, its transcripts.json and its rows of texts."""
    families = grids(rows)
    links = [f"<a href='#family{i}'>{escape(_title(family))}</a>" for i, family in enumerate(families)]
    body = [
        *(f"<p class=verdict>{escape(sentence)}</p>" for sentence in run["verdicts"]),
        f"<p class=note>{NUMBERS}</p>",
        f"<nav>{' '.join(links)} <a href='#read'>Held-out chains</a><a href='#all'>All probes</a>"
        + "<a href='#texts'>Whole texts</a>" * bool(texts)
        + "<a href='#run'>The run</a></nav>",
        *(_family(i, family, grid) for i, (family, grid) in enumerate(families.items())),
        _chains(transcripts),
        f"<h2 id=all>All probes and controls</h2><p class=note>{SORTS}</p>{_table(TABLE, rows)}",
        f"<h2 id=texts>Whole texts</h2><p class=note>{TEXTS} {SORTS}</p>{_table(TEXT_TABLE, texts)}" if texts else "",
        _run(run),
    ]
    return document(name, body, style=own_file("page.css"), script=own_file("page.js"), held=transcripts)


def _title(family: tuple[str, str, str]) -> str:
    solver, label, target = family
    return f"{label}, target {target}, solver {solver}"


def _family(number: int, family: tuple[str, str, str], grid: Grid) -> str:
    """Curves and heat maps of one solver, label and target."""
    flat = [row for line in grid.values() for row in line.values()]
    elements = [
        f"<h2 id=family{number}>{escape(_title(family))}</h2>",
        f"<div class=wide>{lag_curves(grid)}</div>",
        "<p class=note>Blue: the best layer of each lag with its interval. Grey: every layer. Dashed: controls.</p>",
        f"<h3>AUROC</h3><div class=wide>{metric_map(grid, 'auroc')}</div>",
    ]
    if any(not math.isnan(row["lift"]) for row in flat):
        elements.append(f"<p class=note>{escape(_legend())}</p>")
        elements.append(f"<h3>Lift over the best control</h3><div class=wide>{metric_map(grid, 'lift')}</div>")
    base = [row["base_rate"] for row in flat if not row["control"] and not math.isnan(row["base_rate"])]
    rates = f" (base rate {min(base):.3f} to {max(base):.3f})" if base else ""
    elements.append(
        f"<details><summary>Average precision{rates}</summary>"
        f"<div class=wide>{metric_map(grid, 'average_precision')}</div></details>"
    )
    return "".join(elements)


def _legend() -> str:
    """What each control is given."""
    said = {name: control.about + " (the highest layer)" * bool(control.relabel) for name, control in CONTROLS.items()}
    return "Controls: " + "; ".join(f"{name}: {about}" for name, about in said.items()) + "."


def _chains(transcripts: Mapping[str, Any]) -> str:
    """The places of the chains, which the script fills."""
    best = transcripts["reference"]
    if not best:
        return "<h2 id=read>Held-out chains</h2><p class=note>No probe has both classes among the test tokens.</p>"
    elements = [
        "<h2 id=read>Held-out chains</h2>",
        f"<p class=note>Picked by the probe with {escape(transcripts['picked_by'])}: layer {best['layer']}, "
        f"lag {best['lag']:+d}, {escape(_title((best['solver'], best['label'], best['target'])))}. "
        "Any other can paint them.</p>",
        "<fieldset id=chooser></fieldset>",
        "<p class='note key'><span class=in>a true section</span><span class=picked>what was picked</span></p>"
        "<p class=note id=said></p>",
    ]
    kind = None
    for number, chain in enumerate(transcripts["chains"]):
        if chain["kind"] != kind:
            kind = chain["kind"]
            title, meaning = KINDS[kind]
            elements.append(f"<h3>{title}</h3><p class=note>{meaning}</p>")
        last = chain["first"] + len(chain["tokens"]) - 1
        elements.append(
            f"<p class=note>{escape(str(chain['id']))}, tokens {chain['first']} to {last} of {chain['length']}</p>"
            f"<div class=text id=chain{number} tabindex=0></div>"
        )
    return "".join(elements)


Table = Sequence[tuple[str, Callable[[Row], str]]]  # the name of each column, and its cell of a row
TABLE: Table = [
    ("solver", lambda row: row["solver"]),
    ("label", lambda row: row["label"]),
    ("target", lambda row: row["target"]),
    ("lag", lambda row: f"{row['lag']:+d}"),
    ("layer or control", place),
    ("AUROC", lambda row: _number(row["auroc"])),
    ("95% interval", lambda row: _interval(row, "auroc")),
    ("lift", lambda row: _number(row["lift"])),
    ("95% interval", lambda row: _interval(row, "lift")),
    ("over", lambda row: row["best_control"]),
    ("AP", lambda row: _number(row["average_precision"])),
    ("95% interval", lambda row: _interval(row, "average_precision")),
    ("F1", lambda row: _number(row["f1"])),
    ("TPR at 5% FPR", lambda row: _number(row["tpr_at_5fpr"])),
    ("base rate", lambda row: _number(row["base_rate"])),
    ("tokens", lambda row: str(row["n_tokens"])),
    ("best pass", lambda row: str(row["best_pass"])),
]


TEXT_TABLE: Table = [
    *TABLE[:2],
    *TABLE[3:5],
    ("pooling", lambda row: row["pooling"]),
    *TABLE[5:7],
    ("TPR at 1% FPR", lambda row: _number(row["tpr_at_1fpr"])),
    ("95% interval", lambda row: _interval(row, "tpr_at_1fpr")),
    ("TPR at 5% FPR", lambda row: _number(row["tpr_at_5fpr"])),
    ("95% interval", lambda row: _interval(row, "tpr_at_5fpr")),
    ("texts", lambda row: str(row["n_texts"])),
    ("positive", lambda row: str(row["n_positive"])),
]


def _table(columns: Table, rows: Sequence[Row]) -> str:
    """Every row, to be sorted."""
    head = "".join(f"<th scope=col><button type=button>{name}</button></th>" for name, _ in columns)
    body = []
    for row in rows:
        cells = "".join(f"<td>{escape(text(row))}</td>" for _, text in columns)
        body.append(f"<tr{' class=control' if row['control'] else ''}>{cells}</tr>")
    return f"<div class=scroll><table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"


def _number(x: float) -> str:
    return "" if math.isnan(x) else f"{x:.3f}"


def _interval(row: Row, name: str) -> str:
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    return "" if math.isnan(low) else f"{low:.3f} to {high:.3f}"


def _run(run: Mapping[str, Any]) -> str:
    """What the run cost, was given and read."""
    config = "\n".join(f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in run["config"].items())
    rest = {n: v for n, v in run.items() if n not in ("config", "verdicts", "preflight", "counts", "versions")}
    facts = "\n".join(f"{name}: {value}" for name, value in (rest | run["versions"]).items())
    return (
        f"<h2 id=run>The run</h2><details open><summary>Data</summary><pre>{escape(run['preflight'])}</pre></details>"
        f"<details><summary>Config</summary><pre>{escape(config)}</pre></details>"
        f"<details><summary>Cost and versions</summary><pre>{escape(facts)}</pre></details>"
    )
