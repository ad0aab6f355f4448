"""The files of a finished run, read back: what its report and comparisons of runs are drawn of."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from streamprobe.errors import InputError
from streamprobe.evaluation.rows import FIELDS, PLACE, Row
from streamprobe.evaluation.texts import TEXT_FIELDS
from streamprobe.system.csv_files import broken_file, read_csv

# Fields that are text; that are drawn, and so about 1 at most; and that are whole numbers
WORDS = ("solver", "kind", "site", "label", "target", "control", "split", "best_control", "pooling", "category")
BOUNDED = ("auroc", "average_precision", "gain", "lift", "f1", "tpr", "brier", "base_rate", "mean_", "share_")
COUNTS = ("lag", "n_tokens", "n_positive", "n_chains", "n_positive_chains", "best_pass", "n_texts", "bin")
FIX = "give the folder of such a run, or run it again where it is of an earlier version"
CATEGORY_FIELDS = ["category", *FIELDS]
BIN_FIELDS = "solver,kind,site,layer,label,target,lag,bin,n_tokens,mean_probability,share_positive".split(",")


class FinishedRun(NamedTuple):
    """What the files of a run say of it."""

    name: str
    rows: list[Row]  # of results.csv
    run: dict[str, Any]  # that part of summary.json
    transcripts: dict[str, Any]
    texts: list[Row] = []  # of texts.csv, if there is one, and so are those below
    categories: list[Row] = []
    bins: list[Row] = []  # of reliability.csv
    curves: list[dict[str, Any]] = []


def read_run(folder: Path) -> FinishedRun:
    """All that a report shows.  Raises InputError for a file that is missing or broken."""
    rows, run = read_results(folder)
    transcripts = read_json(folder / "transcripts.json", "chains", "labels", "probes", "reference", "picked_by")
    _require(folder / "summary.json", run, "config", "preflight", "verdicts", "versions")
    return FinishedRun(
        name_of(folder, run),
        rows,
        run,
        transcripts,
        texts=_rows_if_any(folder / "texts.csv", TEXT_FIELDS),
        categories=_rows_if_any(folder / "categories.csv", CATEGORY_FIELDS),
        bins=_rows_if_any(folder / "reliability.csv", BIN_FIELDS),
        curves=_curves_if_any(folder / "curves.json"),
    )


def read_results(folder: Path) -> tuple[list[Row], dict[str, Any]]:
    """The rows of results.csv and the `run` part of summary.json.  Raises InputError where they cannot be read."""
    if not os.path.isdir(folder):  # which is no error for a name that is too long
        raise InputError(f"{folder}, which is no folder", "the folder of a run", "give one, such as runs/demo")
    rows = read_rows(folder / "results.csv", FIELDS)
    run = read_json(folder / "summary.json", "run")["run"]
    _require(folder / "summary.json", run, "config", "verdicts")
    return rows, run


def name_of(folder: Path, run: dict[str, Any]) -> str:
    """What a run is called: the name of its folder, or what an evaluation says itself."""
    return str(run.get("title", folder.resolve().name))


def _rows_if_any(path: Path, fields: Sequence[str]) -> list[Row]:
    return read_rows(path, fields) if path.exists() else []


def _curves_if_any(path: Path) -> list[dict[str, Any]]:
    """What curves.json holds, if there is one."""
    if not path.exists():
        return []
    found = _parse(path)
    if not isinstance(found, list):
        raise broken(path, "no list")
    for each in found:
        _require(path, each, *PLACE, "recall", "precision", "tp", "fp", "fn", "tn")
    return found


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise broken(path, str(error)) from error


def broken(path: Path, why: str) -> InputError:
    """What is reported of a file of a run, or its folder, that is not as a run writes it."""
    return broken_file(path, why, FIX)


def _parse(path: Path) -> Any:
    text = _read(path)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise broken(path, str(error)) from error


def read_json(path: Path, *names: str) -> dict[str, Any]:
    """The object that a JSON file holds, with these names in it.  Raises InputError for a file that is none."""
    found: dict[str, Any] = _parse(path)
    _require(path, found, *names)
    return found


def _require(path: Path, found: Any, *names: str) -> None:
    missing = [name for name in names if not (isinstance(found, dict) and name in found)]
    if missing:
        raise broken(path, f"no {missing[0]} in it")


def read_rows(path: Path, fields: Sequence[str] = FIELDS) -> list[Row]:
    """The rows of a results.csv, or of another file with these fields.  Raises InputError for a file that is none."""
    rows: list[Row] = []
    for line in read_csv(path, fields, FIX):
        try:
            row: Row = {name: line[name] if name in WORDS else float(line[name] or "nan") for name in fields}
            wide = [name for name in fields if name.startswith(BOUNDED) and abs(row[name]) > 1e6]
            if wide:
                raise ValueError(f"{wide[0]} {line[wide[0]]}")
            whole = {name: int(row[name]) for name in COUNTS if name in row}
            rows.append(row | whole | {"layer": int(line["layer"]) if line["layer"] else ""})
        except (ValueError, OverflowError) as error:
            raise broken(path, f"row {len(rows) + 1}: {error}") from error
    return rows
