"""An edited copy of a text laid beside it: which of its words is which, also in long texts and in looping ones."""

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from rapidfuzz.distance import LCSseq

PLAIN = str.maketrans(dict.fromkeys("“”„‟«»", '"') | dict.fromkeys("‘’‚‛‹›", "'") | dict.fromkeys("‐‑‒–—―−", "-"))
NOT_ASCII = re.compile(r"[^\x00-\x7f]")
MAX_CELLS = 2_000_000_000  # items of the one text times items of the other, an eighth of a byte each, at once
ANCHOR = 16  # items of a run at which longer texts are cut in two


class Folded(NamedTuple):
    """A text with typography made plain, and where each of its characters came from."""

    text: str
    origin: np.ndarray  # [len(text) + 1] int64: indices of the text as it was, and its length


def fold(text: str) -> Folded:
    """Typography made plain as a keyboard does: Unicode's compatibility decomposition, straight quotes, hyphens."""
    if text.isascii():
        return Folded(text, np.arange(len(text) + 1))
    sizes = np.ones(len(text) + 1, dtype=np.int64)

    def fold_letter(found: re.Match[str]) -> str:
        letters = unicodedata.normalize("NFKD", found[0]).translate(PLAIN)
        sizes[found.start()] = len(letters)
        return letters

    folded = NOT_ASCII.sub(fold_letter, text)
    return Folded(folded, np.repeat(np.arange(len(text) + 1), sizes))


def match_runs(a: Sequence[int], b: Sequence[int], sizes: Sequence[int]) -> list[int]:
    """For each item of `a` its partner in `b` or -1, rising where not -1.

    What both begin and end with is matched, then the longest common subsequence of their runs of `sizes[0]` items, then
    that of runs of `sizes[1]` in what is left between, and so on: a stray item is matched last, among its neighbours.
    """
    partner = [-1] * len(a)
    left = [(0, len(a), 0, len(b), 0)]
    while left:
        i, n, j, m, level = left.pop()
        while i < n and j < m and a[i] == b[j]:
            partner[i] = j
            i, j = i + 1, j + 1
        while i < n and j < m and a[n - 1] == b[m - 1]:
            n, m = n - 1, m - 1
            partner[n] = m
        if i == n or j == m or level == len(sizes):
            continue
        if (n - i) * (m - j) > MAX_CELLS:
            x, y = _halve(a[i:n], b[j:m])
            left += [(i, i + x, j, j + y, level), (i + x, n, j + y, m, level)]
            continue
        blocks = LCSseq.opcodes(*_runs(a[i:n], b[j:m], sizes[level])).as_matching_blocks()
        start, other = i, j
        for x, y in [(i + block.a + k, j + block.b + k) for block in blocks for k in range(block.size)]:
            partner[x] = y
            left.append((start, x, other, y, level + 1))
            start, other = x + 1, y + 1
        left.append((start, n, other, m, level + 1))
    return partner


def _halve(a: Sequence[int], b: Sequence[int]) -> tuple[int, int]:
    """Where to cut two long texts: at the run nearest the middle that each has once, or else in the middle."""
    x, y = _runs(a, b, ANCHOR)
    counts = Counter(x), Counter(y)
    once = [i for i, run in enumerate(x) if all(count[run] == 1 for count in counts)]
    middle = min(once, key=lambda i: abs(2 * i - len(a)), default=-1)
    return (middle, y.index(x[middle])) if middle > 0 else (len(a) // 2, len(b) // 2)


def _runs(a: Sequence[int], b: Sequence[int], size: int) -> list[list[int]]:
    """The runs of `size` items that begin at each item of each of two texts, as numbers: equal runs have equal ones."""
    ids: dict[tuple[int, ...], int] = {}
    return [[ids.setdefault(run, len(ids)) for run in zip(*(t[d:] for d in range(size)), strict=False)] for t in (a, b)]


def slide_both(partner: Sequence[int], a: Sequence[int], b: Sequence[int], border: Sequence[bool]) -> list[int]:
    """Partners of `a`, where what either text has more than the other is moved to a border of `a`: see `slide_gaps`."""
    if list(partner) == list(range(len(b))):
        return list(partner)
    slid = list(partner)
    slide_gaps(slid, a, b, border)
    back = invert(slid, len(b))
    ends = [i >= 0 and border[i + 1] for i in back]
    slide_gaps(back, b, a, [(i >= 0 and border[i]) or end for i, end in zip([*back, -1], [True, *ends], strict=True)])
    return invert(back, len(a))


def invert(partner: Sequence[int], size: int) -> list[int]:
    """For each of `size` items whose partner it is, or -1."""
    inverse = [-1] * size
    for i, j in enumerate(partner):
        if j >= 0:
            inverse[j] = i
    return inverse


def slide_gaps(partner: list[int], a: Sequence[int], b: Sequence[int], border: Sequence[bool]) -> None:
    """Moves what `b` has more than `a` to a border of `a`, where equal items leave a choice of where it is missing.

    border: whether one is before item i, [len(a) + 1].
    """
    where = [*partner, len(b), -1]  # the texts' ends are matched: that behind has the index -1
    matched = [-1, *(i for i, j in enumerate(partner) if j >= 0), len(a)]
    for i, n in zip(matched, matched[1:], strict=False):
        j, m = where[i], where[n]
        if m - j <= n - i or any(border[i + 1 : n + 1]):
            continue
        back, on = m - n, j - i  # from an item to its partner beside the later or the earlier one
        left, right = i, n
        while left >= 0 and where[left] == left + on and a[left] == b[left + back]:
            if border[left]:
                where[left : i + 1] = range(left + back, i + 1 + back)
                break
            left -= 1
        else:
            while right < len(a) and where[right] == right + back and a[right] == b[right + on]:
                if border[right + 1]:
                    where[n : right + 1] = range(n + on, right + 1 + on)
                    break
                right += 1
    partner[:] = where[: len(a)]
