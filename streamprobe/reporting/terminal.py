"""What a run ends with in the terminal: the table of each label and target with its verdict, the cost and the files."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from streamprobe.evaluation.rows import Row, place
from streamprobe.evaluation.texts import POOLINGS, best_text_rows

Family = tuple[str, str, str]  # solver, label, target
Grid = dict[str, dict[int, Row]]  # by place, then by lag
WIDTH = 14  # lags side by side


def grids(rows: Iterable[Row]) -> dict[Family, Grid]:
    """The rows of each solver, label and target, in the order of the verdicts; layers before controls."""
    found: dict[Family, Grid] = {}
    for row in sorted(rows, key=lambda row: (row["solver"], row["label"], row["target"], bool(row["control"]))):
        grid = found.setdefault((row["solver"], row["label"], row["target"]), {})
        grid.setdefault(place(row), {})[row["lag"]] = row
    return found


def lags_of(grid: Grid) -> list[int]:
    """Every lag of a grid, rising."""
    return sorted({lag for line in grid.values() for lag in line})


def best_of(lines: Iterable[Mapping[int, Row]]) -> dict[int, Row]:
    """The row with the highest AUROC at each lag, among the lines given."""
    best: dict[int, Row] = {}
    for line in lines:
        for lag, row in line.items():
            if lag not in best or _by_auroc(row) > _by_auroc(best[lag]):
                best[lag] = row
    return dict(sorted(best.items()))


def _by_auroc(row: Row) -> float:
    return -1.0 if math.isnan(row["auroc"]) else row["auroc"]


def lines_of(grid: Grid) -> tuple[Grid, Grid]:
    """The lines of the layers, and one of each control: of one that is tried at every layer the highest values."""
    layers = {name: line for name, line in grid.items() if not _first(line)["control"]}
    by_control: dict[str, list[dict[int, Row]]] = {}
    for line in sorted(grid.values(), key=lambda line: _first(line)["layer"] != ""):
        if name := _first(line)["control"]:
            by_control.setdefault(name, []).append(line)
    return layers, {name: best_of(lines) for name, lines in by_control.items()}


def _first(line: Mapping[int, Row]) -> Row:
    return next(iter(line.values()))


def table(rows: Sequence[Row], verdicts: Sequence[str], texts: Sequence[Row] = ()) -> str:
    """For each solver, label and target: AUROC by layer or control and lag, the best layer of each lag, its verdict.

    Behind it what is found of whole texts, if there is anything.
    """
    lines: list[str] = []
    for ((solver, label, target), grid), verdict in zip(grids(rows).items(), verdicts, strict=True):
        layers, controls = lines_of(grid)
        best = best_of(layers.values())
        lines += [f"test AUROC   {label}, target {target}, solver {solver}   (* the best layer of a lag)", ""]
        lags = lags_of(grid)
        for start in range(0, len(lags), WIDTH):
            lines += [*_by_layer_and_lag(layers, controls, best, lags[start : start + WIDTH]), ""]
        lines += _best_layers(best)
        flat = [row for line in grid.values() for row in line.values()]
        blank = sum(math.isnan(row["auroc"]) for row in flat)
        if blank:
            lines.append(f"{blank} probes have nan: their test tokens lack a class")
        norms = sorted(row["gradient_norm"] for row in flat if not math.isnan(row["gradient_norm"]))
        if norms:
            lines.append(f"gradient norm: largest {norms[-1]:.1e}, median {norms[len(norms) // 2]:.1e}")
        lines += ["", verdict, "", ""]
    return "\n".join([*lines, text_table(texts), "", ""] if texts else lines)[:-1]


def _by_layer_and_lag(layers: Grid, controls: Grid, best: Mapping[int, Row], lags: Sequence[int]) -> list[str]:
    """AUROC, a line for each layer or control and a column for each lag."""
    lines = [f"{'lag':<12}" + "".join(f"{lag:>+6d} " for lag in lags).rstrip()]
    for name, line in (layers | controls).items():
        cells = [
            f"{line[lag]['auroc']:>6.3f}" + " *"[line[lag] is best.get(lag)] if lag in line else " " * 7 for lag in lags
        ]
        lines.append((f"{name:<12}" + "".join(cells)).rstrip())
    return lines


def _best_layers(best: Mapping[int, Row]) -> list[str]:
    """A line for the best layer of each lag."""
    lines = [
        f"{'lag':>5}{'layer':>7}{'AUROC':>8}   {'95% interval':<16}{'lift':>6}   {'95% interval':<18}{'over':<12}"
        f"{'AP':>6}{'base':>7}{'F1':>7}{'positive of tokens':>22}"
    ]
    for lag, row in best.items():
        lines.append(
            f"{lag:>+5d}{row['layer']:>7}{row['auroc']:>8.3f}   {_interval(row, 'auroc', ''):<16}"
            f"{_or_blank(row['lift'], '+.3f'):>6}   {_interval(row, 'lift', '+'):<18}{row['best_control']:<12}"
            f"{row['average_precision']:>6.3f}{row['base_rate']:>7.3f}{row['f1']:>7.3f}"
            f"{row['n_positive']:>11,} of {row['n_tokens']:>7,}"
        )
    return lines


def compare(before: Sequence[Row], rows: Sequence[Row]) -> str:
    """For each solver, label and target a line a lag: the layer that is the best in `before`, there and in `rows`."""
    names = ("solver", "label", "target", "layer", "lag")
    here = {tuple(row[name] for name in names): row for row in rows if not row["control"]}
    lines: list[str] = []
    for (solver, label, target), grid in grids(before).items():
        lines += [
            f"transfer     {label}, target {target}, solver {solver}: the layer that is best on the run's test chains",
            "",
            f"{'':<12}{'there':>10}{'':>10}   here",
            f"{'lag':>5}{'layer':>7}{'AUROC':>10}{'lift':>10}   AUROC   {'95% interval':<16}{'lift':>6}   95% interval",
        ]
        for lag, row in best_of(lines_of(grid)[0].values()).items():
            now = here[tuple(row[name] for name in names)]
            lines.append(
                f"{lag:>+5d}{row['layer']:>7}{row['auroc']:>10.3f}{_or_blank(row['lift'], '+.3f'):>10}   "
                f"{now['auroc']:>5.3f}   {_interval(now, 'auroc', ''):<16}{_or_blank(now['lift'], '+.3f'):>6}   "
                f"{_interval(now, 'lift', '+')}".rstrip()
            )
        lines.append("")
    return "\n".join(lines)


def _or_blank(value: float, form: str) -> str:
    return "" if math.isnan(value) else f"{value:{form}}"


def _interval(row: Row, name: str, sign: str) -> str:
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    return "" if math.isnan(low) else f"{low:{sign}.3f} to {high:{sign}.3f}"


def text_table(rows: Sequence[Row]) -> str:
    """For each solver, label and pooling of whole texts: its best layer, beside its best control."""
    lines: list[str] = []
    for probe, control in best_text_rows(rows):
        if probe["pooling"] == POOLINGS[0]:
            named = f"{probe['label']}, solver {probe['solver']}, lag {probe['lag']:+d}"
            counts = f"{probe['n_positive']:,} of {probe['n_texts']:,} positive"
            lines += [
                *([""] if lines else []),
                f"whole texts   {named}: {counts}   (the best layer and the best control; TPR at 1% and 5% FPR)",
                "",
                f"{'pooling':<9}{'layer':>5}{'AUROC':>8}   {'95% interval':<16}{'TPR at 1%':>10}   {'95% interval':<16}"
                f"{'TPR at 5%':>10}   {'95% interval':<16}   {'control':<12}{'AUROC':>6}",
            ]
        cells = "".join(
            f"{probe[name]:>{width}.3f}   {_interval(probe, name, ''):<16}"
            for name, width in (("auroc", 8), ("tpr_at_1fpr", 10), ("tpr_at_5fpr", 10))
        )
        beside = f"   {control['control']:<12}{control['auroc']:>6.3f}" if control else ""
        lines.append(f"{probe['pooling']:<9}{probe['layer']:>5}{cells}{beside}".rstrip())
    return "\n".join(lines)


def headline(rows: Iterable[Row], solver: str) -> dict[str, float]:
    """The numbers by which runs compare, by the names that TensorBoard gives them: those of one solver, unnamed.

    Of each label and target the lag of its verdict, and the highest lift, AUROC and average precision.
    """
    found: dict[str, float] = {}
    for (_, *family), grid in grids(row for row in rows if row["solver"] == solver).items():
        layers, _ = lines_of(grid)
        real = [row for line in layers.values() for row in line.values()]
        clear = [row["lag"] for row in real if row["lift_low_corrected"] > 0]
        if clear:
            found[f"test/certain up to lag/{'/'.join(family)}"] = max(clear)
        for name in ("lift", "auroc", "average_precision"):
            known = [row[name] for row in real if not math.isnan(row[name])]
            if known:
                found[f"test/highest {name}/{'/'.join(family)}"] = max(known)
    return found


def describe_cost(cost: Mapping[str, Any]) -> str:
    """What the run took, and how much of it the frozen model alone."""
    fraction = cost["model_seconds"] / max(cost["seconds"], 1e-9)
    spent = f"{cost['passes']} passes, tests and files" if "passes" in cost else "the test and its files"
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


def describe_files(folder: Path) -> str:
    """The files of a run with their sizes."""
    sizes: dict[str, int] = {}
    for path in sorted(p for p in folder.rglob("[!.]*") if p.is_file()):
        name, *inside = path.relative_to(folder).parts
        if name.startswith("events.out.tfevents."):
            name = "events.out.tfevents.*"
        shown = f"{name}/" if inside else name
        sizes[shown] = sizes.get(shown, 0) + path.stat().st_size
    listed = [f"{name} {_size(n)}" for name, n in sizes.items()]
    head = f"wrote     {folder}/"
    return "\n".join([head, *("          " + ", ".join(listed[i : i + 4]) for i in range(0, len(listed), 4))])


def _size(n: int) -> str:
    return f"{n / 1e6:.1f} MB" if n >= 1e6 else f"{max(1, round(n / 1e3))} kB"
