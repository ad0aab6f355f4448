"""Texts that are only scored, which need no labels."""

import hashlib
from collections.abc import Iterable
from typing import Any

from streamprobe.data.detect import COLUMNS, FormatQuery, find_format
from streamprobe.data.files import read_rows
from streamprobe.data.records import FormatOptions, Record, Refused
from streamprobe.data.sources import RowSource, read_records
from streamprobe.errors import InputError
from streamprobe.system.console import say
from streamprobe.system.privacy import clean_url


def read_texts_to_score(
    data: str,
    asked: FormatQuery,
    options: FormatOptions,
    *,
    usual: FormatQuery,
    split: str = "train",
    config: str | None = None,
) -> list[Record | Refused]:
    """The texts of a file, URL or data set on the hub, of any format, with what is in front of them.

    A column that is not `asked` for is the `usual` one, where the data have it, or else is found.  Raises InputError
    where the data cannot be read or hold no text.
    """
    rows = read_rows(data, split=split, config=config)
    there = {column for row in rows for column in row}
    names = (*COLUMNS, "category")
    known = {name: getattr(usual, name) for name in names if getattr(usual, name) in there}
    chosen: dict[str, Any] = {name: getattr(asked, name) or known.get(name) for name in names}
    found = find_format(rows, clean_url(data), asked._replace(**chosen, labelled=False), options)
    say(f"format    {found}")
    records = read_records(RowSource(rows, found))
    if all(isinstance(record, Refused) for record in records):
        reason = next(record.reason for record in records if isinstance(record, Refused))
        raise InputError(
            f"texts {clean_url(data)}, of which none can be read (the first one: {reason})",
            f"text in the column {found.options.response!r}",
            "check the file's content",
        )
    return records


def fingerprint(records: Iterable[Record | Refused]) -> str:
    """SHA-256 of the ids and of all that is read."""
    digest = hashlib.sha256()
    for record in records:
        for text in (record.id, str(record.problem), *(_read(record) if isinstance(record, Record) else ())):
            content = text.encode(errors="surrogatepass")
            digest.update(len(content).to_bytes(8, "little") + content)
    return digest.hexdigest()


def _read(record: Record) -> tuple[str, ...]:
    """What a model reads of a record, but for its problem."""
    chat = record.chat
    return (record.response, *((repr(chat.messages), repr(chat.tools)) if chat else ()))
