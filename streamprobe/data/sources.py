"""Where records come from: a file, a URL or a data set on the hub, with their text untouched.

To add a source, write a class that yields records and can say where it stands: see `Source`.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tqdm import tqdm

from streamprobe.data.formats import FORMATS, Format, FormatOptions, Record, Refused, read_row
from streamprobe.errors import InputError
from streamprobe.system.console import shows_progress
from streamprobe.system.network import hub_is_given_up, look_for_hub
from streamprobe.system.privacy import clean_text, clean_url
from streamprobe.system.shipped import shipped_path

Rows = list[dict[str, Any]]
SECONDS = 2.0  # for a server to take a call; there are two of them
KINDS = (".json", ".jsonl", ".parquet")


class Source(Protocol):
    """Where the records of a run come from; what is behind it sees records alone."""

    partial: bool  # whether it gives a choice of the data alone

    def __iter__(self) -> Iterator[Record | Refused]:
        """The records that are still to come."""
        ...

    def __len__(self) -> int:
        """How many records there are in all."""
        ...

    def state(self) -> dict[str, int]:
        """Where it stands: what a new source of the same data needs to go on behind the last record given."""
        ...


class RowSource:
    """The rows of a file or data set, each read by one of `formats.FORMATS`."""

    def __init__(self, rows: Rows, format: Format, options: FormatOptions, *, most: int | None = None, place: int = 0):
        """At most `most` of the rows, evenly spaced (None: all); begins with the row at `place` of these."""
        self.partial = most is not None and most < len(rows)
        self.rows = (
            [rows[i] for i in np.linspace(0, len(rows) - 1, most).astype(int)] if self.partial and most else rows
        )
        self.format, self.options, self.place = format, options, place

    def __iter__(self) -> Iterator[Record | Refused]:
        while self.place < len(self.rows):
            self.place += 1
            yield read_row(self.rows[self.place - 1], self.place - 1, self.format, self.options)

    def __len__(self) -> int:
        return len(self.rows)

    def state(self) -> dict[str, int]:
        """The number of the next row."""
        return {"place": self.place}


def open_source(
    data: str,
    format: str,
    options: FormatOptions,
    *,
    split: str = "train",
    sha256: str | None = None,
    most: int | None = None,
) -> Source:
    """The records of a JSON, JSON-lines or parquet file, a URL of one, or a data set on the hub.

    `split` is that of a data set on the hub, `sha256` what a file must have, `most` as in `RowSource`.  Raises
    InputError where the data cannot be read or a column that the format needs is missing.
    """
    chosen = FORMATS[format]
    columns = [*chosen.columns(options), *([options.category] if options.category else [])]
    return RowSource(read_rows(data, split, columns, sha256), chosen, options, most=most)


def read_records(source: Source) -> list[Record | Refused]:
    """All records, numbered as they come, with a progress bar in a terminal."""
    hidden = not shows_progress()
    shown = tqdm(source, "align", len(source), unit="chain", delay=2, disable=hidden, leave=False)
    return [replace(record, row=row) for row, record in enumerate(shown)]


def fetch(data: str, sha256: str | None = None) -> str:
    """A local copy of a URL (in the `datasets` cache) or `data` itself; with `sha256`, checks the file's digest."""
    path = _download(data) if "://" in data else data
    if sha256:
        got = hashlib.sha256(Path(path).read_bytes()).hexdigest()
        if got != sha256.lower():
            raise InputError(
                f"data {clean_url(data)} with SHA-256 {got}",
                sha256,
                "download it again, or change data_sha256 if the change is meant",
            )
    return path


def _download(url: str) -> str:
    from aiohttp import ClientError, ClientTimeout
    from datasets import DownloadConfig, DownloadManager, config

    if hub_is_given_up():
        config.HF_HUB_OFFLINE = False  # it would forbid every server
    patience = {"client_kwargs": {"timeout": ClientTimeout(total=None, sock_connect=SECONDS)}}
    try:
        how = DownloadConfig(storage_options={"http": patience, "https": patience})
        return str(DownloadManager(download_config=how).download(url))
    except (ClientError, OSError, ValueError, ImportError, RuntimeError) as error:
        said = clean_text(str(error.__cause__ or error).replace(url, clean_url(url)))
        raise InputError(
            f"data {clean_url(url)}: {said}", "a URL that can be downloaded", "check the URL and the network"
        ) from None


def read_rows(data: str, split: str, columns: Sequence[str], sha256: str | None = None) -> Rows:
    """The rows of a JSON, JSON-lines or parquet file, a URL of one, or a data set on the hub.

    Data sets on the hub come through `datasets`, streamed, so that no converted copy is cached.  JSON is parsed as it
    stands: `datasets` gives each column a type, so that one odd row, or text like a date, changes the text of all.
    Raises InputError where the data cannot be read or a column of `columns` is missing.
    """
    shown, data = clean_url(data), shipped_path(data)
    suffix = _suffix(data)
    if sha256 and not suffix:
        raise InputError(f"data_sha256 with the data set {shown}", "a file to check", "drop data_sha256")
    if "://" not in data:
        _check_local(data, bool(suffix))
    elif not suffix:
        raise InputError(f"data {shown}", f"the URL of a file that ends in {', '.join(KINDS)}", "check the URL")
    path = fetch(data, sha256) if suffix else data
    try:
        rows = _parse(Path(path), suffix) if suffix else _load(data, split)
    except RecursionError:
        raise InputError(f"data {shown}, nested too deeply", "one chain a row", "check the file's content") from None
    except (OSError, ValueError, NotImplementedError) as error:
        cause = error.__cause__ or error
        raise InputError(
            f"data {shown}, which cannot be read ({type(cause).__name__}: {cause})",
            "a JSON list, JSON lines or parquet file with one chain a row, a URL of one, or a data set on the hub",
            "check the file's content, or the id and the network",
        ) from None
    if not rows:
        raise InputError(f"data {shown} with no rows", "one chain a row", "check the file")
    for column in columns:
        if not any(column in row for row in rows):
            raise InputError(
                f"data {shown} without the column {column!r}",
                f"one of {', '.join(map(repr, rows[0]))}",
                "name the columns with --problem_column, --response_column, --annotation_column and --id_column",
            )
    return rows


def _suffix(data: str) -> str:
    """The ending of a file that can be read, or of the URL of one; nothing for anything else."""
    name = re.split(r"[?#]", data)[0] if "://" in data else data
    ending = Path(name).suffix.lower()
    return ending if ending in KINDS else ""


def _check_local(data: str, is_file: bool) -> None:
    """Raises InputError for a file that is not there, and a path that is there and no such file."""
    there = os.path.isfile(data) if is_file else os.path.exists(data)
    if is_file and not there:
        raise InputError(f"data {data}, which does not exist", "an existing file", "check the path")
    if there and not is_file:
        raise InputError(f"data {data}", "a file that ends in .json, .jsonl or .parquet", "rename or convert it")


def _parse(path: Path, suffix: str) -> Rows:
    if suffix != ".parquet":
        return parse_json(path)
    from pyarrow.parquet import ParquetFile

    return ParquetFile(path).read().to_pylist()


def _load(name: str, split: str) -> Rows:
    """A data set on the hub.  Raises ValueError for what cannot be had."""
    from datasets import config, load_dataset, logging
    from datasets.exceptions import DatasetsError
    from huggingface_hub import constants
    from huggingface_hub.errors import HTTPError

    logging.set_verbosity(logging.CRITICAL)  # what goes wrong is reported by the caller, once
    look_for_hub(name)
    config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE
    try:
        return list(load_dataset(name, split=split, streaming=True))
    except (DatasetsError, HTTPError) as error:
        raise ValueError(str(error.__cause__ or error)) from None


def parse_json(path: Path) -> Rows:
    """The rows of a JSON list, or of JSON lines.  Raises ValueError for anything else, with the place in the file."""
    text = path.read_text(encoding="utf-8-sig")
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg != "Extra data" or not text.lstrip().startswith("{"):  # no second object behind a first one
            raise
        rows = [_line(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not isinstance(rows, list):
        raise ValueError("not a list of objects")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise ValueError(f"row {number} is no object")
    return rows


def _line(number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"line {number}: {error.msg} at column {error.colno}") from None
