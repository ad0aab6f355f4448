"""A row of a data set as a Record: one function a format, and the table in which config, help and errors find it.

To add a format, write a function `row, options -> Record` and a row in FORMATS.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from streamprobe.data.annotations import NAMES, Annotation, Section, annotate, rejoin
from streamprobe.data.prompts import is_unicode

Row = Mapping[str, Any]  # a row of a data set, by column


@dataclass(frozen=True)
class Record:
    """One labelled text: what every format makes of a row."""

    response: str  # what the model wrote
    annotation: Annotation  # its sections, in characters of `response`, and what had to be repaired
    problem: str = ""
    id: str = ""
    category: str = ""  # the kind of problem, to which results can be split
    row: int = 0  # which of the records that are read, from 0: see `sources.read_records`

    @property
    def sections(self) -> Sequence[Section]:
        """The labelled stretches of `response`."""
        return self.annotation.sections


@dataclass(frozen=True)
class Refused:
    """A row that is no Record; the problem in its column still counts in the split, so that it moves no other."""

    reason: str
    problem: object = ""
    id: str = ""
    category: str = ""
    row: int = 0


class Unusable(Exception):
    """Raised by a format for a row that it cannot use; the message is the reason under which the row is counted."""


class FormatOptions(NamedTuple):
    """Which columns hold what, and how a format reads them."""

    id: str = "task_id"
    problem: str = "problem"
    response: str = "reasoning_chain"
    annotation: str = "annotated_chain"
    category: str | None = None  # None: the id without its number
    rejoined: bool = False  # the annotated sections alone, joined by spaces, instead of the response as it was written
    label_names: Mapping[str, str] = NAMES  # labels that are called otherwise in the data -> what they are called here


class Format(NamedTuple):
    """A way in which labels lie in a data set."""

    read: Callable[[Row, FormatOptions], Record]  # raises Unusable
    columns: Callable[[FormatOptions], Sequence[str]]  # that the data must have
    about: str  # for the help of the key `format`


def annotated(row: Row, options: FormatOptions) -> Record:
    """A text, and a copy of it with `["label"]...["end-section"]` around its sections."""
    problem, response, copy = (row.get(name) for name in (options.problem, options.response, options.annotation))
    problem = "" if problem is None else problem
    if not (isinstance(problem, str) and isinstance(response, str) and isinstance(copy, str)):
        raise Unusable("with a field that is missing or not text")
    if not is_unicode(problem + (copy if options.rejoined else response)):
        raise Unusable("with text that is not Unicode")
    if not response.strip():
        raise Unusable("with an empty response")
    if options.rejoined:
        response, found = rejoin(copy, response, options.label_names)
    else:
        found = annotate(copy, response, options.label_names)
    if found.strange and not found.asked:
        raise Unusable(f"whose tags are all of a form that is not understood, such as {found.strange[0]}")
    return Record(response, found, problem)


FORMATS = {
    "annotated": Format(
        annotated,
        lambda options: [options.id, options.problem, options.response, options.annotation],
        'the text, and a copy of it with its sections in ["label"]...["end-section"]',
    ),
}


def read_row(row: Row, number: int, format: Format, options: FormatOptions) -> Record | Refused:
    """Row `number` (from 0) as a Record, or Refused with the reason.

    Where the format names no id and no category, these are of the columns of `options`; a row without an id is named
    by its place (the first is `#1`).
    """
    id = f"#{number + 1}" if (given := row.get(options.id)) is None else str(given)
    category = str(row.get(options.category)) if options.category else category_of(id)
    try:
        if not is_unicode(id + category):
            raise Unusable("with an id or a category that is not Unicode")
        record = format.read(row, options)
        return replace(record, id=record.id or id, category=record.category or category)
    except Unusable as why:
        return Refused(str(why), row.get(options.problem), id, category)


def category_of(id: str) -> str:
    """The kind of problem that an id names: the part before its number; nothing where it is a number alone."""
    return re.sub(r"[\W_]*\d+$", "", id)
