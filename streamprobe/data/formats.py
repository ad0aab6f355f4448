"""A row of a data set as a Record: one function a format."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from streamprobe.data.annotations import NAMES, Annotation, Section, annotate, rejoin
from streamprobe.data.prompts import is_unicode


@dataclass
class Record:
    """One annotated chain as text."""

    id: str
    problem: str
    response: str
    sections: list[Section]  # characters of `response`


def make_record(
    id: str,
    problem: object,
    response: object,
    annotated: object,
    kind: str = "original",
    unlabelled: str = "ignore",
    label_names: Mapping[str, str] = NAMES,
) -> tuple[Record, Annotation] | str:
    """One row as a Record beside what was found of its annotation, or the reason why the row is refused.

    kind: the response as it was written (`original`), or the annotated sections joined by spaces (`rejoined`).
    unlabelled: see `tokenize` and `why_unused`.
    """
    if not (isinstance(problem, str) and isinstance(response, str) and isinstance(annotated, str)):
        return "with a field that is missing or not text"
    if not is_unicode(problem + (annotated if kind == "rejoined" else response)):
        return "with text that is not Unicode"
    if not response.strip():
        return "with an empty response"
    if kind == "rejoined":
        response, found = rejoin(annotated, response, label_names)
    else:
        found = annotate(annotated, response, label_names)
    if found.strange and not found.asked:
        return f"whose tags are all of a form that is not understood, such as {found.strange[0]}"
    reason = why_unused(response, found, unlabelled)
    return reason or (Record(id, problem, response, found.sections), found)


def why_unused(response: str, found: Annotation, unlabelled: str) -> str | None:
    """The reason why a text with this annotation cannot be used, if there is one.

    A text without a section is one of negatives (`unlabelled: negative`), unless its sections were lost.
    """
    if not is_unicode(response + "".join(section.label for section in found.sections)):
        return "with text that is not Unicode"
    if found.sections:
        return None
    if found.lost:
        return "none of whose sections is found in the response"
    return "without a section" if unlabelled == "ignore" or not response else None


def category_of(id: str) -> str:
    """The kind of problem that an id names: the part before its number; nothing where it is a number alone."""
    return re.sub(r"[\W_]*\d+$", "", id)
