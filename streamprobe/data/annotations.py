"""An annotator's `["label"]...["end-section"]` sections, found again in the text that the model wrote.

The annotated text is a copy: whoever made it may have edited sections, dropped text between them, lost the tail or
written it in other typography.  The labels belong to the original, so the two texts are aligned and each section is
carried over.  What looks like a tag and stands in the original at that place is the model's own text.
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from difflib import get_close_matches
from itertools import compress, groupby
from operator import attrgetter
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from streamprobe.data.alignment import fold, match_runs, slide_both
from streamprobe.data.words import MARK, QUOTED, Words, in_stretches, split_words
from streamprobe.errors import InputError

END = "end-section"
NAMES: Mapping[str, str] = MappingProxyType({})  # as they are
RUNS, LETTERS = (4, 1), (4, 2)  # words, and letters between them, in a row that are matched, the longest first
MAX_LETTERS = 100_000_000  # letters of the copy times the original's, above which only words are matched
FAR = 100  # characters: a section is cut at no shorter gap


class Section(NamedTuple):
    """Characters start .. end (end excluded) carry this label."""

    label: str
    start: int
    end: int


class Annotation(NamedTuple):
    """Sections in the order of the text, and what had to be done to get them; one of several labels counts for each."""

    sections: list[Section]
    edited: int = 0  # sections whose words differ from the original's
    lost: int = 0  # sections that could not be found
    unbalanced: int = 0  # tags without their partner
    names: Sequence[str] = ()  # what the tags name, before `label_names`
    strange: Sequence[str] = ()  # what looks like a tag of a form that is not understood
    missing: Sequence[str] = ()  # text that was marked and is not in the text

    @property
    def asked(self) -> int:
        """Sections that the annotated text had."""
        return len(self.sections) + self.lost


def merge_overlaps(sections: Iterable[Section]) -> list[Section]:
    """Sections in the order of the text, those of one label that overlap made one."""
    merged: list[Section] = []
    last: dict[str, int] = {}  # label -> where its last section is in `merged`
    for section in sorted(sections, key=lambda each: (each.start, each.end)):
        at = last.get(section.label)
        if at is not None and section.start < merged[at].end:
            merged[at] = merged[at]._replace(end=max(merged[at].end, section.end))
        else:
            last[section.label] = len(merged)
            merged.append(section)
    return merged


class Mark(NamedTuple):
    """Characters start .. end that are a tag, or look like one."""

    start: int
    end: int
    names: tuple[str, ...]  # the labels in a tag; none where its form is not understood


def find_marks(text: str) -> list[Mark]:
    """Everything in a text that is a tag or looks like one."""
    folded, origin = fold(text)
    marks = []
    for found in re.finditer(MARK, folded):
        inside = [q.span() for q in re.finditer(QUOTED, found[0])] if found["tag"] else []
        names = [text[origin[found.start() + i + 1] : origin[found.start() + j - 1]] for i, j in inside]
        marks.append(Mark(int(origin[found.start()]), int(origin[found.end()]), tuple(names)))
    return marks


def read_tags(text: str, tags: Sequence[Mark], names: Mapping[str, str] = NAMES) -> tuple[list[Section], int]:
    """The sections of a text, in which the tags still are, and how many tags lack their partner.

    Tags that follow one another with at most white space between open one section of several labels, which as many ends
    may close.  A section that is opened before the last one was closed closes it; one that is never closed ends with
    the text; an `end-section` that closes nothing is passed over.  Sections without text are left out.
    """
    sections: list[Section] = []
    labels: list[str] = []
    unbalanced = spare = start = cursor = 0
    blank = True  # since the last tag of a known form

    def close(end: int) -> None:
        sections.extend(Section(label, start, end) for label in labels if not blank)
        labels.clear()

    for tag in tags:
        blank = blank and not text[cursor : tag.start].strip()
        cursor = tag.end
        written = tag.names or (text[tag.start : tag.end],)
        for label in (names.get(name, name) for name in written if tag.names or name in names):
            if label == END:
                if labels:
                    spare = len(labels) - 1
                    close(tag.start)
                elif spare and blank:
                    spare -= 1
                else:
                    unbalanced += 1
            else:
                if labels and (not blank or label in labels):
                    unbalanced += 1
                    close(tag.start)
                labels.append(label)
            start, blank = tag.end, True
    blank = blank and not text[cursor:].strip()
    unbalanced += bool(labels)
    close(len(text))
    return sections, unbalanced


def visible(text: str, tags: Sequence[Mark]) -> np.ndarray:
    """For each character, whether it is in no tag: bool [len(text)]."""
    shown = np.ones(len(text), dtype=bool)
    for tag in tags:
        shown[tag.start : tag.end] = False
    return shown


def align(copy: str, original: str) -> tuple[np.ndarray, np.ndarray]:
    """For each character of `copy`, the first and the last one of `original` that it is, or -1: int64 [len(copy)] each.

    Words are matched first, then the letters of what lies between matched words.  White space is not matched, nor is
    what looks like a tag and is nowhere in the original; a tag that the copy has more often than the original is only
    if the word before or behind it is, too.
    """
    a, b = fold(copy), fold(original)
    theirs = split_words(b.text)
    mine, border = _words_without_tags(a.text, b.text, theirs.tags())
    ids: dict[str, int] = {}
    x, y = ([ids.setdefault(key, len(ids)) for key in words.keys] for words in (mine, theirs))
    partner = np.array([-1, *slide_both(match_runs(x, y, RUNS), x, y, border), len(y)])  # the texts' ends are matched
    before, own, behind = partner[:-2], partner[1:-1], partner[2:]
    extra = mine.tags() - theirs.tags()
    alone = np.array([key in extra for key in mine.keys], dtype=bool) & (before != own - 1) & (behind != own + 1)
    matched = np.flatnonzero(np.append((own >= 0) & ~alone, True))
    places = _place_letters(a.text, b.text, mine, theirs, matched=matched, partner=partner[1 + matched])
    found = np.flatnonzero(places >= 0)
    first, last = np.full((2, len(copy)), -1, dtype=np.int64)
    first[a.origin[found[::-1]]] = b.origin[places[found[::-1]]]
    last[a.origin[found]] = b.origin[places[found]]
    return first, last


def _words_without_tags(copy: str, original: str, kept: Collection[str]) -> tuple[Words, list[bool]]:
    """The words of a copy without what is a tag, or looks like one, and is nowhere in the original.

    `kept` are the keys of the tags in the original.  With them comes for each word, and for the end of the text,
    whether a tag was taken out in front of it, or it is an end of the text: bool [words + 1].
    """
    words, gone = split_words(copy), np.zeros(len(copy), dtype=bool)
    forms = [mark for mark in MARK.finditer(copy) if not mark["tag"]]
    strange = {form for form in {mark[0] for mark in forms} if form not in original}
    for mark in forms:
        if mark[0] in strange:
            gone[mark.start() : mark.end()] = True
    out = gone[words.start]
    for i in np.flatnonzero(words.tag):
        out[i] |= words.keys[i] not in kept
    border = np.diff(np.flatnonzero(~out), prepend=-1, append=len(out)) > 1
    border[[0, -1]] = True
    return words.choose(~out), border.tolist()


def _place_letters(
    copy: str, original: str, mine: Words, theirs: Words, *, matched: np.ndarray, partner: np.ndarray
) -> np.ndarray:
    """For each letter of a folded copy the one of the original that it is, or -1: int64 [len(copy)].

    `matched` are the numbers of its words that are matched, and `partner` those of their partners; behind the last of
    them comes the number of all words of each text.
    """
    places = np.full(len(copy), -1, dtype=np.int64)
    start, other = np.append(0, matched[:-1] + 1), np.append(0, partner[:-1] + 1)  # of the words in front of each
    for gap in np.flatnonzero((start < matched) & (other < partner)):
        a, b = mine.letters(start[gap], matched[gap]), theirs.letters(other[gap], partner[gap])
        if len(a) * len(b) <= MAX_LETTERS:
            found = np.array(match_runs([ord(copy[i]) for i in a], [ord(original[j]) for j in b], LETTERS), dtype=int)
            places[a[found >= 0]] = b[found[found >= 0]]
    i, j = matched[:-1], partner[:-1]
    equal = mine.end[i] - mine.start[i] == theirs.end[j] - theirs.start[j]
    own = in_stretches(mine.start[i[equal]], mine.end[i[equal]])
    places[own] = in_stretches(theirs.start[j[equal]], theirs.end[j[equal]])
    for k in np.flatnonzero(~equal):  # tags with other white space: their first and last letters
        places[mine.start[i[k]] : mine.end[i[k]]] = theirs.start[j[k]]
        places[mine.end[i[k]] - 1] = theirs.end[j[k]] - 1
    return places


def annotate(annotated: str, original: str, names: Mapping[str, str] = NAMES) -> Annotation:
    """Carries the sections of `annotated` over to `original`; `names` says which labels are called otherwise.

    A section becomes the stretch of the original from the first to the last of its characters that was found, if
    at least half of its characters that are not white space were found; otherwise it is lost.  White space at its ends
    belongs to it as far as the annotator put it inside the tags.
    """
    first, last = align(annotated, original)
    tags = [mark for mark in find_marks(annotated) if first[mark.start] < 0]
    sections, unbalanced = read_tags(annotated, tags, names)
    shown = visible(annotated, tags)
    found, edited, lost, floor = [], 0, 0, 0
    for (start, end), group in groupby(sections, attrgetter("start", "end")):
        labels = [section.label for section in group]
        words = "".join(compress(annotated[start:end], shown[start:end].tolist()))
        hits = _without_strays(start + np.flatnonzero(first[start:end] >= 0), first, end - start)
        if 2 * len(hits) < len("".join(words.split())) or last[hits[-1]] < floor:
            lost += len(labels)
            continue
        i, j = max(floor, int(first[hits[0]])), int(last[hits[-1]]) + 1
        edited += 0 if _same_words(original[i:j], words) else len(labels)
        for _ in range(len(words) - len(words.lstrip())):
            i -= i > floor and original[i - 1].isspace()
        for _ in range(len(words) - len(words.rstrip())):
            j += j < len(original) and original[j].isspace()
        found += [Section(label, i, j) for label in labels]
        floor = j
    written, strange = _names_and_forms(annotated, tags, names)
    return Annotation(found, edited=edited, lost=lost, unbalanced=unbalanced, names=written, strange=strange)


def _same_words(a: str, b: str) -> bool:
    """Whether two texts have the same words, apart from typography."""
    return a.split() == b.split() or fold(a).text.split() == fold(b).text.split()


def _without_strays(hits: np.ndarray, first: np.ndarray, size: int) -> np.ndarray:
    """The characters of a section that were found, less those behind a gap in the original longer than all of it."""
    far = max(size, FAR)
    while len(hits) > 1 and first[hits[-1]] - first[hits[0]] > far and (gaps := np.diff(first[hits])).max() > far:
        cut = int(gaps.argmax()) + 1
        hits = max(hits[:cut], hits[cut:], key=len)
    return hits


def plain_name(name: str) -> str:
    """What a label is called apart from case, a number in front and the signs around its words."""
    letters = re.sub(r"[\W_]+", "", fold(name).text.casefold())
    return re.sub(r"^\d+", "", letters) or letters or name


def check_names(names: Mapping[str, str], known: Collection[str]) -> None:
    """Raises InputError for one of `label_names` that no tag names."""
    for name in names:
        if name not in known:
            near = get_close_matches(name, known, n=1, cutoff=0)
            raise InputError(
                f"label_names {name}={names[name]}, but no tag names {name!r}",
                f"a name that the data have, the nearest is {near[0]!r}" if near else "a name that the data have",
                "correct or drop it in --label_names",
            )


def _names_and_forms(text: str, tags: Sequence[Mark], names: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """What the tags name, before `names`, and what looks like a tag of a form that is not understood."""
    forms = [text[tag.start : tag.end] for tag in tags if not tag.names]
    named = [name for tag in tags for name in tag.names if name != END]
    return named + [form for form in forms if form in names], [form for form in forms if form not in names]


def rejoin(annotated: str, response: str, names: Mapping[str, str] = NAMES) -> tuple[str, Annotation]:
    """The sections alone, without the white space around them, joined by single spaces: a text that nobody wrote.

    Each space belongs to the section behind it.  Tags that stand in `response` are the model's own text.
    """
    first, _ = align(annotated, response)
    tags = [mark for mark in find_marks(annotated) if first[mark.start] < 0]
    sections, unbalanced = read_tags(annotated, tags, names)
    shown = visible(annotated, tags)
    text, found = "", []
    for (start, end), group in groupby(sections, attrgetter("start", "end")):
        piece = " " * bool(text) + "".join(compress(annotated[start:end], shown[start:end].tolist())).strip()
        found += [Section(section.label, len(text), len(text) + len(piece)) for section in group]
        text += piece
    written, strange = _names_and_forms(annotated, tags, names)
    return text, Annotation(found, edited=0, lost=0, unbalanced=unbalanced, names=written, strange=strange)
