"""Labels that the text itself gives: regular expressions, with which any reasoning corpus becomes a probe corpus."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import regex

from streamprobe.data.annotations import Section, merge_overlaps
from streamprobe.data.records import Record
from streamprobe.errors import InputError
from streamprobe.system.patterns import compile_pattern, find_matches

KEY = "label_rules"
SENTENCE_END = regex.compile(r"""(?<=[.!?][)\]"'”’»]*)\s+|(?<=[。！？])|\s*\n\s*""")
PARAGRAPH_END = regex.compile(r"\s*\n\s*\n\s*")
SCOPES = {
    "match": "what matches",
    "sentence": "the sentence that it is in",
    "paragraph": "the paragraph that it is in",
    "after": "all of the text behind the first match",
}


class LabelRule(NamedTuple):
    """A label for what matches a pattern, or for what is around or behind that."""

    label: str
    pattern: regex.Pattern
    scope: str = "match"  # one of SCOPES


def parse_rule(text: str) -> LabelRule:
    """The rule that LABEL=REGEX or LABEL=SCOPE:REGEX stands for.  Raises InputError for what is none."""
    label, _, rest = text.partition("=")
    scope, colon, behind = rest.partition(":")
    if not (colon and scope in SCOPES):
        scope, behind = "match", rest
    if not (label.strip() and behind):
        raise InputError(
            f"{KEY} {text!r}",
            f"LABEL=REGEX, or LABEL=SCOPE:REGEX with a scope of {', '.join(SCOPES)}",
            f"correct --{KEY}, as in 'backtracking=sentence:\\bwait\\b'",
        )
    return LabelRule(label.strip(), compile_pattern(behind, KEY), scope)


def apply_rules(record: Record, rules: Sequence[LabelRule]) -> Record:
    """The record with the sections that the rules give its response; their labels are known of all of it.

    In a chat each field of a turn is a text of its own.  Raises InputError for a rule that takes too long.
    """
    if not rules:
        return record
    pieces = [(piece.start, piece.end) for piece in record.chat.pieces] if record.chat else [(0, len(record.response))]
    new = [
        Section(rule.label, begin + start, begin + end)
        for rule in rules
        for begin, stop in pieces
        for start, end in _stretches(record.response[begin:stop], rule)
    ]
    return replace(record, ruled=merge_overlaps(new), everywhere=frozenset(rule.label for rule in rules))


def _stretches(text: str, rule: LabelRule) -> Iterator[tuple[int, int]]:
    """Where in a text the label of a rule is."""
    matches = (match.span() for match in find_matches(rule.pattern, text, KEY) if match.end() > match.start())
    if rule.scope == "match":
        yield from matches
    elif rule.scope == "after":
        first = next(matches, None)
        if first and first[1] < len(text):
            yield first[1], len(text)
    else:
        parts = list(_parts(text, SENTENCE_END if rule.scope == "sentence" else PARAGRAPH_END))
        found = list(matches)
        yield from (part for part in parts if any(part[0] < end and start < part[1] for start, end in found))


def _parts(text: str, end: regex.Pattern) -> Iterator[tuple[int, int]]:
    """A text cut at the ends of its sentences or paragraphs; the white space between them is in none."""
    start = 0
    for cut in end.finditer(text):
        if text[start : cut.start()].strip():
            yield start, cut.start()
        start = cut.end()
    if text[start:].strip():
        yield start, len(text)
