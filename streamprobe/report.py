"""The results of a run: results.csv, summary.json, probes.safetensors, report.html and the table in the terminal.

Shapes: N tokens, L layers, K columns, C chains, R resamples.
"""

import csv
import html
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from streamprobe.checkpoint import save_tensors, write_atomic
from streamprobe.metrics import chain_bootstrap
from streamprobe.probes import ProbeBank, bank_tensors

FIELDS = (
    "solver,layer,label,target,lag,control,split,auroc,auroc_low,auroc_high,average_precision,average_precision_low,"
    "average_precision_high,f1,threshold,f1_at_half,tpr_at_5fpr,base_rate,n_tokens,n_positive,n_chains,best_pass,"
    "gradient_norm"
).split(",")
Row = dict[str, Any]


def intervals(
    scores: Tensor, targets: Tensor, valid: Tensor, chain: Tensor, n_chains: int, resamples: int, seed: int
) -> dict[str, Tensor]:
    """95% intervals over resampled chains of each probe: name -> [L, K]; NaN without resamples.

    scores [N, L, K], targets and valid [N, K], chain [N] in 0 .. n_chains - 1.  All probes share the same
    resamples, so that differences between them can be compared.
    """
    drawn = np.random.default_rng(seed).multinomial(n_chains, np.full(n_chains, 1 / n_chains), size=resamples)
    weights = torch.from_numpy(drawn)
    names = ("auroc_low", "auroc_high", "average_precision_low", "average_precision_high")
    result = {name: torch.full(scores.shape[1:], float("nan"), dtype=torch.float64) for name in names}
    for k in range(targets.shape[1]) if resamples else ():
        v = valid[:, k]
        areas, precisions = chain_bootstrap(scores[v][:, :, k], targets[v, k], chain[v], weights)
        for name, values in zip(names, (*areas.T, *precisions.T), strict=True):
            result[name][:, k] = values
    return result


def make_rows(
    solver: str,
    bank: ProbeBank,
    metrics: Mapping[str, Tensor],
    best_pass: Tensor,
    gradient_norm: Tensor,
    targets: Tensor,
    valid: Tensor,
    chain: Tensor,
) -> list[Row]:
    """A row per probe, in the order layer, column.

    metrics: name -> [L, K]; best_pass and gradient_norm [L, K]; targets, valid [N, K]; chain [N].
    """
    rows = []
    for i, layer in enumerate(bank.layers):
        for k, column in enumerate(bank.columns):
            n, hits = int(valid[:, k].sum()), int(targets[:, k].sum())
            rows.append(
                {
                    "solver": solver, "layer": layer, **column._asdict(), "control": "", "split": "test",
                    **{name: float(values[i, k]) for name, values in metrics.items()},
                    "base_rate": hits / n if n else math.nan, "n_tokens": n, "n_positive": hits,
                    "n_chains": int(chain[valid[:, k]].unique().numel()), "best_pass": int(best_pass[i, k]),
                    "gradient_norm": float(gradient_norm[i, k]),
                }
            )  # fmt: skip
    return rows


def write_results(folder: Path, rows: Sequence[Row]) -> None:
    """results.csv: six significant digits; `nan` where a class is absent."""
    text = io.StringIO()
    writer = csv.DictWriter(text, FIELDS, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: f"{v:.6g}" if isinstance(v := row[name], float) else v for name in FIELDS})
    write_atomic(folder / "results.csv", text.getvalue().encode())


def write_summary(folder: Path, rows: Sequence[Row], run: Mapping[str, Any]) -> None:
    """summary.json: what the run cost (`run`), and results nested solver > label > target > lag > layer."""
    nested: dict[str, Any] = {}
    for row in rows:
        place = nested
        for name in ("solver", "label", "target"):
            place = place.setdefault(row[name], {})
        cell = {n: None if isinstance(v := row[n], float) and math.isnan(v) else v for n in FIELDS[6:]}
        place.setdefault(f"lag{row['lag']:+03d}", {})[f"layer{row['layer']:02d}"] = cell
    write_atomic(folder / "summary.json", json.dumps({"run": run, "results": nested}, indent=1).encode())


def write_probes(
    folder: Path, banks: Mapping[str, ProbeBank], thresholds: Mapping[str, Tensor], about: Mapping[str, Any]
) -> None:
    """probes.safetensors: `<solver>.weight` [L, K, D] and `.bias` [L, K] for raw activations, and what they mean."""
    tensors: dict[str, Tensor] = {}
    for solver, bank in banks.items():
        tensors |= bank_tensors(solver, bank) | {f"{solver}.threshold": thresholds[solver]}
    first = next(iter(banks.values()))
    layout = {"solvers": list(banks), "layers": first.layers, "columns": [list(c) for c in first.columns]}
    save_tensors(folder / "probes.safetensors", tensors, {**about, **layout})


def _grids(rows: Sequence[Row]) -> dict[tuple[str, str, str], dict[tuple[int, int], Row]]:
    """The rows by (solver, label, target) and then by (layer, lag)."""
    grids: dict[tuple[str, str, str], dict[tuple[int, int], Row]] = {}
    for row in rows:
        grids.setdefault((row["solver"], row["label"], row["target"]), {})[row["layer"], row["lag"]] = row
    return grids


def table(rows: Sequence[Row]) -> str:
    """Test AUROC by layer and lag, and the best layer of each lag with its interval, as text."""
    lines = []
    for (solver, label, target), grid in _grids(rows).items():
        layers, lags = sorted({at[0] for at in grid}), sorted({at[1] for at in grid})
        lines += [f"test AUROC   {label}, target {target}, solver {solver}", ""]
        lines.append(
            f"{'layer':<10}" + "".join(f"{f'lag {lag:+d}' if lag == lags[0] else f'{lag:+d}':>8}" for lag in lags)
        )
        for layer in layers:
            lines.append(f"{layer:<10}" + "".join(f"{grid[layer, lag]['auroc']:>8.3f}" for lag in lags))
        best = [max((grid[layer, lag] for layer in layers), key=_by_auroc) for lag in lags]
        for name, key, form in (
            ("best", "layer", "d"), ("low 95%", "auroc_low", ".3f"), ("high 95%", "auroc_high", ".3f"),
            ("AP", "average_precision", ".3f"), ("F1", "f1", ".3f"), ("base rate", "base_rate", ".3f"),
        ):  # fmt: skip
            lines.append(f"{name:<10}" + "".join(f"{row[key]:>8{form}}" for row in best))
        blank = sum(math.isnan(row["auroc"]) for row in grid.values())
        if blank:
            lines.append(f"{blank} probes have nan: their test tokens lack a class")
        norms = sorted(row["gradient_norm"] for row in grid.values() if not math.isnan(row["gradient_norm"]))
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


def write_report(folder: Path, rows: Sequence[Row], preflight: str, summary: str) -> None:
    """report.html: one self-contained page; text from the data is escaped."""
    parts = []
    for (solver, label, target), grid in _grids(rows).items():
        layers, lags = sorted({at[0] for at in grid}), sorted({at[1] for at in grid})
        head = "".join(f"<th scope=col>{lag:+d}</th>" for lag in lags)
        body = "".join(
            f"<tr><th scope=row>layer {layer}</th>{''.join(_cell(grid[layer, lag]) for lag in lags)}</tr>"
            for layer in layers
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


def _cell(row: Row) -> str:
    """A heat-map cell: white at chance, deeper blue towards 1."""
    value = row["auroc"]
    if math.isnan(value):
        return "<td class=plain>nan</td>"
    depth = min(1.0, abs(value - 0.5) * 2)
    red, green, blue = (round(255 - depth * span) for span in ((150, 90, 10) if value >= 0.5 else (10, 90, 150)))
    interval = f"<br><small>{row['auroc_low']:.3f}&ndash;{row['auroc_high']:.3f}</small>"
    return f"<td style='background:rgb({red},{green},{blue})'>{value:.3f}{interval}</td>"
