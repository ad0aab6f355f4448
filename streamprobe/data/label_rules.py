"""Labels that the text itself gives: regular expressions, with which any reasoning corpus becomes a probe corpus."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import replace
from difflib import get_close_matches
from typing import NamedTuple

import regex

from streamprobe.data.annotations import Section, merge_overlaps
from streamprobe.data.records import Record
from streamprobe.errors import InputError
from streamprobe.system.patterns import compile_pattern, find_matches

KEY = "label_rules"
SENTENCE_END = regex.compile(r"""(?<=[.!?][)\]"'”’»]{0,3})\s+|(?<=[。！？])|(?<!\s)[^\S\n]*\n\s*""")
PARAGRAPH_END = regex.compile(r"(?<!\s)[^\S\n]*\n[^\S\n]*\n\s*")
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
        meant = get_close_matches(scope, SCOPES, n=1, cutoff=0.75) if colon else []
        if meant:
            raise InputError(f"{KEY} {text!r}", f"the scope {meant[0]}, which is the nearest", f"correct --{KEY}")
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
    matches = sorted(match.span() for match in find_matches(rule.pattern, text, KEY) if match.end() > match.start())
    if rule.scope == "match":
        yield from matches
    elif rule.scope == "after":
        if matches and matches[0][1] < len(text):
            yield matches[0][1], len(text)
    else:
        ends = [end for _, end in matches]
        for part in _parts(text, SENTENCE_END if rule.scope == "sentence" else PARAGRAPH_END):
            behind = bisect_right(ends, part[0])  # the first match that ends in the part or behind it
            if behind < len(matches) and matches[behind][0] < part[1]:
                yield part


def _parts(text: str, end: regex.Pattern) -> Iterator[tuple[int, int]]:
    """A text cut at the ends of its sentences or paragraphs; the white space between them is in none."""
    start = 0
    for cut in end.finditer(text):
        if text[start : cut.start()].strip():
            yield start, cut.start()
        start = cut.end()
    if text[start:].strip():
        yield start, len(text)
