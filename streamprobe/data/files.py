"""Rows of files, of a URL of one, or of a data set on the hub, with their text untouched."""

import glob
import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import unquote

from streamprobe.data.file_types import COMPRESSIONS, FILE_TYPES, NotUtf8, Rows, open_file, parse_name
from streamprobe.errors import InputError, first_line
from streamprobe.system.console import say
from streamprobe.system.network import hub_is_given_up, look_for_hub
from streamprobe.system.privacy import clean_text, clean_url
from streamprobe.system.shipped import shipped_path

if TYPE_CHECKING:
    from datasets import IterableDataset

SECONDS = 2.0  # for a server to take a call; there are two of them
ON_HUB = r"\w[\w.-]*(/[\w.-]+)?"  # an id
ENDINGS = f"{', '.join(FILE_TYPES)} (each also with {' or '.join(COMPRESSIONS)} behind it)"
SOURCES = f"a file that ends in {ENDINGS}, a folder or glob of such files, a URL of one, or a data set on the hub"


class Chosen(NamedTuple):
    """Which files of a folder or glob are read."""

    paths: list[str]  # in order
    left_out: Counter[str]  # how many others there are, by their ending


def read_rows(data: str, *, split: str, config: str | None = None, sha256: str | None = None) -> Rows:
    """The rows of a file, a folder or glob of files, a URL of a file, or a data set on the hub.

    The files of a folder or glob are read in sorted order, and `say` tells which are left out.  `split` and `config`
    (one of its configurations) are those of a data set on the hub, which comes through `datasets`, streamed, so that no
    converted copy is cached.  Files are read as they stand: `datasets` gives each column a type, so that one odd row,
    or text like a number or a date, changes the text of all.  Raises InputError where the data cannot be read, hold no
    rows, or are a file of another `sha256`.
    """
    shown, data = clean_url(data), shipped_path(data)
    many = "://" not in data and is_many(data)
    is_file = not many and parse_name(path_of(data)).suffix in FILE_TYPES
    if sha256 and not is_file:
        what = "the files of" if many else "the data set"
        raise InputError(f"data_sha256 with {what} {shown}", "a single file to check", "drop data_sha256")
    if many or is_file:
        refuse_config(data, config)
    if many:
        rows = _read_many(data)
    elif is_file:
        rows = _read_file(data, parse_name(path_of(data)).stem, sha256)
    else:
        with hub_errors(data):
            rows = list(open_hub(data, config, split))
    if not rows:
        raise no_rows(shown)
    return rows


def no_rows(shown: str) -> InputError:
    """What is reported of data without a row."""
    return InputError(f"data {shown} with no rows", "one text a row", "check the file")


def refuse_config(data: str, config: str | None) -> None:
    """Raises InputError for the name of a configuration beside data that are no data set on the hub."""
    if config:
        got = f"data_config {config} with {clean_url(data)}"
        raise InputError(got, "data on the hub, which alone have one", "drop data_config")


def fetch(data: str, sha256: str | None = None) -> str:
    """A local copy of a URL (in the `datasets` cache) or `data` itself; with `sha256`, checks the file's digest."""
    path = _download(data) if "://" in data else data
    if sha256:
        with open(path, "rb") as file:
            got = hashlib.file_digest(file, "sha256").hexdigest()
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


def path_of(data: str) -> str:
    """A path, or that of a URL."""
    return unquote(re.split(r"[?#]", data)[0]) if "://" in data else data


def is_many(data: str) -> bool:
    """Whether `data` is a folder or a glob; a file may have any name."""
    return os.path.isdir(data) or (not os.path.lexists(data) and bool(re.search(r"[*?[]", data)))


def _read_many(data: str) -> Rows:
    """The rows of the files of a folder or glob, in sorted order."""
    paths, left_out = choose_files(data)
    above = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in paths])
    rows = []
    for path in paths:
        name = os.path.relpath(os.path.join(os.path.dirname(path), parse_name(path).stem), above)
        rows += _read_file(path, name.replace(os.sep, "/"))
    others = "; left out: " + _counts(left_out) if left_out else ""
    say(f"data      {len(paths)} file{'s' * (len(paths) > 1)} of {data}, {len(rows):,} rows{others}")
    return rows


def choose_files(data: str) -> Chosen:
    """The files of a folder or glob that are read: all of one type, each once, hidden ones left out.

    Texts beside files of rows, such as README.md, are left out, and so is what no type reads.  Raises InputError where
    no file is left, or files of several types.
    """
    folder = data if os.path.isdir(data) else os.path.dirname(data)
    found, once = list_files(data)
    names = {path: parse_name(path) for path in once}
    endings = Counter(name.suffix + name.compression for name in names.values())
    readable = {name.suffix for name in names.values() if name.suffix in FILE_TYPES}
    taken = {suffix for suffix in readable if not FILE_TYPES[suffix].is_text} or readable
    if not taken:
        raise InputError(
            f"data {data} without a file that can be read ({_counts(endings) or 'no file at all'})",
            f"files that end in {ENDINGS}",
            f"correct the path, or give a glob for folders below it, such as {os.path.join(folder, '**', '*.jsonl')}",
        )
    paths = [path for path, name in names.items() if name.suffix in taken]
    counts = Counter(names[path].suffix + names[path].compression for path in paths)
    if len({FILE_TYPES[suffix] for suffix in taken}) > 1:
        raise InputError(
            f"data {data} with files of several types ({_counts(counts)})",
            "files of one type",
            f"give a glob for those that are meant, such as {os.path.join(folder, '*' + counts.most_common(1)[0][0])}",
        )
    return Chosen(paths, endings - counts + Counter({"link to another": found - len(once)}))


class Listed(NamedTuple):
    """The files that there are, of any type."""

    found: int  # how many, each by all its names
    once: list[str]  # each by one name, in sorted order


def list_files(data: str) -> Listed:
    """The files of a folder or glob, but for hidden ones.  Raises InputError for what can be no path."""
    pattern = os.path.join(glob.escape(data), "*") if os.path.isdir(data) else data
    try:
        found = sorted(path for path in glob.glob(pattern, recursive=True) if not os.path.isdir(path))
    except ValueError as error:  # a path with a null byte
        raise InputError(f"data {pattern}: {first_line(error)}", "a folder or a glob", "correct the path") from None
    links = sorted(found, key=lambda path: os.path.realpath(path) == os.path.abspath(path))
    once = {os.path.realpath(path): path for path in links}  # each by its own name, where it is found by that too
    return Listed(len(found), sorted(once.values()))


def _counts(endings: Counter[str]) -> str:
    return ", ".join(f"{n} {ending or 'without an ending'}" for ending, n in sorted(endings.items()))


def _read_file(data: str, name: str, sha256: str | None = None) -> Rows:
    """The rows of a file or of the URL of one; `name` is what a text is called."""
    shown, parts = clean_url(data), parse_name(path_of(data))
    if "://" not in data:
        check_file(data)
    path, type = fetch(data, sha256), FILE_TYPES[parts.suffix]
    try:
        with open_file(path, parts.compression) as file:
            return type.read(file, name)
    except RecursionError:
        raise InputError(f"data {shown}, nested too deeply", type.about, "check the file's content") from None
    except NotUtf8 as error:
        raise InputError(
            f"data {shown}, {error}",
            "UTF-8",
            "convert it, as by: iconv -f latin1 -t utf-8 OLD > NEW (latin1, or what it is in: cp1252, utf-16, ...)",
        ) from None
    except (OSError, ValueError, NotImplementedError) as error:
        said = first_line(error.__cause__ or error)
        raise InputError(
            f"data {shown}, which cannot be read ({said})", type.about, "check the file's content"
        ) from None


def check_file(path: str) -> None:
    """Raises InputError where there is no file."""
    if not os.path.isfile(path):
        why = "which is no file" if os.path.lexists(path) else "which does not exist"
        raise InputError(f"data {path}, {why}", "an existing file", "check the path")


@contextmanager
def hub_errors(name: str, expected: str = SOURCES) -> Iterator[None]:
    """What `datasets` says of a data set on the hub, while it is opened and read, as an InputError."""
    try:
        yield
    except Exception as error:
        if isinstance(error, InputError) or not _is_of_hub(error):
            raise
        cause = error.__cause__ or error
        raise InputError(
            f"data {name}, which cannot be read ({type(cause).__name__}: {clean_text(str(cause))})",
            expected,
            "check the id, the network, --data_config and --data_split",
        ) from None


def _is_of_hub(error: Exception) -> bool:
    """Whether an error is of a data set that cannot be had, and no bug."""
    from datasets.exceptions import DatasetsError  # not before something has failed: it takes seconds
    from huggingface_hub.errors import HTTPError

    return isinstance(error, OSError | ValueError | NotImplementedError | DatasetsError | HTTPError)


def open_hub(name: str, config: str | None, split: str, expected: str = SOURCES) -> "IterableDataset":
    """A data set on the hub, whose rows come as they are read.

    Raises InputError for what is no id, with what is `expected`, and what `hub_errors` understands for what cannot be
    had.
    """
    if os.path.lexists(name) or "://" in name:
        ending = parse_name(path_of(name)).suffix
        got = f"data {clean_url(name)}, which ends in {ending}" if ending else f"data {clean_url(name)}"
        raise InputError(got, expected, "rename or convert it")
    if not re.fullmatch(ON_HUB, name):
        raise InputError(f"data {name}, which does not exist", expected, "check the path")
    from datasets import config as settings
    from datasets import load_dataset, logging
    from huggingface_hub import constants

    logging.set_verbosity(logging.CRITICAL)  # what goes wrong is reported by the caller, once
    look_for_hub(name)
    settings.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE
    return load_dataset(name, config, split=split, streaming=True)
