"""Every file that a run writes at its end, each made of one `TestResults`.

To add a file, write a function `TestResults -> bytes` (or None, where there is nothing to write) and a row in FILES.

Shapes: L layers, K columns, D hidden size.
"""

import csv
import io
import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from streamprobe.config.schema import LAUNCH_KEYS
from streamprobe.evaluation.results import TestResults, by_category, differences, reliability
from streamprobe.evaluation.rows import FIELDS, Row, place
from streamprobe.evaluation.texts import TEXT_FIELDS
from streamprobe.probes.kept import pack_controls, shared_probes
from streamprobe.probes.storage import pack_probes
from streamprobe.reporting.curves import collect as collect_curves
from streamprobe.reporting.read_back import broken, read_run
from streamprobe.reporting.transcripts import collect
from streamprobe.system.csv_files import cell
from streamprobe.system.files import write_atomic
from streamprobe.system.privacy import for_others


class OutputFile(NamedTuple):
    """A file of a run's folder."""

    make: Callable[[TestResults], bytes | None]  # its content; None where there is nothing to write
    about: str  # what it holds, for docs


def results_csv(results: TestResults) -> bytes:
    """A row for every probe and control."""
    return pack_rows(results.rows, FIELDS)


def categories_csv(results: TestResults) -> bytes | None:
    """The rows of linear probes and controls within each category of problems, where there are several."""
    categories = [chain.category for chain in results.chains]
    return _pack_all(by_category(results.linear, categories, results.resamples, results.seed))


def differences_csv(results: TestResults) -> bytes | None:
    """Differences between layers, lags, sites and kinds."""
    return _pack_all(differences(results.judged))


def reliability_csv(results: TestResults) -> bytes | None:
    """What probes say, and what is true."""
    return _pack_all(reliability(results.linear))


def curves_json(results: TestResults) -> bytes:
    """What every probe gets right and wrong: its precision-recall curve, and counts at its threshold."""
    return json.dumps(collect_curves(results.linear), separators=(",", ":")).encode()


def texts_csv(results: TestResults) -> bytes | None:
    """Whole texts, where the data have one label a text."""
    return pack_rows(results.texts, TEXT_FIELDS) if results.texts else None


def probes_safetensors(results: TestResults) -> bytes:
    """Every probe in raw activation space, and what it means; of the config what others may see."""
    return pack_probes(shared_probes(results.kept.final), _about(results))


def controls_safetensors(results: TestResults) -> bytes:
    """What judging probes and controls on other data takes beside the file of the probes."""
    return pack_controls(results.kept, _about(results))


def _about(results: TestResults) -> dict[str, Any]:
    """What both files of probes say of their run: see `kept.SAME`."""
    config = {name: value for name, value in results.facts["config"].items() if name not in LAUNCH_KEYS}
    prints = {name: results.facts[name] for name in ("data_fingerprint", "model_fingerprint")}
    return {**prints, "config": for_others(config)}


def transcripts_json(results: TestResults) -> bytes:
    """A few test chains with what every probe says of each token."""
    named = {"labels": results.labels, "tokenizer": results.tokenizer}
    found = collect(results.linear, results.rows, results.chains, **named)
    return json.dumps(found, separators=(",", ":")).encode()


def summary_json(results: TestResults) -> bytes:
    """What the run was and cost (`run`), and results nested solver > label > target > lag > layer or control."""
    nested: dict[str, Any] = {}
    for row in results.rows:
        at = nested
        for name in ("solver", "label", "target"):
            at = at.setdefault(row[name], {})
        numbers = FIELDS[FIELDS.index("split") :]
        values = {name: None if isinstance(v := row[name], float) and math.isnan(v) else v for name in numbers}
        at.setdefault(f"lag{row['lag']:+03d}", {})[place(row)] = values
    run = {**results.facts, **results.cost(), **results.described}
    return json.dumps({"run": run, "results": nested}, indent=1).encode()


def report_html(results: TestResults) -> bytes:
    """One self-contained page."""
    return draw_report(results.folder)


FILES = {  # in the order in which they are written; the report is drawn of others
    "probes.safetensors": OutputFile(probes_safetensors, "every probe in raw activation space, with metadata"),
    "controls.safetensors": OutputFile(controls_safetensors, "the controls, and what judging takes on other data"),
    "results.csv": OutputFile(results_csv, "a row per probe and control on the test chains"),
    "transcripts.json": OutputFile(transcripts_json, "a few test chains to read, with what every probe says of them"),
    "categories.csv": OutputFile(categories_csv, "the rows of results.csv within each category of problems"),
    "differences.csv": OutputFile(differences_csv, "paired differences of AUROC between layers, lags, sites and kinds"),
    "reliability.csv": OutputFile(reliability_csv, "mean probability and share of positives, in ten bins of tokens"),
    "curves.json": OutputFile(curves_json, "precision, recall, and hits and errors at its threshold, of every probe"),
    "texts.csv": OutputFile(texts_csv, "a row per probe, control and pooling, where each text has one label"),
    "summary.json": OutputFile(summary_json, "the results nested, with cost, counts, versions and fingerprints"),
    "report.html": OutputFile(report_html, "one self-contained page"),
}


EVALUATION = [name for name in FILES if not name.endswith(".safetensors")]  # of probes on other data: no new probes


def write_files(results: TestResults, names: Iterable[str] = FILES) -> None:
    """Writes these files of FILES into the folder of the results, each whole or not at all."""
    for name in names:
        content = FILES[name].make(results)
        if content is not None:
            write_atomic(results.folder / name, content)


def pack_rows(rows: Sequence[Row], fields: Sequence[str]) -> bytes:
    """The content of a CSV file, its cells as `csv_files.cell` gives them; `nan` where a class is absent."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fields, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: cell(row[name]) for name in fields})
    return text.getvalue().encode()


def _pack_all(rows: Sequence[Row]) -> bytes | None:
    """The content of a CSV file with every field of the rows, if there are any."""
    return pack_rows(rows, list(rows[0])) if rows else None


def draw_report(folder: Path) -> bytes:
    """The content of report.html, from the folder's results.csv, summary.json, transcripts.json and, if any, others.

    Raises InputError where one of the three is missing, or any is broken.
    """
    from streamprobe.reporting.html.page import render  # imports matplotlib; the names in FILES are wanted without it

    found = read_run(folder)
    written = {"config.yaml": "every key: streamprobe train runs it again"}
    written |= {name: file.about for name, file in FILES.items() if name != "report.html"}
    links = {name: about for name, about in written.items() if (folder / name).is_file()}
    try:
        page = render(found, links)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError) as error:
        raise broken(folder, f"{type(error).__name__}: {error}") from error
    return page.encode(errors="replace")


def write_report(folder: Path) -> Path:
    """Draws report.html anew; returns its path.  Raises InputError as `draw_report` does."""
    path = folder / "report.html"
    write_atomic(path, draw_report(folder))
    return path
