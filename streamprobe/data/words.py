"""The words of a text, and the tags among them, as they are matched with those of another text."""

import re
from collections import Counter
from itertools import chain, compress
from typing import NamedTuple

import numpy as np

INVISIBLE = r"\x00-\x1f\x7f-\x9f\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff"  # in no label
DOUBLE, SINGLE = rf'"[^"\[\]{INVISIBLE}]{{1,80}}"', rf"'[^'\[\]{INVISIBLE}]{{1,80}}'"
QUOTED = rf"(?:{DOUBLE}|{SINGLE})"
TAG = rf"\[\s*{QUOTED}(?:\s*,\s*{QUOTED})*\s*\]"
NAME = r"""(?:\\?[/"'`*]){0,2}(?=[\d ._:-]*[^\W\d_])\w[\w .:-]{0,60}(?:\\?["'`*]){0,2}"""  # holds a letter
FORMS = (
    rf"""\[{NAME}\]|【{NAME}】|</?[^\W\d_][^<>{INVISIBLE}]{{0,80}}>|(?<![\\\w^{{}}])\{{{NAME}\}}|\({QUOTED}\)"""
    rf"""|\[{QUOTED}(?!\s*[,\]])|{QUOTED}\]|\["[^"\[\]\n]{{1,80}}"\]"""
)
BEGIN = r"""(?=[\[【<{("'])"""  # that a mark begins so is looked at first, since nearly no place of a text does
MARK = re.compile(rf"{BEGIN}(?:(?P<tag>{TAG})|{FORMS})")  # of folded text: a tag, or what may have been meant as one
WORD = re.compile(rf"(?P<tag>{TAG})|\w+|[^\w\s]")


class Words(NamedTuple):
    """The words of a folded text in its order, each of them characters start .. end that are matched as one."""

    keys: list[str]  # equal words have equal ones
    start: np.ndarray  # [words] int64
    end: np.ndarray  # [words] int64
    tag: np.ndarray  # [words] bool

    def choose(self, which: np.ndarray) -> "Words":
        """Those of the words that are True in `which`, bool [words]."""
        return Words(list(compress(self.keys, which.tolist())), self.start[which], self.end[which], self.tag[which])

    def tags(self) -> Counter[str]:
        """How often each tag is among them."""
        return Counter(self.keys[i] for i in np.flatnonzero(self.tag))

    def letters(self, first: int, stop: int) -> np.ndarray:
        """The characters, int64, of the words first .. stop that are no tags."""
        plain = first + np.flatnonzero(~self.tag[first:stop])
        return in_stretches(self.start[plain], self.end[plain])


def in_stretches(start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """The numbers that are in one of the stretches start .. end, in their order."""
    size = end - start
    return np.repeat(end - size.cumsum(), size) + np.arange(size.sum())


def split_words(text: str) -> Words:
    """The words, signs and tags of a folded text; in a tag neither the kind of quotes nor white space counts."""
    spans = [word.span() for word in WORD.finditer(text)]
    keys = [text[start:end] for start, end in spans]
    tag = np.array([len(key) > 1 and key[0] == "[" for key in keys], dtype=bool)
    for i in np.flatnonzero(tag):
        keys[i] = "".join(keys[i].split()).replace("'", '"')
    start, end = np.fromiter(chain.from_iterable(spans), np.int64, 2 * len(spans)).reshape(-1, 2).T
    return Words(keys, start, end, tag)
