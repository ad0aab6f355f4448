"""What a run ends with in the terminal: the table of each label and target, the cost, the files, and then the verdicts.

Every table takes the width that it may have, and leaves out its least important columns where that is too little.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from streamprobe.evaluation.rows import Row
from streamprobe.evaluation.texts import POOLINGS, best_text_rows
from streamprobe.reporting.grids import (
    Grid,
    best_of,
    certain,
    gained,
    grids,
    interval,
    known,
    lags_of,
    layers_by_lag,
    lines_of,
    number,
    rows_of,
    title,
)
from streamprobe.system.wrapping import wrapped

WIDE = 120  # columns of what goes to no terminal
NAME, CELL = 12, 7  # columns of a name, and of the number of a lag
MOST_LAGS = 14  # side by side
LISTED = 100  # columns of the list of files, at most
UNBROKEN = "\xa0"  # a space at which no line ends


class Shown(NamedTuple):
    """A column of a table: its head, how wide it is, the cell of a row, and how much it matters (0 the most)."""

    head: str
    width: int  # below 0: from the left
    text: Callable[[Any], str]
    matters: int


def number_column(head: str, width: int, matters: int, name: str, *, sign: str = "") -> Shown:
    """The column of one number of a row."""
    return Shown(head, width, lambda row: number(row, name, sign), matters)


def interval_column(width: int, matters: int, name: str, sign: str = "") -> Shown:
    """The column of an interval."""
    return Shown("  95% interval", -width, lambda row: f"  {interval(row, name, sign)}".rstrip(), matters)


BEST = [
    Shown("lag", 5, lambda row: f"{row['lag']:+d}", 0),
    Shown("layer", 6, lambda row: str(row["layer"]), 0),
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


def columns_that_fit(columns: Sequence[Shown], rows: Sequence[Any], width: int) -> list[Shown]:
    """The columns that have something to show, without those that matter least where `width` is too little for all."""
    kept = [column for column in columns if any(column.text(row) for row in rows)]
    while sum(abs(column.width) for column in kept) > width and len(kept) > 1:
        kept.remove(max(reversed(kept), key=lambda column: column.matters))
    return kept


def draw_table(columns: Sequence[Shown], rows: Sequence[Any], width: int) -> list[str]:
    """A line of heads, and one for each row."""
    kept = columns_that_fit(columns, rows, width)

    def line(cells: Iterable[str]) -> str:
        placed = (f"{cell:{'<' if c.width < 0 else '>'}{abs(c.width)}}" for c, cell in zip(kept, cells, strict=True))
        return "".join(placed).rstrip()

    return [line(column.head for column in kept), *(line(column.text(row) for column in kept) for row in rows)]


def table(rows: Sequence[Row], texts: Sequence[Row] = (), width: int | None = None) -> str:
    """For each solver, label and target: AUROC by layer or control and lag, and the best layer of each lag.

    Below it what is certain, and behind it what is found of whole texts, if there is anything.
    """
    room = width or WIDE
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
        lines += ["", ""]
    return "\n".join([*lines, text_table(texts, width), ""] if texts else lines[:-1])


def evenly(n: int, most: int) -> int:
    """How many of n to put side by side: with no more rows than `most` would need, all about as long."""
    return math.ceil(n / math.ceil(n / most))


def _by_layer_and_lag(layers: Grid, controls: Grid, best: Mapping[int, Row], lags: Sequence[int]) -> list[str]:
    """AUROC, a line for each layer or control and a column for each lag."""
    lines = [f"{'lag':<{NAME}}" + "".join(f"{lag:>+6d} " for lag in lags).rstrip()]
    for name, line in (layers | controls).items():
        cells = [
            f"{line[lag]['auroc']:>6.3f}" + " *"[line[lag] is best.get(lag)] if lag in line else " " * CELL
            for lag in lags
        ]
        lines.append((f"{name:<{NAME}}" + "".join(cells)).rstrip())
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
    Shown("layer", 6, lambda pair: str(pair.there["layer"]), 0),
    Shown("AUROC", 8, lambda pair: number(pair.there, "auroc"), 0),
    Shown("lift", 8, lambda pair: number(pair.there, "lift", "+"), 1),
    Shown("AUROC", 9, lambda pair: number(pair.here, "auroc"), 0),
    Shown("  95% interval", -16, lambda pair: f"  {interval(pair.here, 'auroc')}".rstrip(), 2),
    Shown("lift", 8, lambda pair: number(pair.here, "lift", "+"), 1),
    Shown("  95% interval", -18, lambda pair: f"  {interval(pair.here, 'lift', '+')}".rstrip(), 3),
]


def compare(before: Sequence[Row], rows: Sequence[Row], width: int | None = None) -> str:
    """For each solver, label and target a line a lag: the layer that is the best in `before`, there and in `rows`."""
    names = ("solver", "label", "target", "layer", "lag")
    here = {tuple(row[name] for name in names): row for row in rows if not row["control"]}
    lines: list[str] = []
    for family, grid in grids(before).items():
        best = best_of(lines_of(grid)[0].values()).values()
        pairs = [Pair(row, here[tuple(row[name] for name in names)]) for row in best]
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
    Shown("layer", 5, lambda pair: str(pair.probe["layer"]), 0),
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

    Of each label and target the furthest lag that is certain, and the highest gain in bits, lift, AUROC and average
    precision.
    """
    found: dict[str, float] = {}
    for (_, *family), grid in grids(row for row in rows if row["solver"] == solver).items():
        real = rows_of(lines_of(grid)[0])
        clear = [row["lag"] for row in certain(real)]
        if clear:
            found[f"test/certain up to lag/{'/'.join(family)}"] = max(clear)
        for name in ("gain_bits", "lift", "auroc", "average_precision"):
            values = [row[name] for row in known(real, name)]
            if values:
                found[f"test/highest {name}/{'/'.join(family)}"] = max(values)
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
