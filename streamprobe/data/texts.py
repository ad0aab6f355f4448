"""Texts that are only scored, which need no labels."""

import hashlib
from collections.abc import Iterable
from dataclasses import replace

from streamprobe.data.annotations import Annotation
from streamprobe.data.files import read_rows
from streamprobe.data.formats import Format, FormatOptions, Record, Refused, Row, Unusable, annotated, read_row
from streamprobe.data.prompts import is_unicode
from streamprobe.errors import InputError
from streamprobe.system.privacy import clean_url

COLUMNS = ("text", "response", "reasoning_chain", "content")  # that a text may be in, where the run's own is not there


def read_texts_to_score(data: str, options: FormatOptions, split: str = "train") -> list[Record | Refused]:
    """The texts of a file, URL or data set on the hub, numbered as they come, in the column that the run read or one
    of COLUMNS; with the problem in front of them, where there is one.

    Where the run read the annotated sections alone (`options.rejoined`), so are those of rows that have them.  Raises
    InputError where the data cannot be read or hold no text.
    """
    rows = read_rows(data, split, [])
    there = {column for row in rows for column in row}
    candidates = list(dict.fromkeys([options.response, *COLUMNS]))
    response = next((name for name in candidates if name in there), None)
    if response is None:
        raise InputError(
            f"texts {clean_url(data)} with the columns {', '.join(map(repr, sorted(there)[:20]))}",
            f"one of {', '.join(map(repr, candidates))}",
            "rename the column of the texts",
        )
    rejoined = options.rejoined and options.annotation in there
    format = Format(annotated if rejoined else _text_alone, lambda _: [], "")
    options = options._replace(response=response, id=options.id if options.id in there else "id", category=None)
    records = [replace(read_row(row, i, format, options), row=i) for i, row in enumerate(rows)]
    if all(isinstance(record, Refused) for record in records):
        reason = next(record.reason for record in records if isinstance(record, Refused))
        raise InputError(
            f"texts {clean_url(data)}, of which none can be read (the first one: {reason})",
            f"text in the column {response!r}",
            "check the file's content",
        )
    return records


def _text_alone(row: Row, options: FormatOptions) -> Record:
    """A text without labels, and the problem in front of it, if there is one."""
    problem, response = row.get(options.problem), row.get(options.response)
    problem = "" if problem is None else problem
    if not (isinstance(problem, str) and isinstance(response, str)):
        raise Unusable("with a field that is missing or not text")
    if not is_unicode(problem + response):
        raise Unusable("with text that is not Unicode")
    if not response.strip():
        raise Unusable("without any text")
    return Record(response, Annotation([]), problem)


def fingerprint(records: Iterable[Record | Refused]) -> str:
    """SHA-256 of the ids, problems and texts."""
    digest = hashlib.sha256()
    for record in records:
        for text in (record.id, str(record.problem), record.response if isinstance(record, Record) else ""):
            content = text.encode(errors="surrogatepass")
            digest.update(len(content).to_bytes(8, "little") + content)
    return digest.hexdigest()
