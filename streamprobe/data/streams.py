"""Records without an end: from files that may be larger than memory, the hub, or standard input.

To add a kind of source, write a `stream_rows.RowReader` and name it in `_reader`.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain, islice
from typing import Any

from streamprobe.data.detect import FormatQuery, Found, find_format
from streamprobe.data.file_types import COMPRESSIONS, FILE_TYPES, JSON_LINES, parse_name
from streamprobe.data.files import choose_files, is_many, no_rows, path_of, refuse_config
from streamprobe.data.formats import FORMATS, read_row
from streamprobe.data.records import FormatOptions, Record, Refused
from streamprobe.data.stream_files import FileRows
from streamprobe.data.stream_hub import HubRows
from streamprobe.data.stream_pipe import PipeRows
from streamprobe.data.stream_rows import RowReader, StreamRow, Waiting
from streamprobe.errors import InputError
from streamprobe.system.privacy import clean_url
from streamprobe.system.shipped import shipped_path

STDIN = "-"  # what standard input is called as `data`
SAMPLE = 64  # first rows by which the format is found, and that are read ahead for it
STREAMS = {  # types that are read row by row, and whether they are when they are compressed
    suffix: type is JSON_LINES for suffix, type in FILE_TYPES.items() if type.entries
}
ENDINGS = ", ".join(
    suffix + f" (also with {' or '.join(COMPRESSIONS)} behind it)" * packed for suffix, packed in STREAMS.items()
)
SOURCES = f"a file that ends in {ENDINGS}, a folder or glob of these, a data set on the hub, or - for standard input"


def never() -> bool:
    """For a stream that nothing stops."""
    return False


class RecordStream:
    """The records of a stream of rows, in its order: a `sources.Stream`.

    Its memory does not grow with what it has given, but for a place a file.
    """

    def __init__(self, reader: RowReader, rows: Iterator[StreamRow], found: Found):
        """`rows` are those of `reader`, from the first; `found` says how they are read."""
        self.reader, self.found = reader, found
        self._rows, self._given, self._at = rows, 0, ""
        self._places: dict[str, dict[str, Any]] = {}  # of each file, the place behind the last row given

    def __iter__(self) -> Iterator[Record | Refused]:
        for row in self._rows:
            number, self._given = self._given, self._given + 1
            self._places[row.origin], self._at = dict(row.place), row.origin
            yield self._record(row, number)

    def _record(self, row: StreamRow, number: int) -> Record | Refused:
        """Row `number` of the stream as a record."""
        if row.row is None:
            return Refused(row.reason, id=row.name, row=number)
        format, options = FORMATS[self.found.name], self.found.options
        return replace(read_row(row.row, number, format, options, name=row.name), row=number)

    def state(self) -> dict[str, Any]:
        """Where it stands, as JSON takes it: right behind the last record given, whatever was read ahead.

        `given` counts records, `places` says how far each file (or other origin) has been given and `at` which one the
        last record was of; `format` keeps the columns, which a longer file might let one find otherwise.
        """
        return {
            "source": self.reader.kind,
            "given": self._given,
            "at": self._at,
            "places": {name: dict(place) for name, place in self._places.items()},
            "format": {**self.found.keys, "yes_or_no": self.found.options.yes_or_no},
        }

    def load(self, state: dict[str, Any]) -> None:
        """Goes on where the stream that gave `state` stood.

        Standard input is read up to there.  Raises InputError where a file is gone, shorter or another one, or the
        data come from another kind of source.
        """
        if state["source"] != self.reader.kind:
            got = f"data from {self.reader.kind} for a run whose data came from {state['source']}"
            raise InputError(got, "the same data", "name them as before, or begin a new run")
        kept = state["format"]
        columns = {name: kept[f"{name}_column"] for name in ("id", "problem", "response", "annotation")}
        self._rows = self.reader.resume(state["places"], state["at"], self._rows)
        self.found = Found(kept["format"], self.found.options._replace(**columns, yes_or_no=kept["yes_or_no"]))
        self._given, self._at = state["given"], state["at"]
        self._places = {name: dict(place) for name, place in state["places"].items()}


def open_stream(
    data: str,
    asked: FormatQuery,
    options: FormatOptions,
    *,
    split: str = "train",
    config: str | None = None,
    wait_seconds: float | None = None,
    stopped: Callable[[], bool] = never,
) -> RecordStream:
    """The records of JSON lines or parquet (a file, a folder or a glob), of a data set on the hub, or of `-`.

    `asked` says what is known of the format and the columns, `options` how they are read: they are found by the first
    SAMPLE rows, for which it waits and which are then given like all others.  `split` and `config` are those of a data
    set on the hub.  `wait_seconds` says how long a source that has run dry is waited for; None: files end at their end,
    standard input when it is closed.  `stopped` is asked at least once a second while it waits, and ends the stream.
    Raises InputError for data that cannot be read as a stream, hold no rows, or have no format that is known.
    """
    shown = clean_url(data)
    waiting = Waiting("standard input" if data == STDIN else shown, wait_seconds, stopped)
    reader = _reader(shipped_path(data), split, config, waiting)
    rows = reader.rows()
    ahead = list(islice(rows, SAMPLE))
    sample = [row.row for row in ahead if row.row is not None]
    if not sample and stopped():
        raise InputError(f"data {shown}, stopped before its first row", "a row", "begin the run again")
    if not ahead:
        raise no_rows(shown)
    if not sample:
        got = f"data {shown}, whose first rows cannot be read ({ahead[0].name}, {ahead[0].reason})"
        raise InputError(got, "an object a line in UTF-8, or parquet", "check the file's content")
    return RecordStream(reader, chain(ahead, rows), find_format(sample, shown, asked, options))


def _reader(data: str, split: str, config: str | None, waiting: Waiting) -> RowReader:
    """What reads the rows of `data`.  Raises InputError for what is no stream."""
    if data != STDIN and ("://" in data or not is_many(data)) and parse_name(path_of(data)).suffix not in FILE_TYPES:
        return HubRows(data, config, split, SOURCES)
    refuse_config(data, config)
    if data == STDIN:
        return PipeRows(waiting)
    if "://" in data:
        got = f"data {clean_url(data)}, a URL, as a stream"
        raise InputError(got, SOURCES, "pipe it in, as by: curl URL | streamprobe train ... --data -")
    for path in choose_files(data).paths if is_many(data) else [data]:
        name = parse_name(path)
        if name.suffix not in STREAMS or (name.compression and not STREAMS[name.suffix]):
            got = f"data {path}, which ends in {name.suffix}{name.compression}, as a stream"
            raise InputError(got, SOURCES, "convert it, or leave out --streaming")
    return FileRows(data, waiting)
