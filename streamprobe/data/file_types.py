"""Types of files that hold rows: one function a type, and the table in which names, errors and docs find it.

To add a type, write a function `file, name -> rows` that raises ValueError with the place of what is wrong, and a row
in FILE_TYPES; a type whose files may be larger than memory also has a function that gives their rows one by one.
All text is UTF-8 and stays as it is: no cell becomes a number, a date or missing by its looks.
"""

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import PurePath
from typing import Any, BinaryIO, NamedTuple, cast

Rows = list[dict[str, Any]]
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}  # as `pyarrow` calls them
LONGEST_CELL = 2**31 - 1  # letters; `csv` has a limit of 131,072 of its own
LONGEST_NAME = 200  # letters of a column's name, above which a first line is taken for no header
QUOTES = {  # what `csv` says of them, and what is reported
    "unexpected end": "a quote that opens in this row is never closed",
    "expected after": "a cell of this row goes on behind its closing quote (a quote inside of a cell is doubled)",
}
ROWS_AT_ONCE = 128  # of a parquet file


class NotUtf8(ValueError):
    """Raised for bytes that are no UTF-8; the message says which, and where."""


class NoObject(ValueError):
    """Raised for a line that is JSON, and no object."""


FAULTS: dict[type[Exception], str] = {  # of a line, the narrowest kind first
    NotUtf8: "that is no UTF-8",
    NoObject: "that is no object",
    RecursionError: "that is nested too deeply",
    ValueError: "that is no JSON",
}


class Entry(NamedTuple):
    """A row where it stands in its file, or what is wrong there."""

    first: int  # number of its line, or of its row where there are no lines; from 1
    last: int  # the same, unless several rows cannot be read
    row: dict[str, Any] | None
    reason: str = ""  # why there is no row


class FileType(NamedTuple):
    """A way in which rows lie in a file."""

    read: Callable[[BinaryIO, str], Rows]  # of the file's content and of its name; raises ValueError or OSError
    about: str  # what such a file holds
    entries: Callable[[BinaryIO, int], Iterator[Entry]] | None = None  # one by one, behind so many lines or rows
    is_text: bool = False  # a text as it stands, which beside files of rows is no row but a README


class FileName(NamedTuple):
    """A file's name in its parts."""

    stem: str
    suffix: str  # a key of FILE_TYPES, or another ending in lower case
    compression: str  # a key of COMPRESSIONS, or nothing


def read_json(file: BinaryIO, _name: str) -> Rows:
    """A list of objects, an object with one such list in it, or lines with an object each."""
    text = _decode(file.read())
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg != "Extra data" or not text.lstrip().startswith("{"):  # no second object behind a first one
            raise
        return _objects(text.split("\n"))
    if isinstance(content, dict):
        lists = [value for value in content.values() if _holds_objects(value)]
        if len(lists) != 1:
            raise ValueError(f"an object with {len(lists) or 'no'} list{'s' * (len(lists) > 1)} of objects in it")
        content = lists[0]
    if not isinstance(content, list):
        raise ValueError("no list of objects")
    for number, row in enumerate(content, 1):
        if not isinstance(row, dict):
            raise ValueError(f"row {number} is no object")
    return content


def read_json_lines(file: BinaryIO, _name: str) -> Rows:
    """An object a line; empty lines are passed over."""
    return _objects(_lines(file))


def read_table(file: BinaryIO, _name: str, *, delimiter: str) -> Rows:
    """Cells under a header, all of them text; an empty one is missing (None).

    A column each of whose cells is a list or an object in JSON (but for empty ones) holds these: one cell of prose that
    happens to begin with a bracket stays text, since the other cells of its column are none.
    """
    limit = csv.field_size_limit(LONGEST_CELL)
    try:
        records = list(_records(_lines(file), delimiter))
    finally:
        csv.field_size_limit(limit)
    if not records:
        return []
    names = records.pop(0)
    columns = [_cells(column) for column in zip(*records, strict=True)]
    return [dict(zip(names, cells, strict=True)) for cells in zip(*columns, strict=True)]


def read_parquet(file: BinaryIO, _name: str) -> Rows:
    """The rows as `pyarrow` gives them."""
    from pyarrow.parquet import ParquetFile

    table = ParquetFile(file if file.seekable() else io.BytesIO(file.read()), page_checksum_verification=True)
    _check_names(table.schema_arrow.names)
    return [row for batch in table.iter_batches(batch_size=1024) for row in batch.to_pylist()]


def line_entries(file: BinaryIO, passed: int) -> Iterator[Entry]:
    """The entries of JSON lines, one by one, behind the first `passed` lines, which are not looked into."""
    for _ in range(passed):
        file.readline()
    return parse_lines(file, passed)


def parse_lines(lines: Iterable[bytes], passed: int = 0) -> Iterator[Entry]:
    """The object of each line, or why there is none; empty lines are passed over.  `passed` lines were before them."""
    for number, line in enumerate(lines, passed + 1):
        try:
            row, reason = _object(_decode(line, place=number - 1)), ""
        except (ValueError, RecursionError) as error:
            row, reason = None, next(said for kind, said in FAULTS.items() if isinstance(error, kind))
        if reason or row is not None:
            yield Entry(number, number, row, reason)


def parquet_entries(file: BinaryIO, passed: int) -> Iterator[Entry]:
    """The entries of a parquet file, one by one, behind the first `passed` rows; of memory it takes a few rows' worth.

    A row group that cannot be read is one entry, behind those of its rows that can be.  Raises ValueError or OSError
    for a file that is none.
    """
    from pyarrow.parquet import ParquetFile

    table = ParquetFile(file, buffer_size=2**20, page_checksum_verification=True)
    _check_names(table.schema_arrow.names)
    last = 0
    for group in range(table.num_row_groups):
        before, last = last, last + table.metadata.row_group(group).num_rows
        if last > passed:
            batches = table.iter_batches(ROWS_AT_ONCE, row_groups=[group])
            yield from (entry for entry in _group_entries(batches, before, last) if entry.last > passed)


def _group_entries(batches: Iterator[Any], number: int, last: int) -> Iterator[Entry]:
    """The rows of a row group, behind row `number` up to row `last`."""
    from pyarrow import ArrowException

    try:
        for batch in batches:
            for row in batch.to_pylist():
                number += 1
                yield Entry(number, number, row)
    except (OSError, ValueError, NotImplementedError, ArrowException):
        yield Entry(number + 1, last, None, "in a row group that cannot be read")


def read_text(file: BinaryIO, name: str) -> Rows:
    """The whole file as one text, called by its name."""
    return [{"id": name, "text": _decode(file.read())}]


JSON_LINES = FileType(read_json_lines, "JSON lines, an object a line", line_entries)
FILE_TYPES = {
    ".json": FileType(read_json, "a JSON list of objects, or an object with one such list in it"),
    ".jsonl": JSON_LINES,
    ".ndjson": JSON_LINES,
    ".csv": FileType(partial(read_table, delimiter=","), "a header and rows of cells between commas"),
    ".tsv": FileType(partial(read_table, delimiter="\t"), "a header and rows of cells between tabs"),
    ".parquet": FileType(read_parquet, "a parquet file", parquet_entries),
    ".txt": FileType(read_text, "a text", is_text=True),
    ".md": FileType(read_text, "a text in Markdown", is_text=True),
}


def parse_name(path: str) -> FileName:
    """The parts of a file's name, which may end in two suffixes such as .jsonl.gz."""
    name = PurePath(path)
    compression = name.suffix.lower() if name.suffix.lower() in COMPRESSIONS else ""
    inner = PurePath(name.stem) if compression else name
    return FileName(inner.stem, inner.suffix.lower(), compression)


def open_file(path: str, compression: str) -> BinaryIO:
    """The content of a file, decompressed as it is read.  Raises ValueError for an archive without a byte, OSError."""
    if not compression:
        return open(path, "rb")
    import pyarrow

    with open(path, "rb") as file:
        if not file.read(1):
            raise ValueError("an empty archive")
    stream = pyarrow.input_stream(path, compression=COMPRESSIONS[compression])
    return cast(BinaryIO, io.BufferedReader(stream))


def _decode(content: bytes, line: int = 1, place: int = 0) -> str:
    """UTF-8 as text, without a byte order mark; `line` and `place` say where in the file it begins."""
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        line += content.count(b"\n", 0, error.start)
        byte = content[error.start]
        raise NotUtf8(f"line {line}: byte {place + error.start} (0x{byte:02x}) is no UTF-8") from None
    return text if place else text.removeprefix("\ufeff")


def _lines(file: BinaryIO) -> Iterator[str]:
    """The lines of a file with their ends, which are \\n or \\r\\n; other signs that end a line stay inside of one."""
    place = 0
    for number, line in enumerate(file, 1):
        yield _decode(line, number, place)
        place += len(line)


def _object(line: str) -> dict[str, Any] | None:
    """The object of a line, None for an empty one.  Raises JSONDecodeError or NoObject."""
    if not line.strip():
        return None
    row = json.loads(line)
    if not isinstance(row, dict):
        raise NoObject
    return row


def _objects(lines: Iterable[str]) -> Rows:
    """The object of every line that is not empty."""
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = _object(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"line {number}: {error.msg} at column {error.colno}") from None
        except NoObject:
            raise ValueError(f"line {number} is no object") from None
        if row is not None:
            rows.append(row)
    return rows


def _holds_objects(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(each, dict) for each in value)


def _records(lines: Iterator[str], delimiter: str) -> Iterator[list[str]]:
    """The header of a table and its rows, each with as many cells; lines without any are passed over."""
    reader = csv.reader(
        lines, delimiter=delimiter, strict=True
    )  # else a quote that is left open takes all that follows
    line, width = 1, 0
    try:
        for cells in reader:
            if cells and not width:
                width = len(cells)
                _check_names(cells, f"line {line}: ")
            if cells and len(cells) != width:
                raise ValueError(f"line {line}: {len(cells)} cell{'s' * (len(cells) > 1)} under a header of {width}")
            if cells:
                yield cells
            line = reader.line_num + 1
    except csv.Error as error:
        said = next((said for sign, said in QUOTES.items() if sign in str(error)), error)
        raise ValueError(f"line {line}: {said}") from None


def _check_names(names: Sequence[str], place: str = "") -> None:
    """Raises ValueError for names of columns that cannot be told apart, or that are texts: a header is missing."""
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{place}two columns with the name {name[:LONGEST_NAME]!r}")
        if len(name) > LONGEST_NAME:
            raise ValueError(f"{place}no header, but a cell of {len(name):,} letters")


def _cells(column: Sequence[str]) -> list[Any]:
    """The cells of a column: what they hold in JSON where each of them does, else their text."""
    texts = [text or None for text in column]
    parsed = []
    for text in texts:
        value = text and _structure(text)
        if text and value is None:
            return list(texts)
        parsed.append(value)
    return parsed


def _structure(text: str) -> list[Any] | dict[str, Any] | None:
    """The list or object that a text is in JSON; None for any other."""
    if not text.startswith(("[", "{")):
        return None
    try:
        return cast(list[Any] | dict[str, Any], json.loads(text))
    except (ValueError, RecursionError):
        return None
