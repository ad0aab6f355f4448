"""The files of a run's results: results.csv, summary.json, probes.safetensors, transcripts.json and report.html.

    python -m streamprobe.reporting.files RUN            # draws RUN/report.html anew from the other files

Shapes: L layers, K columns, D hidden size.
"""

import csv
import io
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from streamprobe.errors import InputError
from streamprobe.evaluation.results import FIELDS, Row, place
from streamprobe.probes.linear import ProbeBank
from streamprobe.probes.storage import bank_tensors, save_tensors
from streamprobe.reporting.html.page import render
from streamprobe.system.console import guard, say
from streamprobe.system.csv_files import broken_file, cell, read_csv
from streamprobe.system.files import write_atomic
from streamprobe.system.privacy import for_others

WORDS = ("solver", "label", "target", "control", "split", "best_control")  # fields that are text
SHARES = (
    "auroc",
    "average_precision",
    "lift",
    "f1",
    "tpr",
    "brier",
    "base_rate",
)  # which are drawn, and of the size of 1
COUNTS = ("lag", "n_tokens", "n_positive", "n_chains", "n_positive_chains", "best_pass")  # and whole numbers


def write_rows(path: Path, fields: Sequence[str], rows: Sequence[Row]) -> None:
    """A CSV file, its cells as `csvfiles.cell` gives them; `nan` where a class is absent."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fields, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: cell(row[name]) for name in fields})
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
    """probes.safetensors: each solver's probes, and what they mean; of the config in `about` what others may see.

    `<solver>.weight` [L, K, D], `.bias` [L, K] and `.threshold` [L, K] are for raw activations.
    """
    tensors: dict[str, Tensor] = {}
    for solver, bank in banks.items():
        assert bank.threshold is not None
        tensors |= bank_tensors(solver, bank) | {f"{solver}.threshold": bank.threshold}
    first = next(iter(banks.values()))
    layout = {"solvers": list(banks), "layers": first.layers, "columns": [list(c) for c in first.columns]}
    shown = {name: for_others(value) if name == "config" else value for name, value in about.items()}
    save_tensors(folder / "probes.safetensors", tensors, {**shown, **layout})


def write_transcripts(folder: Path, transcripts: Mapping[str, Any]) -> None:
    """transcripts.json, of `transcripts.collect`."""
    write_atomic(folder / "transcripts.json", json.dumps(transcripts, separators=(",", ":")).encode())


def write_report(folder: Path) -> None:
    """report.html, from the folder's results.csv, summary.json and transcripts.json.

    Raises InputError where one of them is missing or broken.
    """
    if not os.path.isdir(folder):  # which is no error for a name that is too long
        raise InputError(f"{folder}, which is no folder", "the folder of a run", "give one, such as runs/demo")
    rows = _read_rows(folder / "results.csv")
    run = _read_json(folder / "summary.json", "run")["run"]
    transcripts = _read_json(folder / "transcripts.json", "chains", "labels", "probes", "reference", "picked_by")
    _require(folder / "summary.json", run, "config", "preflight", "verdicts", "versions")
    try:
        page = render(folder.resolve().name, rows, run, transcripts)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError) as error:
        raise _broken(folder, f"{type(error).__name__}: {error}") from error
    write_atomic(folder / "report.html", page.encode(errors="replace"))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise _broken(path, str(error)) from error


def _broken(path: Path, why: str) -> InputError:
    return broken_file(path, why, "give the folder of such a run")


def _read_json(path: Path, *names: str) -> dict[str, Any]:
    text = _read(path)
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _broken(path, str(error)) from error
    _require(path, found, *names)
    return found


def _require(path: Path, found: Any, *names: str) -> None:
    missing = [name for name in names if not (isinstance(found, dict) and name in found)]
    if missing:
        raise _broken(path, f"no {missing[0]} in it")


def _read_rows(path: Path) -> list[Row]:
    rows: list[Row] = []
    for line in read_csv(path, FIELDS):
        try:
            row: Row = {name: line[name] if name in WORDS else float(line[name] or "nan") for name in FIELDS}
            wide = [name for name in FIELDS if name.startswith(SHARES) and abs(row[name]) > 1e6]
            if wide:
                raise ValueError(f"{wide[0]} {line[wide[0]]}")
            whole = {name: int(row[name]) for name in COUNTS}
            rows.append(row | whole | {"layer": int(line["layer"]) if line["layer"] else ""})
        except (ValueError, OverflowError) as error:
            raise _broken(path, f"row {len(rows) + 1}: {error}") from error
    return rows


def run(argv: Sequence[str]) -> None:
    """The command line; raises InputError for what the user can fix."""
    if len(argv) != 1:
        raise InputError(
            f"{len(argv)} arguments", "the folder of one run", "python -m streamprobe.reporting.files runs/demo"
        )
    write_report(Path(argv[0]))
    say(f"wrote {Path(argv[0]) / 'report.html'}")


def main(argv: Sequence[str]) -> int:
    """`python -m streamprobe.reporting.files RUN`; returns the exit status: 0 or 2."""
    return guard(lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
