"""An annotator's `["label"]...["end-section"]` sections, found again in the text that the model wrote.

The annotated text is a copy: whoever made it may have edited sections, dropped text between them, lost the tail or
written it in other typography.  The labels belong to the original, so the two texts are aligned and each section is
carried over.  What looks like a tag and stands in the original at that place is the model's own text.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from difflib import get_close_matches
from itertools import compress, groupby
from operator import attrgetter
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from streamprobe.data.alignment import fold, match_runs, slide_both
from streamprobe.errors import InputError

INVISIBLE = r"\x00-\x1f\x7f-\x9f\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff"  # in no label
DOUBLE, SINGLE = rf'"[^"\[\]{INVISIBLE}]{{1,80}}"', rf"'[^'\[\]{INVISIBLE}]{{1,80}}'"
QUOTED = rf"(?:{DOUBLE}|{SINGLE})"
TAG = rf"\[\s*{QUOTED}(?:\s*,\s*{QUOTED})*\s*\]"
NAME = r"""(?:\\?[/"'`*]){0,2}(?=[\d ._:-]*[^\W\d_])\w[\w .:-]{0,60}(?:\\?["'`*]){0,2}"""  # holds a letter
FORMS = (
    rf"""\[{NAME}\]|【{NAME}】|</?[^\W\d_][^<>{INVISIBLE}]{{0,80}}>|(?<![\\\w^{{}}])\{{{NAME}\}}|\({QUOTED}\)"""
    rf"""|\[{QUOTED}(?!\s*[,\]])|{QUOTED}\]|\["[^"\[\]\n]{{1,80}}"\]"""
)
MARK = re.compile(rf"(?P<tag>{TAG})|{FORMS}")  # of folded text: a tag, or what may have been meant as one
WORD = re.compile(rf"(?P<tag>{TAG})|\w+|[^\w\s]")
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


class Word(NamedTuple):
    """Characters start .. end of a folded text that are matched as one."""

    key: str  # equal words have equal ones
    start: int
    end: int
    tag: bool


def split_words(text: str) -> list[Word]:
    """The words, signs and tags of a folded text; in a tag neither the kind of quotes nor white space counts."""
    words = []
    for found in WORD.finditer(text):
        tag = found["tag"] is not None
        words.append(Word("".join(found[0].split()).replace("'", '"') if tag else found[0], *found.span(), tag))
    return words


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
    mine, border = _words_without_tags(a.text, b.text, {word.key for word in theirs if word.tag})
    extra = Counter(word.key for word in mine if word.tag) - Counter(word.key for word in theirs if word.tag)
    ids: dict[str, int] = {}
    x, y = ([ids.setdefault(word.key, len(ids)) for word in words] for words in (mine, theirs))
    partner = [-1, *slide_both(match_runs(x, y, RUNS), x, y, border), len(y)]  # the texts' ends are matched
    where = [-1] * len(a.text)
    start = other = 0  # the first words that are not matched yet
    for i, j in enumerate(partner[1:]):
        if j < 0 or (i < len(mine) and mine[i].key in extra and partner[i] != j - 1 and partner[i + 2] != j + 1):
            continue
        if start < i and other < j:
            _match_letters(where, a.text, b.text, mine=mine[start:i], theirs=theirs[other:j])
        if i < len(mine):
            where[mine[i].start : mine[i].end] = _spread(theirs[j], mine[i].end - mine[i].start)
        start, other = i + 1, j + 1
    places = np.array(where, dtype=np.int64)
    found = np.flatnonzero(places >= 0)
    first, last = np.full((2, len(copy)), -1, dtype=np.int64)
    first[a.origin[found[::-1]]] = b.origin[places[found[::-1]]]
    last[a.origin[found]] = b.origin[places[found]]
    return first, last


def _words_without_tags(copy: str, original: str, kept: Collection[str]) -> tuple[list[Word], list[bool]]:
    """The words of a copy without what is a tag, or looks like one, and is nowhere in the original.

    `kept` are the keys of the tags in the original.  With them comes for each word, and for the end of the text,
    whether a tag was taken out in front of it, or it is an end of the text: bool [words + 1].
    """
    forms = [mark for mark in MARK.finditer(copy) if not mark["tag"]]
    strange = {form for form in {mark[0] for mark in forms} if form not in original}
    gone = {i for mark in forms if mark[0] in strange for i in range(*mark.span())}
    words, border = [], [True]
    for word in split_words(copy):
        if word.start in gone or (word.tag and word.key not in kept):
            border[-1] = True
        else:
            words.append(word)
            border.append(False)
    border[-1] = True
    return words, border


def _spread(word: Word, size: int) -> Sequence[int]:
    """The characters of a word as those of one of `size` characters: as they are, or the first and the last."""
    places = range(word.start, word.end)
    return places if len(places) == size else [word.start] * (size - 1) + [word.end - 1]


def _match_letters(where: list[int], copy: str, original: str, *, mine: Sequence[Word], theirs: Sequence[Word]) -> None:
    """Fills `where` for the letters of some words of a copy that are somewhere among those of other words."""
    a, b = ([i for word in words if not word.tag for i in range(word.start, word.end)] for words in (mine, theirs))
    if len(a) * len(b) > MAX_LETTERS:
        return
    partner = match_runs([ord(copy[i]) for i in a], [ord(original[j]) for j in b], LETTERS)
    for i, j in zip(a, partner, strict=True):
        if j >= 0:
            where[i] = b[j]


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
        words = "".join(compress(annotated[start:end], shown[start:end]))
        hits = _without_strays(start + np.flatnonzero(first[start:end] >= 0), first, end - start)
        if 2 * len(hits) < len("".join(words.split())) or last[hits[-1]] < floor:
            lost += len(labels)
            continue
        i, j = max(floor, int(first[hits[0]])), int(last[hits[-1]]) + 1
        if fold(original[i:j]).text.split() != fold(words).text.split():
            edited += len(labels)
        for _ in range(len(words) - len(words.lstrip())):
            i -= i > floor and original[i - 1].isspace()
        for _ in range(len(words) - len(words.rstrip())):
            j += j < len(original) and original[j].isspace()
        found += [Section(label, i, j) for label in labels]
        floor = j
    written, strange = _names_and_forms(annotated, tags, names)
    return Annotation(found, edited=edited, lost=lost, unbalanced=unbalanced, names=written, strange=strange)


def _without_strays(hits: np.ndarray, first: np.ndarray, size: int) -> np.ndarray:
    """The characters of a section that were found, less those behind a gap in the original longer than all of it."""
    while len(hits) > 1 and (gaps := np.diff(first[hits])).max() > max(size, FAR):
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
        piece = " " * bool(text) + "".join(compress(annotated[start:end], shown[start:end])).strip()
        found += [Section(section.label, len(text), len(text) + len(piece)) for section in group]
        text += piece
    written, strange = _names_and_forms(annotated, tags, names)
    return text, Annotation(found, edited=0, lost=0, unbalanced=unbalanced, names=written, strange=strange)
