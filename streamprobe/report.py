"""The results of a run: results.csv, summary.json, probes.safetensors, report.html and the table in the terminal.

Shapes: L layers, K columns, D hidden size.
"""

import csv
import html
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from streamprobe.checkpoint import save_tensors, write_atomic
from streamprobe.probes import ProbeBank, bank_tensors
from streamprobe.results import FIELDS, Row, place


def write_rows(path: Path, fields: Sequence[str], rows: Sequence[Row]) -> None:
    """A CSV file: six significant digits; `nan` where a class is absent."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fields, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: f"{v:.6g}" if isinstance(v := row[name], float) else v for name in fields})
    write_atomic(path, text.getvalue().encode())


def write_summary(folder: Path, rows: Sequence[Row], run: Mapping[str, Any]) -> None:
    """summary.json: what the run cost (`run`), and results nested solver > label > target > lag > layer or control."""
    nested: dict[str, Any] = {}
    for row in rows:
        at = nested
        for name in ("solver", "label", "target"):
            at = at.setdefault(row[name], {})
        cell = {n: None if isinstance(v := row[n], float) and math.isnan(v) else v for n in FIELDS[6:]}
        at.setdefault(f"lag{row['lag']:+03d}", {})[place(row)] = cell
    write_atomic(folder / "summary.json", json.dumps({"run": run, "results": nested}, indent=1).encode())


def write_probes(folder: Path, banks: Mapping[str, ProbeBank], about: Mapping[str, Any]) -> None:
    """probes.safetensors: each solver's probes, and what they mean.

    `<solver>.weight` [L, K, D], `.bias` [L, K] and `.threshold` [L, K] are for raw activations.
    """
    tensors: dict[str, Tensor] = {}
    for solver, bank in banks.items():
        assert bank.threshold is not None
        tensors |= bank_tensors(solver, bank) | {f"{solver}.threshold": bank.threshold}
    first = next(iter(banks.values()))
    layout = {"solvers": list(banks), "layers": first.layers, "columns": [list(c) for c in first.columns]}
    save_tensors(folder / "probes.safetensors", tensors, {**about, **layout})


def _grids(rows: Sequence[Row]) -> dict[tuple[str, str, str], dict[str, dict[int, Row]]]:
    """The rows by (solver, label, target), then by their place, then by lag; layers before controls."""
    grids: dict[tuple[str, str, str], dict[str, dict[int, Row]]] = {}
    for row in sorted(rows, key=lambda row: bool(row["control"])):
        grid = grids.setdefault((row["solver"], row["label"], row["target"]), {})
        grid.setdefault(place(row), {})[row["lag"]] = row
    return grids


def _best(grid: Mapping[str, Mapping[int, Row]]) -> dict[int, Row]:
    """The layer with the highest AUROC at each lag."""
    best: dict[int, Row] = {}
    for line in grid.values():
        for lag, row in line.items():
            if not row["control"] and (lag not in best or _by_auroc(row) > _by_auroc(best[lag])):
                best[lag] = row
    return dict(sorted(best.items()))


def table(rows: Sequence[Row]) -> str:
    """Test AUROC by layer or control and lag, and the best layer of each lag with its lift, as text."""
    lines = []
    for (solver, label, target), grid in _grids(rows).items():
        best = _best(grid)
        lines += [f"test AUROC   {label}, target {target}, solver {solver}", ""]
        head = (f"{'lag ' if lag == min(best) else ''}{lag:+d}" for lag in best)
        lines.append(f"{'':<18}" + "".join(f"{name:>8}" for name in head))
        for name, line in grid.items():
            cells = (f"{line[lag]['auroc']:>8.3f}" if lag in line else f"{'':>8}" for lag in best)
            lines.append(f"{name:<18}" + "".join(cells))
        for name, key, form in (
            ("best layer", "layer", "d"), ("low 95%", "auroc_low", ".3f"), ("high 95%", "auroc_high", ".3f"),
            ("lift", "lift", ".3f"), ("low 95%", "lift_low", ".3f"), ("high 95%", "lift_high", ".3f"),
            ("AP", "average_precision", ".3f"), ("F1", "f1", ".3f"), ("base rate", "base_rate", ".3f"),
        ):  # fmt: skip
            lines.append(f"{name:<18}" + "".join(f"{row[key]:>8{form}}" for row in best.values()))
        controls = (row["best_control"][:7] for row in best.values())
        lines.append(f"{'lift is over':<18}" + "".join(f"{control:>8}" for control in controls))
        flat = [row for line in grid.values() for row in line.values()]
        blank = sum(math.isnan(row["auroc"]) for row in flat)
        if blank:
            lines.append(f"{blank} probes have nan: their test tokens lack a class")
        norms = sorted(row["gradient_norm"] for row in flat if not math.isnan(row["gradient_norm"]))
        if norms:
            lines.append(f"gradient norm: largest {norms[-1]:.1e}, median {norms[len(norms) // 2]:.1e}")
        lines.append("")
    return "\n".join(lines)


def _by_auroc(row: Row) -> float:
    return -1.0 if math.isnan(row["auroc"]) else row["auroc"]


STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .5rem 0 1.5rem; }
th, td { padding: .25rem .55rem; text-align: right; }
td { color: #111; } td.plain, th { color: inherit; }
pre { overflow-x: auto; padding: 1rem; border: 1px solid #8886; font-size: 12px; }
"""


def write_report(folder: Path, rows: Sequence[Row], verdicts: Sequence[str], preflight: str, summary: str) -> None:
    """report.html: one self-contained page; text from the data is escaped."""
    parts = [f"<p class=verdict>{html.escape(sentence)}</p>" for sentence in verdicts]
    for (solver, label, target), grid in _grids(rows).items():
        lags = list(_best(grid))
        head = "".join(f"<th scope=col>{lag:+d}</th>" for lag in lags)
        body = "".join(
            f"<tr><th scope=row>{html.escape(name)}</th>{''.join(_cell(line.get(lag)) for lag in lags)}</tr>"
            for name, line in grid.items()
        )
        title = html.escape(f"{label}, target {target}, solver {solver}")
        parts.append(f"<h2>{title}</h2><table><tr><th>lag</th>{head}</tr>{body}</table>")
    page = (
        f"<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>streamprobe: {html.escape(folder.name)}</title><style>{STYLE}</style>"
        f"<h1>{html.escape(folder.name)}</h1><p>AUROC on held-out test chains, with the 95% interval over resampled "
        f"chains. Lag k: the activation at token t predicts the label at token t + k.</p>{''.join(parts)}"
        f"<h2>Run</h2><pre>{html.escape(summary)}</pre><h2>Data</h2><pre>{html.escape(preflight)}</pre></html>"
    )
    write_atomic(folder / "report.html", page.encode())


def _cell(row: Row | None) -> str:
    """A heat-map cell: white at chance, deeper blue towards 1."""
    if row is None:
        return "<td class=plain></td>"
    value = row["auroc"]
    if math.isnan(value):
        return "<td class=plain>nan</td>"
    depth = min(1.0, abs(value - 0.5) * 2)
    red, green, blue = (round(255 - depth * span) for span in ((150, 90, 10) if value >= 0.5 else (10, 90, 150)))
    interval = f"<br><small>{row['auroc_low']:.3f}&ndash;{row['auroc_high']:.3f}</small>"
    return f"<td style='background:rgb({red},{green},{blue})'>{value:.3f}{interval}</td>"
