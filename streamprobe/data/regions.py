"""The parts of what a model writes: what it thinks, and what it answers."""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Markers(NamedTuple):
    """Regular expressions of where thinking begins and where it ends; both belong to no region."""

    begin: str
    end: str


KNOWN = (
    Markers(r"<think(?:ing)?>", r"</think(?:ing)?>"),
    Markers(r"<reasoning>", r"</reasoning>"),
    Markers(
        r"<\|channel\|>analysis<\|message\|>",
        r"(?:<\|end\|>)?(?:<\|start\|>assistant)?<\|channel\|>final<\|message\|>|<\|end\|>",
    ),
)


def own_markers(texts: Sequence[str] | None) -> Sequence[Markers]:
    """The markers that a user names by two texts, or else those that are known."""
    if not texts:
        return KNOWN
    begin, end = texts
    return [Markers(re.escape(begin), re.escape(end))]


def thinking(text: str, markers: Sequence[Markers] = KNOWN) -> tuple[np.ndarray, np.ndarray]:
    """For each character of a text whether it is thought, and whether it is answered: bool [len(text)] each.

    The text begins with what stands in front of the model's own words, so that a prompt may open the thinking.  Where
    thinking ends without having begun, all before is thought; where it never ends, all behind its beginning is.  A
    text without markers is all answer.
    """
    begins = "|".join(f"(?:{marker.begin})" for marker in markers)
    ends = "|".join(f"(?:{marker.end})" for marker in markers)
    thought, answered = np.zeros((2, len(text)), dtype=bool)
    start, inside = 0, _ends_first(text, begins, ends)
    for found in re.finditer(f"(?P<begin>{begins})|(?P<end>{ends})", text):
        (thought if inside else answered)[start : found.start()] = True
        start, inside = found.end(), found["begin"] is not None
    (thought if inside else answered)[start:] = True
    return thought, answered


def _ends_first(text: str, begins: str, ends: str) -> bool:
    """Whether thinking ends before it begins, so that the text begins inside of it."""
    begin, end = re.search(begins, text), re.search(ends, text)
    return end is not None and (begin is None or end.start() < begin.start())
