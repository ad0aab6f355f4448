"""What a run ends with in the terminal: the table of each label and target, the cost, the files, and then the verdicts.

Every table takes the width that it may have, and leaves out its least important columns where that is too little.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from streamprobe.evaluation.rows import PLACE, Row, site_cell
from streamprobe.evaluation.texts import POOLINGS, best_text_rows
from streamprobe.reporting.grids import (
    Grid,
    best_of,
    beyond_linear,
    certain,
    gained,
    grids,
    interval,
    known,
    lags_of,
    layers_by_lag,
    lines_of,
    number,
    other_kinds,
    rows_of,
    title,
)
from streamprobe.reporting.text_table import Shown, draw_table, interval_column, number_column
from streamprobe.system.wrapping import wrapped

WIDE = 120  # columns of what goes to no terminal
NAME, CELL = 12, 7  # columns of a name, and of the number of a lag
MOST_LAGS = 14  # side by side
LISTED = 100  # columns of the list of files, at most
UNBROKEN = "\xa0"  # a space at which no line ends


BEST = [
    Shown("lag", 5, lambda row: f"{row['lag']:+d}", 0),
    Shown("layer", 6, lambda row: f" {site_cell(row)}", 0),
    number_column("AUROC", 7, 0, "auroc"),
    interval_column(16, 4, "auroc"),
    number_column("gain mbit", 10, 0, "gain_bits", sign="+"),
    interval_column(18, 1, "gain_bits", "+"),
    number_column("at least", 9, 2, "gain_bits_low_corrected", sign="+"),
    number_column("lift", 7, 3, "lift", sign="+"),
    interval_column(18, 9, "lift", "+"),
    Shown("  over", -14, lambda row: f"  {row['best_control']}".rstrip(), 5),
    number_column("AP", 6, 6, "average_precision"),
    number_column("base", 7, 7, "base_rate"),
    number_column("F1", 7, 8, "f1"),
    Shown("positive of tokens", 20, lambda row: f"{row['n_positive']:>8,} of {row['n_tokens']:>7,}", 10),
]


OTHER_KINDS = [
    Shown("lag", 5, lambda row: f"{row['lag']:+d}", 0),
    Shown("  kind", -12, lambda row: f"  {row['kind']}", 0),
    Shown("layer", 6, lambda row: f" {site_cell(row)}", 0),
    number_column("AUROC", 7, 0, "auroc"),
    interval_column(16, 4, "auroc"),
    number_column("over linear", 12, 0, "over_linear", sign="+"),
    interval_column(18, 1, "over_linear", "+"),
    number_column("at least", 9, 2, "over_linear_low_corrected", sign="+"),
    number_column("gain mbit", 10, 3, "gain_bits", sign="+"),
    number_column("at least", 9, 3, "gain_bits_low_corrected", sign="+"),
]


def _kinds(rows: Sequence[Row], room: int, width: int | None) -> list[str]:
    """Of each lag the best kind of probe, where it is certainly above linear ones; nothing in a run of these alone."""
    if not rows:
        return []
    names, best = ", ".join(dict.fromkeys(row["kind"] for row in rows)), beyond_linear(rows)
    if not best:
        return [wrapped(f"kinds     none of {names} is certainly above linear probes at any lag", width)]
    said = f"kinds     of {names} the best of each lag that is certainly above the linear probe of its layer"
    return ["", wrapped(said, width), "", *draw_table(OTHER_KINDS, best, room)]


def table(rows: Sequence[Row], texts: Sequence[Row] = (), width: int | None = None) -> str:
    """For each solver, label and target: AUROC by layer or control and lag, and the best layer of each lag.

    Below it what is certain, and behind it what is found of whole texts, if there is anything.
    """
    room, kinds = width or WIDE, other_kinds(rows)
    lines: list[str] = []
    for (solver, label, target), grid in grids(rows).items():
        layers, controls = lines_of(grid)
        best = best_of(layers.values())
        heading = f"test AUROC   {label}, target {target}, solver {solver}   (*: best of its lag)"
        lines += [wrapped(heading, width), ""]
        lags = lags_of(grid)
        at_once = evenly(len(lags), min(MOST_LAGS, max(1, (room - NAME) // CELL)))
        for start in range(0, len(lags), at_once):
            lines += [*_by_layer_and_lag(layers, controls, best, lags[start : start + at_once]), ""]
        lines += draw_table(BEST, list(best.values()), room)
        lines += [wrapped(note, width) for note in (*_notes_on_gain(layers), *_notes_on_probes(rows_of(grid)))]
        lines += _kinds(kinds.get((solver, label, target), []), room, width)
        lines += ["", ""]
    return "\n".join([*lines, text_table(texts, width), ""] if texts else lines[:-1])


def evenly(n: int, most: int) -> int:
    """How many of n to put side by side: with no more rows than `most` would need, all about as long."""
    return math.ceil(n / math.ceil(n / most))


def _by_layer_and_lag(layers: Grid, controls: Grid, best: Mapping[int, Row], lags: Sequence[int]) -> list[str]:
    """AUROC, a line for each layer or control and a column for each lag."""
    every = layers | controls
    wide = max(NAME, *(len(name) + 1 for name in every))
    lines = [f"{'lag':<{wide}}" + "".join(f"{lag:>+6d} " for lag in lags).rstrip()]
    for name, line in every.items():
        cells = [
            f"{line[lag]['auroc']:>6.3f}" + " *"[line[lag] is best.get(lag)] if lag in line else " " * CELL
            for lag in lags
        ]
        lines.append((f"{name:<{wide}}" + "".join(cells)).rstrip())
    return lines


def _notes_on_gain(layers: Grid) -> list[str]:
    """Which layers are certainly ahead of the joint control, where there is one."""
    if not gained(layers):
        return []
    found = layers_by_lag(certain(rows_of(layers)))
    named = (f"{lag:+d}: layer{'s' * (len(own) > 1)} {' '.join(map(str, own))}" for lag, own in found.items())
    meaning = "(gain bits and gain within chains above 0, corrected for all probes looked at)"
    return [f"certain   {'; '.join(named) or 'at no lag'}   {meaning}", "mbit: thousandths of a bit a token"]


def _notes_on_probes(rows: Sequence[Row]) -> list[str]:
    """How many probes lack a class, and how far they are from the exact solution."""
    lines = []
    blank = sum(math.isnan(row["auroc"]) for row in rows)
    if blank:
        lines.append(f"{blank} probes have nan: their test tokens lack a class")
    norms = sorted(row["gradient_norm"] for row in known(rows, "gradient_norm"))
    if norms:
        lines.append(f"gradient norm: largest {norms[-1]:.1e}, median {norms[len(norms) // 2]:.1e}")
    return lines


class Pair(NamedTuple):
    """The row of a probe on the run's own test chains, and on other ones."""

    there: Row
    here: Row


TRANSFER = [
    Shown("lag", 5, lambda pair: f"{pair.there['lag']:+d}", 0),
    Shown("layer", 6, lambda pair: f" {site_cell(pair.there)}", 0),
    Shown("AUROC", 8, lambda pair: number(pair.there, "auroc"), 0),
    Shown("lift", 8, lambda pair: number(pair.there, "lift", "+"), 1),
    Shown("AUROC", 9, lambda pair: number(pair.here, "auroc"), 0),
    Shown("  95% interval", -16, lambda pair: f"  {interval(pair.here, 'auroc')}".rstrip(), 2),
    Shown("lift", 8, lambda pair: number(pair.here, "lift", "+"), 1),
    Shown("  95% interval", -18, lambda pair: f"  {interval(pair.here, 'lift', '+')}".rstrip(), 3),
]


def compare(before: Sequence[Row], rows: Sequence[Row], width: int | None = None) -> str:
    """For each solver, label and target a line a lag: the layer that is the best in `before`, there and in `rows`."""
    here = {tuple(row[name] for name in PLACE): row for row in rows if not row["control"]}
    lines: list[str] = []
    for family, grid in grids(before).items():
        best = best_of(lines_of(grid)[0].values()).values()
        pairs = [Pair(row, here[tuple(row[name] for name in PLACE)]) for row in best]
        heading = f"transfer     {title(family)}: the layer that is best on the run's test chains"
        lines += [
            wrapped(heading, width),
            "",
            f"{'there':>19}{'here':>17}",
            *draw_table(TRANSFER, pairs, width or WIDE),
            "",
        ]
    return "\n".join(lines)


class OfText(NamedTuple):
    """The row of a probe on whole texts, and that of its best control, if it has one."""

    probe: Row
    control: Row | None


def _of_probe(column: Shown) -> Shown:
    """The column of a row as that of a pair, of its probe."""
    return column._replace(text=lambda pair: column.text(pair.probe))


OF_TEXTS = [
    Shown("pooling", -9, lambda pair: pair.probe["pooling"], 0),
    Shown("layer", 5, lambda pair: f" {site_cell(pair.probe)}", 0),
    _of_probe(number_column("AUROC", 8, 0, "auroc")),
    _of_probe(interval_column(17, 1, "auroc")),
    _of_probe(number_column("TPR at 1%", 11, 2, "tpr_at_1fpr")),
    _of_probe(interval_column(17, 5, "tpr_at_1fpr")),
    _of_probe(number_column("TPR at 5%", 11, 4, "tpr_at_5fpr")),
    _of_probe(interval_column(17, 6, "tpr_at_5fpr")),
    Shown("  control", -13, lambda pair: f"  {pair.control['control']}" if pair.control else "", 3),
    Shown("AUROC", 7, lambda pair: number(pair.control, "auroc") if pair.control else "", 3),
]


def text_table(rows: Sequence[Row], width: int | None = None) -> str:
    """For each solver, label and pooling of whole texts: its best layer, beside its best control."""
    found: dict[tuple[str, str, int], list[OfText]] = {}
    for probe, control in best_text_rows(rows):
        found.setdefault((probe["solver"], probe["label"], probe["lag"]), []).append(OfText(probe, control))
    lines: list[str] = []
    for (solver, label, lag), pairs in found.items():
        first = next(pair.probe for pair in pairs if pair.probe["pooling"] == POOLINGS[0])
        counts = f"{first['n_positive']:,} of {first['n_texts']:,} positive"
        heading = (
            f"whole texts   {label}, solver {solver}, lag {lag:+d}: {counts}   (the best layer and the best control; "
            "TPR at 1% and 5% FPR)"
        )
        lines += [*([""] if lines else []), wrapped(heading, width), "", *draw_table(OF_TEXTS, pairs, width or WIDE)]
    return "\n".join(lines)


def headline(rows: Iterable[Row], solver: str) -> dict[str, float]:
    """The numbers by which runs compare, by the names that TensorBoard gives them: those of one solver, unnamed.

    Of each label and target the furthest lag that is certain, of any kind of probe, and of linear ones the highest gain
    in bits, lift, AUROC and average precision; of each other kind the highest AUROC.
    """
    found: dict[str, float] = {}
    own = [row for row in rows if row["solver"] == solver]
    kinds = other_kinds(own)
    for family, grid in grids(own).items():
        real, named = rows_of(lines_of(grid)[0]), "/".join(family[1:])
        clear = [row["lag"] for row in certain([*real, *kinds.get(family, [])])]
        if clear:
            found[f"test/certain up to lag/{named}"] = max(clear)
        for name in ("gain_bits", "lift", "auroc", "average_precision"):
            values = [row[name] for row in known(real, name)]
            if values:
                found[f"test/highest {name}/{named}"] = max(values)
    for family, others in kinds.items():
        for row in known(others, "auroc"):
            name = f"test/highest auroc of {row['kind']}/{'/'.join(family[1:])}"
            found[name] = max(row["auroc"], found.get(name, 0.0))
    return found


def describe_cost(cost: Mapping[str, Any]) -> str:
    """What the run took, and how much of it the frozen model alone."""
    fraction = cost["model_seconds"] / max(cost["seconds"], 1e-9)
    nested = f", {cost['nested_passes']} of nested probes behind them" if "nested_passes" in cost else ""
    spent = f"{cost['passes']} passes{nested}, tests and files" if "passes" in cost else "the test and its files"
    memory = [f"memory    {cost['peak_memory_gb']} GB at most", cost.get("activations", "")]
    if "newton_matrices" in cost:
        memory.append(f"newton's matrices {cost['newton_matrices']}")
    lines = [
        f"time      {cost['seconds']:,} s for {spent}; the bare model is {cost['model_seconds']:,} s of it, "
        f"{fraction:.0%}",
        f"model     {cost['model_tokens']:,} tokens in {cost['model_forwards']:,} forward passes, "
        f"{cost['tokens_per_second']:,} tokens/s, {cost['padding']} padding",
        "; ".join(filter(None, memory)),
    ]
    return "\n".join(lines)


def describe_files(folder: Path, width: int | None = None) -> str:
    """The files of a run with their sizes."""
    sizes: dict[str, int] = {}
    for path in sorted(p for p in folder.rglob("[!.]*") if p.is_file()):
        name, *inside = path.relative_to(folder).parts
        if name.startswith("events.out.tfevents."):
            name = "events.out.tfevents.*"
        shown = f"{name}/" if inside else name
        sizes[shown] = sizes.get(shown, 0) + path.stat().st_size
    listed = ", ".join(f"{name} {_size(n)}".replace(" ", UNBROKEN) for name, n in sizes.items())
    lines = wrapped(f"files     {listed}", min(width or LISTED, LISTED)).replace(UNBROKEN, " ")
    return f"wrote     {folder}/\n{lines}"


def _size(n: int) -> str:
    return f"{n / 1e6:.1f} MB" if n >= 1e6 else f"{max(1, round(n / 1e3))} kB"


def describe_outcome(verdicts: Sequence[str], folder: Path, width: int | None = None) -> str:
    """What a run says last: its verdicts, and where its report lies."""
    said = [wrapped(verdict, width) for verdict in verdicts]
    return "\n\n".join([*said, f"report    {folder / 'report.html'}"])
