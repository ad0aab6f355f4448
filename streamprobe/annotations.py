"""An annotator's `["label"]...["end-section"]` sections, found again in the text that the model wrote.

The annotated text is a copy: whoever made it may have edited sections, dropped text between them or lost the tail.
The labels belong to the original, so the two texts are aligned and each section is carried over.
"""

import re
from difflib import SequenceMatcher
from typing import NamedTuple

import numpy as np

TAG = re.compile(r'\["([^"\[\]\x00-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]{1,80})"\]')  # nothing invisible
END = "end-section"
WORD = re.compile(r"\w+|[^\w\s]")
MAX_GAP = 1_000_000  # characters squared: a larger edited stretch is not aligned letter by letter


class Section(NamedTuple):
    """Characters start .. end (end excluded) carry this label."""

    label: str
    start: int
    end: int


class Annotation(NamedTuple):
    """Sections in the order of the text, and what had to be done to get them."""

    sections: list[Section]
    edited: int  # sections whose words differ from the original's
    lost: int  # sections that could not be found
    unbalanced: int  # tags without their partner


def parse_annotations(annotated: str) -> tuple[str, list[Section], int]:
    """The text without its tags, its sections (empty ones left out), and how many tags lack their partner.

    A section that is opened before the last one was closed closes it; one that is never closed ends with the text; an
    `end-section` that closes nothing is passed over.
    """
    text, sections, unbalanced = "", [], 0
    label, start, cursor = None, 0, 0
    tags: list[re.Match[str] | None] = [*TAG.finditer(annotated), None]
    for tag in tags:
        text += annotated[cursor : tag.start() if tag else None]
        if label is not None and text[start:].strip():
            sections.append(Section(label, start, len(text)))
        closes = tag is not None and tag[1] == END
        unbalanced += (label is not None) != closes
        label = None if tag is None or closes else tag[1]
        start, cursor = len(text), tag.end() if tag else 0
    return text, sections, unbalanced


def align(copy: str, original: str) -> np.ndarray:
    """For each character of `copy`, its index in `original` or -1: int64 [len(copy)], rising where not -1.

    Words are aligned first, then the letters of the stretches between matching words (Ratcliff & Obershelp, as in
    `difflib`).  White space is not aligned.
    """
    where = np.full(len(copy), -1, dtype=np.int64)
    a, b = list(WORD.finditer(copy)), list(WORD.finditer(original))
    words = SequenceMatcher(None, [m[0] for m in a], [m[0] for m in b], autojunk=False)
    for kind, a0, a1, b0, b1 in words.get_opcodes():
        if kind == "equal":
            for mine, other in zip(a[a0:a1], b[b0:b1], strict=True):
                where[mine.start() : mine.end()] = np.arange(other.start(), other.end())
        elif kind == "replace":
            i, j, k, n = a[a0].start(), a[a1 - 1].end(), b[b0].start(), b[b1 - 1].end()
            if (j - i) * (n - k) > MAX_GAP:
                continue
            for block in SequenceMatcher(None, copy[i:j], original[k:n], autojunk=False).get_matching_blocks():
                where[i + block.a : i + block.a + block.size] = np.arange(k + block.b, k + block.b + block.size)
    where[[c.isspace() for c in copy]] = -1
    return where


def annotate(annotated: str, original: str) -> Annotation:
    """Carries the sections of `annotated` over to `original`.

    A section becomes the stretch of the original from the first to the last of its characters that was found, if
    at least half of its characters that are not white space were found; otherwise it is lost.  White space at its ends
    belongs to it as far as the annotator put it inside the tags.
    """
    copy, sections, unbalanced = parse_annotations(annotated)
    where = align(copy, original)
    found, edited, lost, floor = [], 0, 0, 0
    for label, start, end in sections:
        words = copy[start:end]
        ink = len("".join(words.split()))
        hits = where[start:end][where[start:end] >= 0]
        if 2 * len(hits) < ink:
            lost += 1
            continue
        first, last = int(hits[0]), int(hits[-1]) + 1
        edited += original[first:last].split() != words.split()
        for _ in range(len(words) - len(words.lstrip())):
            first -= first > floor and original[first - 1].isspace()
        for _ in range(len(words) - len(words.rstrip())):
            last += last < len(original) and original[last].isspace()
        found.append(Section(label, first, last))
        floor = last
    return Annotation(found, edited, lost, unbalanced)


def rejoin(annotated: str) -> tuple[str, Annotation]:
    """The sections alone, without the white space around them, joined by single spaces: a text that nobody wrote.

    Each space belongs to the section behind it.
    """
    copy, sections, unbalanced = parse_annotations(annotated)
    text, found = "", []
    for label, start, end in sections:
        piece = " " * bool(text) + copy[start:end].strip()
        found.append(Section(label, len(text), len(text) + len(piece)))
        text += piece
    return text, Annotation(found, 0, 0, unbalanced)
