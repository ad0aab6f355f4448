"""The rows of a data set, wherever it lies, with their text untouched."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from streamprobe.errors import InputError


def fetch(data: str, sha256: str | None = None) -> str:
    """A local copy of a URL (in the `datasets` cache) or `data` itself; with `sha256`, checks the file's digest."""
    from datasets import DownloadManager

    if "://" in data:
        try:
            path = DownloadManager().download(data)
        except (OSError, ConnectionError) as error:
            raise InputError(
                f"data {data}: {error}", "a URL that can be downloaded", "check the URL and the network"
            ) from None
    else:
        path = data
    if sha256:
        got = hashlib.sha256(Path(path).read_bytes()).hexdigest()
        if got != sha256.lower():
            raise InputError(
                f"data {data} with SHA-256 {got}",
                sha256,
                "download it again, or change data_sha256 if the change is meant",
            )
    return str(path)


def read_rows(data: str, split: str, columns: Sequence[str], sha256: str | None = None) -> list[dict[str, Any]]:
    """The rows of a JSON, JSON-lines or parquet file, a URL of one, or a data set on the hub.

    Parquet and hub data sets come through `datasets`, streamed, so that no converted copy is cached.  JSON is parsed as
    it stands: `datasets` gives each column a type, so that one odd row, or text like a date, changes the text of
    all.  Raises InputError where the data cannot be read or a column of `columns` is missing.
    """
    from datasets import load_dataset, logging
    from datasets.exceptions import DatasetsError

    logging.set_verbosity(logging.CRITICAL)  # what goes wrong is told below, once
    suffix = Path(data.split("?")[0]).suffix
    is_file = suffix in (".json", ".jsonl", ".parquet")
    if sha256 and not is_file:
        raise InputError(f"data_sha256 with the data set {data}", "a file to check", "drop data_sha256")
    if is_file and "://" not in data and not Path(data).is_file():
        raise InputError(f"data {data}, which does not exist", "an existing file", "check the path")
    if not is_file and Path(data).exists():
        raise InputError(f"data {data}", "a file that ends in .json, .jsonl or .parquet", "rename or convert it")
    path = fetch(data, sha256) if is_file else data
    try:
        if suffix == ".parquet":
            rows = list(load_dataset("parquet", data_files=path, split="train", streaming=True))
        else:
            rows = parse_json(Path(path)) if is_file else list(load_dataset(data, split=split, streaming=True))
    except (DatasetsError, OSError, ValueError) as error:
        cause = error.__cause__ or error
        raise InputError(
            f"data {data}, which cannot be read ({type(cause).__name__}: {cause})",
            "a JSON list, JSON lines or parquet file with one chain a row, a URL of one, or a data set on the hub",
            "check the file's content, or the id and the network",
        ) from None
    if not rows:
        raise InputError(f"data {data} with no rows", "one chain a row", "check the file")
    for column in columns:
        if not any(column in row for row in rows):
            raise InputError(
                f"data {data} without the column {column!r}",
                f"one of {', '.join(map(repr, rows[0]))}",
                "name the columns with --problem_column, --response_column, --annotation_column and --id_column",
            )
    return rows


def parse_json(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON list, or of JSON lines.  Raises ValueError for anything else."""
    text = path.read_text(encoding="utf-8-sig")
    try:
        rows = json.loads(text)
    except json.JSONDecodeError:
        if not text.lstrip().startswith("{"):
            raise
        rows = [json.loads(line) for line in text.split("\n") if line.strip()]
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError("not a list of objects")
    return rows
