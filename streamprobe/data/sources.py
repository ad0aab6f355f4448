"""Where records come from: a file, a URL or a data set on the hub, with their text untouched.

To add a source, write a class that yields records and can say where it stands: see `Source`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np
from tqdm import tqdm

from streamprobe.data.file_types import Rows
from streamprobe.data.files import read_rows
from streamprobe.data.formats import FORMATS, Format, FormatOptions, Record, Refused, read_row
from streamprobe.errors import InputError
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
    config: str | None = None,
    sha256: str | None = None,
    most: int | None = None,
) -> Source:
    """The records of files, of a URL of one, or of a data set on the hub: `data` is what `files.read_rows` takes.

    `split` and `config` are those of a data set on the hub, `sha256` what a file must have, `most` as in `RowSource`.
    Raises InputError where the data cannot be read or a column that the format needs is missing.
    """
    chosen = FORMATS[format]
    columns = [*chosen.columns(options), *([options.category] if options.category else [])]
    rows = read_rows(data, split=split, config=config, sha256=sha256)
    check_columns(rows, columns, data)
    return RowSource(rows, chosen, options, most=most)


def check_columns(rows: Rows, columns: Sequence[str], data: str) -> None:
    """Raises InputError for a column that no row has; `data` says of which data."""
    for column in columns:
        if not any(column in row for row in rows):
            raise InputError(
                f"data {clean_url(data)} without the column {column!r}",
                f"one of {', '.join(map(repr, rows[0]))}",
                "name the columns with --problem_column, --response_column, --annotation_column and --id_column",
            )


def read_records(source: Source) -> list[Record | Refused]:
    """All records, numbered as they come, with a progress bar in a terminal."""
    hidden = not shows_progress()
    shown = tqdm(source, "align", len(source), unit="chain", delay=2, disable=hidden, leave=False)
    return [replace(record, row=row) for row, record in enumerate(shown)]
