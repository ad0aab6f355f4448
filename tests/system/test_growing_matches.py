"""Matches in a text that grows are those of the whole text, however it comes in pieces."""

import random
import re

import pytest
import regex

from streamprobe.errors import InputError
from streamprobe.system.growing_matches import GrowingMatches, watched
from streamprobe.system.patterns import compile_pattern

ALPHABET = "ab .\n。"
ATOMS = ["a", "b", r"\.", ".", "[ab]", "[^a]", r"\b", r"\B", r"\s", r"\w", r"\n", "$", "^", " ", "。"]


def make_pattern(rng: random.Random, depth: int = 0) -> str:
    """A random pattern over the alphabet: choices, repetitions of all kinds, groups, and looks ahead and back."""
    draw = rng.random()
    if depth > 3 or draw < 0.4:
        return rng.choice(ATOMS)
    one, other = make_pattern(rng, depth + 1), make_pattern(rng, depth + 1)
    if draw < 0.6:
        return one + other
    if draw < 0.7:
        return f"(?:{one}|{other})"
    if draw < 0.85:
        return f"(?:{one})" + rng.choice(["*", "+", "?", "*?", "+?", "??", "{1,2}", "{2}", "++", "?+"])
    if draw < 0.97:
        return rng.choice(["(?=", "(?!", "(?<=", "(?<!", "(?>"]) + one + ")"
    return rf"({one})\1"


def spans(pattern: regex.Pattern, text: str) -> list[tuple[int, int]]:
    return [match.span() for match in pattern.finditer(text)]


def is_right(growing: GrowingMatches, text: str, rng: random.Random) -> bool:
    """Whether what stands is right at every moment of a text that comes in pieces, and all at its end."""
    expected, place, right = spans(growing.pattern, text), 0, True
    while place < len(text):
        place = min(len(text), place + rng.randint(1, 3))
        growing.read(text[:place])
        right &= growing.spans == [span for span in expected if span[0] < growing.decided]
    growing.end(text)
    return right and growing.spans == expected


def test_random_patterns_have_the_matches_of_the_whole_text():
    rng = random.Random(7)
    tried = decided = letters = 0
    for _ in range(700):
        source = rng.choice(["", "", "(?m)", "(?s)", "(?i)", "(?ms)"]) + make_pattern(rng)
        try:
            pattern = compile_pattern(source, "label_rules")
        except InputError:  # a reference to a group that is still open
            continue
        text = "".join(rng.choices(ALPHABET, k=rng.randint(1, 14)))
        growing = GrowingMatches(pattern, "label_rules")
        assert is_right(growing, text, rng), (source, text)
        growing = GrowingMatches(pattern, "label_rules")
        growing.read(text)
        tried, decided, letters = tried + 1, decided + growing.decided, letters + len(text)
    assert tried > 500 and decided > 0.8 * letters  # most is known before the text ends


class Hasty(GrowingMatches):
    """One that waits for what may become a match, but takes a match for what it is at once."""

    def _undecided(self, text: str) -> int:
        found = self.pattern.search(text, self.decided, partial=True)
        return found.start() if found and found.partial else len(text)


@pytest.mark.parametrize(
    ("source", "text"), [("wait(?! for)", "wait for me"), (r"\bwait\b", "waiting"), ("a+", "aaa"), ("ab|a", "ab")]
)
def test_it_fails_without_waiting_for_what_may_change_a_match(source, text):
    for kind, right in ((GrowingMatches, True), (Hasty, False)):
        growing = kind(compile_pattern(source, "label_rules"), "label_rules")
        for place in range(1, len(text) + 1):
            growing.read(text[:place])
        growing.end(text)
        assert (growing.spans == spans(growing.pattern, text)) == right


@pytest.mark.parametrize(
    ("source", "text", "decided"),
    [
        ("wait", "so wait", 3),  # the end of it may be a match that grows
        ("wait", "so wait ", 8),
        ("wait(?! for)", "wait f", 0),
        ("wait(?! for)", "wait x", 6),
        (r"wait\b", "x wait", 2),
        (r"no[^.]*\.", "no, and so on", 0),  # as long as no full stop comes
        (r"(?i)\bWAIT\b", "wait, wait", 6),
        (r"(?m)^a.*$", "a b\na", 4),
        (r"x(?:a|\.)", "x. ", 3),
    ],
)
def test_how_far_a_text_is_decided(source, text, decided):
    growing = GrowingMatches(compile_pattern(source, "label_rules"), "label_rules")
    growing.read(text)
    assert growing.decided == decided


@pytest.mark.parametrize(
    "source",
    [
        r"a\Z",
        r"\Xa",
        r"(?:ab){e<=1}",
        r"(?x) a b",
        r"(a)?(?(1)b|c)",
        r"(?<=a\b)b",
        r"(?|a|b)",
        r"[a[b]]",
        r"a\K",
        r"(?r)a",
    ],
)
def test_what_cannot_be_watched_is_known_at_the_end(source):
    with pytest.warns(FutureWarning) if "[[" in source else _nothing():
        pattern = compile_pattern(source, "label_rules")
    assert watched(pattern) is None
    growing, text = GrowingMatches(pattern, "label_rules"), "ab a b ab."
    growing.read(text)
    assert (growing.decided, growing.spans) == (0, [])
    growing.end(text)
    assert growing.spans == spans(pattern, text)


def _nothing():
    from contextlib import nullcontext

    return nullcontext()


def test_a_text_with_the_letters_that_are_never_is_decided_at_its_end():
    growing = GrowingMatches(regex.compile("a+"), "label_rules")
    growing.read("aa b\ue000 a")
    assert growing.decided == 0
    growing.end("aa b\ue000 a")
    assert growing.spans == [(0, 2), (6, 7)]


def test_a_pattern_that_takes_too_long_is_refused(monkeypatch):
    monkeypatch.setattr("streamprobe.system.patterns.PATIENCE", 0.05)
    growing = GrowingMatches(compile_pattern(r"(?:a|aa)+\.", "label_rules"), "label_rules")
    with pytest.raises(InputError, match=re.escape("repetitions of repetitions")):
        growing.end("a" * 400 + "b")


def test_a_copy_that_takes_too_long_leaves_the_rest_to_the_end(monkeypatch):
    """It tries every way, where the pattern itself is content with the first."""
    monkeypatch.setattr("streamprobe.system.growing_matches.PATIENCE", 0.05)
    growing, text = GrowingMatches(compile_pattern(r"(?:a|aa)+", "label_rules"), "label_rules"), "a" * 60 + "b"
    growing.read(text)
    assert (growing.watched, growing.decided) == (None, 0)
    growing.end(text)
    assert growing.spans == [(0, 60)]
