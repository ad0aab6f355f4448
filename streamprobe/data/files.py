"""Rows of a file, of a URL of one, or of a data set on the hub, with their text untouched."""

import hashlib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from streamprobe.errors import InputError
from streamprobe.system.network import hub_is_given_up, look_for_hub
from streamprobe.system.privacy import clean_text, clean_url
from streamprobe.system.shipped import shipped_path

Rows = list[dict[str, Any]]
SECONDS = 2.0  # for a server to take a call; there are two of them
KINDS = (".json", ".jsonl", ".parquet")


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
    if isinstance(rows, dict) and path.suffix.lower() == ".jsonl":  # of one line
        rows = [rows]
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
