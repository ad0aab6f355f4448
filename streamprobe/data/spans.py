"""Labelled stretches of a text, as they are given: by their characters, or by what they say."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from streamprobe.data.annotations import NAMES, Annotation, Section, merge_overlaps
from streamprobe.data.columns import has_keys
from streamprobe.data.records import Unusable

LABEL = ("label", "labels", "type", "tag", "category", "entity")
START, END = ("start", "start_offset", "begin"), ("end", "end_offset", "stop")
QUOTE = ("text", "substring", "quote", "span")
WHICH = ("n", "occurrence")


class Span(NamedTuple):
    """One stretch as it is given: by characters start .. end, by the text there, or by both."""

    labels: tuple[str, ...]
    start: int | None = None
    end: int | None = None
    text: str | None = None
    n: int | None = None  # which place of the text is meant, from 1; None: all places


def is_span(value: Any) -> bool:
    """Whether a value can be a span: {start, end, label}, {text, label}, or [start, end, label]."""
    if isinstance(value, list | tuple):
        return len(value) == 3 and all(type(each) is int for each in value[:2]) and isinstance(value[2], str)
    return has_keys(value, LABEL, START, END) or has_keys(value, LABEL, QUOTE)


def read_span(value: Any) -> Span:
    """A span as a row holds it.  Raises Unusable for what is none."""
    if isinstance(value, list | tuple) and is_span(value):
        return Span((value[2],), value[0], value[1])
    if not isinstance(value, Mapping):
        raise Unusable("with a span that is neither {start, end, label}, {text, label} nor [start, end, label]")
    start, end, text, n = (_first(value, names) for names in (START, END, QUOTE, WHICH))
    if not all(each is None or (isinstance(each, int) and not isinstance(each, bool)) for each in (start, end, n)):
        raise Unusable("with a span whose start, end or n is no whole number")
    if (start is None) != (end is None) or (start is None and not (isinstance(text, str) and text)):
        raise Unusable("with a span without start and end, and without text")
    if n is not None and n < 1:
        raise Unusable("with a span whose n is below 1")
    return Span(tuple(labels_of(_first(value, LABEL))), start, end, text if isinstance(text, str) else None, n)


def _first(value: Mapping[str, Any], names: Sequence[str]) -> Any:
    return next((value[name] for name in names if value.get(name) is not None), None)


def labels_of(value: Any) -> list[str]:
    """One or several labels, as they are given.  Raises Unusable for what is none."""
    labels = value if isinstance(value, list) else [value]
    if not labels or not all(isinstance(each, str) and each.strip() for each in labels):
        raise Unusable("with a span that has no label")
    return labels


def find_spans(
    text: str, spans: Iterable[Span], names: Mapping[str, str] = NAMES, *, within: Sequence[tuple[int, int]] = ()
) -> Annotation:
    """The sections of a text that its spans mean; `names` says which labels are called otherwise.

    Text is looked for `within` one of these stretches of the text (none: anywhere).  A span whose characters say
    something else than its text is moved to the nearest place that does, and counted as edited.  What is found nowhere
    is lost, and named.  Raises Unusable for characters outside of the text.
    """
    found: list[Section] = []
    given: list[str] = []
    missing: list[str] = []
    edited = 0
    quoted: dict[str, list[tuple[int, int]]] = {}  # text -> all of its places
    for span in dict.fromkeys(spans):
        places, moved = _places(text, span, within or [(0, len(text))], quoted)
        edited += moved
        given += span.labels
        if not places:
            missing.append(span.text or "")
        found += [Section(names.get(label, label), *place) for label in span.labels for place in places]
    sections = merge_overlaps(found)
    return Annotation(sections, edited=edited, lost=len(missing), names=given, missing=missing)


def _places(
    text: str, span: Span, within: Sequence[tuple[int, int]], quoted: dict[str, list[tuple[int, int]]]
) -> tuple[list[tuple[int, int]], bool]:
    """Where in the text a span is, and whether that is not where it says."""
    if span.text and span.text not in quoted:
        pattern = re.compile(re.escape(span.text))
        quoted[span.text] = [m.span() for start, end in within for m in pattern.finditer(text, start, end)]
    found = quoted.get(span.text or "", [])
    if span.start is None or span.end is None:
        return (found if span.n is None else found[span.n - 1 : span.n]), False
    if not 0 <= span.start < span.end <= len(text):
        raise Unusable("with a span outside of its text, or of no character")
    if span.text is None or text[span.start : span.end].split() == span.text.split():
        return [(span.start, span.end)], False
    return sorted(found, key=lambda place: abs(place[0] - (span.start or 0)))[:1], bool(found)
