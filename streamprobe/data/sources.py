"""Where records come from: a file, a URL or a data set on the hub, with their text untouched.

To add a source, write a class that yields records and can say where it stands: see `Source`.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
from tqdm import tqdm

from streamprobe.data.detect import FormatQuery, Found, find_format
from streamprobe.data.file_types import Rows
from streamprobe.data.files import read_rows
from streamprobe.data.formats import FORMATS, read_row
from streamprobe.data.records import FormatOptions, Record, Refused
from streamprobe.system.console import shows_progress
from streamprobe.system.privacy import clean_url


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


class Stream(Protocol):
    """Records without an end; a new stream of the same data goes on where another one stood."""

    def __iter__(self) -> Iterator[Record | Refused]:
        """The records that are still to come; the `row` of each is its number in the stream, from 0."""
        ...

    def state(self) -> dict[str, Any]:
        """Where it stands, as JSON takes it: right behind the last record given."""
        ...

    def load(self, state: dict[str, Any]) -> None:
        """Goes on where the stream that gave `state` stood.  Raises InputError where the data are others."""
        ...


class RowSource:
    """The rows of a file or data set, each read by one of `formats.FORMATS`."""

    def __init__(
        self,
        rows: Rows,
        found: Found,
        *,
        most: int | None = None,
        place: int = 0,
    ):
        """At most `most` of the rows, evenly spaced (None: all); begins with the row at `place` of these."""
        self.partial = most is not None and most < len(rows)
        self.rows = (
            [rows[i] for i in np.linspace(0, len(rows) - 1, most).astype(int)] if self.partial and most else rows
        )
        self.found, self.place = found, place

    def __iter__(self) -> Iterator[Record | Refused]:
        while self.place < len(self.rows):
            self.place += 1
            yield read_row(self.rows[self.place - 1], self.place - 1, FORMATS[self.found.name], self.found.options)

    def __len__(self) -> int:
        return len(self.rows)

    def state(self) -> dict[str, int]:
        """The number of the next row."""
        return {"place": self.place}


def open_source(
    data: str,
    asked: FormatQuery,
    options: FormatOptions,
    *,
    split: str = "train",
    config: str | None = None,
    sha256: str | None = None,
    most: int | None = None,
) -> RowSource:
    """The records of files, of a URL of one, or of a data set on the hub: `data` is what `files.read_rows` takes.

    `asked` says what is known of its format and columns, `options` how they are read; `split`, `config` and `sha256`
    are as in `read_rows`, `most` as in `RowSource`.  Raises InputError where the data cannot be read,
    and where they have no format that is known.
    """
    rows = read_rows(data, split=split, config=config, sha256=sha256)
    found = find_format(rows, clean_url(data), asked, options)
    return RowSource(rows, found, most=most)


def read_records(source: Source) -> list[Record | Refused]:
    """All records, numbered as they come, with a progress bar in a terminal."""
    hidden = not shows_progress()
    shown = tqdm(source, "align", len(source), unit="chain", delay=2, disable=hidden, leave=False)
    return [replace(record, row=row) for row, record in enumerate(shown)]
