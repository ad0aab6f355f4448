"""An edited copy laid beside its original: against plain references, and whatever is edited."""

import random
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamprobe.data import alignment
from streamprobe.data.alignment import fold, match_runs, slide_both, slide_gaps

items = st.lists(st.integers(0, 3), max_size=14)


def common(a: list[int], b: list[int]) -> int:
    """The length of a longest common subsequence, by the textbook."""
    row = [0] * (len(b) + 1)
    for x in a:
        before = row
        row = [0]
        for j, y in enumerate(b):
            row.append(before[j] + 1 if x == y else max(row[j], before[j + 1]))
    return row[-1]


def check(partner: list[int], a: list[int], b: list[int]) -> None:
    """Partners are equal items, and rise."""
    pairs = [(i, j) for i, j in enumerate(partner) if j >= 0]
    assert len(partner) == len(a) and all(a[i] == b[j] for i, j in pairs)
    assert all(j < m for (_, j), (_, m) in zip(pairs, pairs[1:], strict=False))


@given(items, items)
def test_single_items_are_matched_as_a_longest_common_subsequence(a, b):
    partner = match_runs(a, b, [1])
    check(partner, a, b)
    assert sum(j >= 0 for j in partner) == common(a, b)


@given(items, items)
def test_longer_runs_come_first(a, b):
    partner = match_runs(a, b, (3, 1))
    check(partner, a, b)
    assert match_runs(a, a, (3, 1)) == list(range(len(a)))
    assert match_runs(a, [*a, *b], (3, 1)) == list(range(len(a)))  # a lost tail


def test_a_stray_item_is_matched_with_its_neighbours():
    """`9` is at the start and at the end of what the copy lacks; runs of three say which one it is."""
    original = [1, 2, 3, 4, 9, 5, 5, 5, 5, 6, 9, 7, 8, 1]
    copy = [1, 2, 3, 4, 0, 6, 9, 7, 8, 0]
    assert match_runs(copy, original, (3, 1))[6] == 10


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("loop", [False, True])
def test_texts_that_are_cut_to_fit_in_memory_are_matched_all_the_same(monkeypatch, seed, loop):
    rng = random.Random(seed)
    original = [rng.randrange(20) for _ in range(30)] * 10 if loop else [rng.randrange(1000) for _ in range(300)]
    copy = [item if rng.random() < 0.97 else -1 for item in original]
    whole = match_runs(copy, original, (4, 1))
    monkeypatch.setattr(alignment, "MAX_CELLS", 2000)
    cut = match_runs(copy, original, (4, 1))
    check(cut, copy, original)
    assert cut == whole == [i if item >= 0 else -1 for i, item in enumerate(copy)]


@given(items, items, st.data())
def test_slid_gaps_lose_no_match(a, b, data):
    partner = match_runs(a, b, (2, 1))
    border = data.draw(st.lists(st.booleans(), min_size=len(a) + 1, max_size=len(a) + 1))
    slid = list(partner)
    slide_gaps(slid, a, b, border)
    check(slid, a, b)
    assert [j >= 0 for j in slid] == [j >= 0 for j in partner]
    both = slide_both(partner, a, b, border)
    check(both, a, b)
    assert sum(j >= 0 for j in both) == sum(j >= 0 for j in partner)


def test_what_the_copy_has_more_slides_to_its_borders():
    """The inserted section begins as the next one, or ends as the one before."""
    copy, original = [1, 2, 3, 7, 5, 3, 6], [1, 2, 3, 6]
    for partner in ([0, 1, 2, -1, -1, -1, 3], [0, 1, -1, -1, -1, 2, 3]):
        for place, wanted in ((2, [0, 1, -1, -1, -1, 2, 3]), (3, [0, 1, 2, -1, -1, -1, 3])):
            border = [i in (0, place, place + 3, 7) for i in range(8)]
            assert slide_both(partner, copy, original, border) == wanted
        assert slide_both(partner, copy, original, [i in (0, 1, 7) for i in range(8)]) == partner  # negative control


def test_a_gap_slides_to_the_border():
    """What is missing begins as what follows it, or ends as what is before it."""
    original, copy = [1, 2, 3, 7, 5, 3, 6], [1, 2, 3, 6]
    for partner in ([0, 1, 2, 6], [0, 1, 5, 6]):
        for place, wanted in ((2, [0, 1, 5, 6]), (3, [0, 1, 2, 6])):
            slid = list(partner)
            slide_gaps(slid, copy, original, [i in (0, place, 4) for i in range(5)])
            assert slid == wanted
    slid = [0, 1, 2, 6]
    slide_gaps(slid, copy, original, [True, True, False, False, True])  # negative control: no border in reach
    assert slid == [0, 1, 2, 6]


TYPED = {
    "“a” ‘b’": "\"a\" 'b'",
    "a—b–c‐d−e": "a-b-c-d-e",
    "a…": "a...",
    "a\u00a0b\u2009c": "a b c",
    "ﬁ": "fi",
    "x²": "x2",
    "Ａ！": "A!",
    "plain": "plain",
}


@pytest.mark.parametrize("text", TYPED)
def test_typography_is_made_plain(text):
    assert fold(text).text == TYPED[text]


@given(st.text("aé漢… “”ﬁ\u00a0\u0301각", max_size=12))
def test_every_plain_character_knows_where_it_came_from(text):
    plain, origin = fold(text)
    assert len(origin) == len(plain) + 1 and origin[-1] == len(text)
    assert (origin[1:] >= origin[:-1]).all() and set(origin[:-1].tolist()) == set(range(len(text)))
    for i, c in enumerate(text):
        assert "".join(p for p, at in zip(plain, origin, strict=False) if at == i) == fold(c).text


@given(st.text("aéèŝ漢…각ü", max_size=12))
def test_composed_and_decomposed_text_are_the_same(text):
    assert fold(unicodedata.normalize("NFD", text)).text == fold(unicodedata.normalize("NFC", text)).text
