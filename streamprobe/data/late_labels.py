"""What label rules say of a text while it is still being written: each label as soon as nothing can change it.

A rule may label what comes before its match: of `backtracking=sentence:is wrong` the whole sentence, from its first
word.  So the labels of a token arrive late, often with the end of its sentence or paragraph.  What is settled is what
`label_rules.apply_rules` says of the whole text, whatever is written next; `GrowingMatches` says which patterns let
that be known before the text ends, and what is not settled by then is settled at the end.

    scope       settled are characters
    match       up to where a match may still begin
    sentence    up to the end of the last sentence that is known to be over, and in which all matches are known
    paragraph   likewise of paragraphs
    after       all of them once a first match is known; before that, as with `match`

Shapes: n tokens, C labels.
"""

from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from streamprobe.data.annotations import Section, merge_overlaps
from streamprobe.data.label_rules import KEY, PARAGRAPH_END, SENTENCE_END, LabelRule
from streamprobe.lags import INSIDE, ONSET, OUTSIDE, UNKNOWN
from streamprobe.system.growing_matches import GrowingMatches


class Settled(NamedTuple):
    """What is known of a text so far."""

    upto: int  # characters whose labels can no longer change
    sections: list[Section]  # those that begin before that; one that is longer may grow


class LateLabels:
    """The sections that label rules give a text that comes in pieces, as far as they are settled.

    At the end they are those of `apply_rules`.
    """

    def __init__(self, rules: Sequence[LabelRule]):
        self.text = ""
        self.rules = [_GrowingRule(rule) for rule in rules]

    def push(self, piece: str) -> Settled:
        """Takes the next piece of the text.  Raises InputError for a rule that takes too long."""
        return self._read(piece, ended=False)

    def end(self, piece: str = "") -> Settled:
        """The text is over, behind this last piece.  Raises InputError for a rule that takes too long."""
        return self._read(piece, ended=True)

    def _read(self, piece: str, ended: bool) -> Settled:
        self.text += piece
        upto = min((rule.read(self.text, ended) for rule in self.rules), default=len(self.text))
        found = merge_overlaps(section for rule in self.rules for section in rule.sections)
        return Settled(upto, [section for section in found if section.start < upto])


class _GrowingRule:
    """One rule and the sections that it has settled."""

    def __init__(self, rule: LabelRule):
        self.rule, self.sections = rule, list[Section]()
        self.matches = GrowingMatches(rule.pattern, KEY)
        cuts = {"sentence": SENTENCE_END, "paragraph": PARAGRAPH_END}
        self.cuts = GrowingMatches(cuts[rule.scope], KEY) if rule.scope in cuts else None
        self.start = self.cut = self.taken = 0  # of the part that is open, of the cut behind it, of matches

    def read(self, text: str, ended: bool) -> int:
        """Takes the text so far; returns up to which character its labels are settled."""
        for growing in (self.matches, self.cuts):
            if growing is not None:
                growing.end(text) if ended else growing.read(text)
        if self.cuts is not None:
            upto = self._label_parts(text, self.cuts, ended)
        elif self.rule.scope == "after":
            upto = self._label_after(text)
        else:
            upto = self._label_matches()
        return len(text) if ended else min(upto, len(text))

    def _label_matches(self) -> int:
        for start, end in self.matches.spans[self.taken :]:
            if end > start:
                self.sections.append(Section(self.rule.label, start, end))
        self.taken = len(self.matches.spans)
        return self.matches.decided

    def _label_after(self, text: str) -> int:
        first = next((end for start, end in self.matches.spans if end > start), None)
        if first is None:
            return self.matches.decided
        self.sections = [Section(self.rule.label, first, len(text))] if first < len(text) else []
        return len(text)

    def _label_parts(self, text: str, cuts: GrowingMatches, ended: bool) -> int:
        """Labels the sentences, or paragraphs, that are over; returns where the first one that is not begins."""
        matches = [(start, end) for start, end in self.matches.spans if end > start]
        ends = [end for _, end in matches]
        bounds = [*cuts.spans[self.cut :], *([(len(text), len(text))] if ended else [])]
        for stop, after in bounds:
            if text[self.start : stop].strip():
                behind = bisect_right(ends, self.start)  # the first match that ends in the part or behind it
                hit = behind < len(matches) and matches[behind][0] < stop
                if hit:
                    self.sections.append(Section(self.rule.label, self.start, stop))
                elif self.matches.decided < stop:
                    break
            self.start, self.cut = after, self.cut + 1
        return self.start


class LateCodes:
    """The label codes of tokens as they are written, in their order, each given once it is settled."""

    def __init__(self, rules: Sequence[LabelRule], labels: Sequence[str]):
        """`labels` are the C labels, each of a rule."""
        self.late, self.labels = LateLabels(rules), list(labels)
        self.waiting: list[tuple[int, int]] = []  # spans of the tokens whose codes are not settled
        self.inside = dict[str, int]()  # where the section of the last token that was in one of a label begins

    def push(self, piece: str, span: tuple[int, int]) -> Tensor:
        """Takes a token: the text that it completes, and the characters start .. end of the text that it covers.

        A token that stands for no text covers none.  Returns the codes [n, C] int8 of the next n tokens.
        """
        self.waiting.append(span)
        return self._settle(self.late.push(piece))

    def end(self, piece: str = "") -> Tensor:
        """The codes [n, C] int8 of all tokens that are left; `piece` is text that they complete now."""
        return self._settle(self.late.end(piece))

    def _settle(self, settled: Settled) -> Tensor:
        n = 0
        while n < len(self.waiting) and self._last_letter(self.waiting[n]) < settled.upto:
            n += 1
        spans, self.waiting = self.waiting[:n], self.waiting[n:]
        codes = [self._codes_of(span, settled.sections) for span in spans]
        return torch.tensor(codes, dtype=torch.int8).reshape(n, len(self.labels))

    def _last_letter(self, span: tuple[int, int]) -> int:
        """The last character of a token that is not white space, or its last one, by which it is labelled.

        Of a token without text, and of one whose text is not whole, where that ends.
        """
        start, end = span
        if start == end:
            return -1
        if end > len(self.late.text):
            return end
        return start + len(self.late.text[start:end].rstrip() or self.late.text[start:end]) - 1

    def _codes_of(self, span: tuple[int, int], sections: Sequence[Section]) -> list[int]:
        """The code of one token for each label."""
        if span[0] == span[1]:
            return [UNKNOWN] * len(self.labels)
        place, found = self._last_letter(span), [OUTSIDE] * len(self.labels)
        for label, start, end in sections:
            if start <= place < end and label in self.labels:
                same = self.inside.get(label) == start
                found[self.labels.index(label)] = INSIDE if same else ONSET
                self.inside[label] = start
        return found
