"""Sections are found again in the original text, whatever the annotator did to the copy."""

import json
import random
from pathlib import Path

import pytest
from builders import make_rows, parse_annotations
from hypothesis import example, given, settings
from hypothesis import strategies as st

from streamprobe.data.annotations import Annotation, Section, annotate, check_names, plain_name
from streamprobe.errors import InputError

REAL = Path(__file__).parents[3] / "shared" / "data" / "all_annotated_chains.json"
LABELS = ("deduction", "backtracking", "initializing")


def tagged(pieces: list[tuple[str | None, str]]) -> str:
    """Pieces of (label or None, text) as annotated text."""
    return "".join(text if label is None else f'["{label}"]{text}["end-section"]' for label, text in pieces)


def texts(found: Annotation, original: str) -> list[tuple[str, str]]:
    """The label and the stripped text of each section that was found."""
    return [(s.label, original[s.start : s.end].strip()) for s in found.sections]


PARSED = {
    "plain": ('["a"]one["end-section"]["b"] two["end-section"]', "one two", [("a", 0, 3), ("b", 3, 7)], 0),
    "no tags": ("one two", "one two", [], 0),
    "nothing": ("", "", [], 0),
    "text around": ('x["a"]one["end-section"] y', "xone y", [("a", 1, 4)], 0),
    "text between": ('["a"]1["end-section"]\n\n["b"]2["end-section"]', "1\n\n2", [("a", 0, 1), ("b", 3, 4)], 0),
    "nested": (
        '["a"]one["b"]two["end-section"]three["end-section"]',
        "onetwothree",
        [("a", 0, 3), ("b", 3, 6)],
        2,
    ),
    "opened twice": ('["a"]one["b"]two["end-section"]', "onetwo", [("a", 0, 3), ("b", 3, 6)], 1),
    "unclosed": ('["a"]one["end-section"]["b"]two', "onetwo", [("a", 0, 3), ("b", 3, 6)], 1),
    "stray end": ('one["end-section"]two["a"]three["end-section"]', "onetwothree", [("a", 6, 11)], 1),
    "two ends": ('["a"]one["end-section"]["end-section"]', "one", [("a", 0, 3)], 1),
    "empty": ('["a"]["end-section"]["b"]two["end-section"]', "two", [("b", 0, 3)], 0),
    "only space": ('["a"] \n["end-section"]["b"]two["end-section"]', " \ntwo", [("b", 2, 5)], 0),
    "any label": ('["x-y_2"]one["end-section"]', "one", [("x-y_2", 0, 3)], 0),
    "label of two words": ('["a b"]one["end-section"]', "one", [("a b", 0, 3)], 0),
    "two labels": ('["a"]["b"]one["end-section"]', "one", [("a", 0, 3), ("b", 0, 3)], 0),
    "two labels apart": ('["a"] \n["b"]one["end-section"]', " \none", [("a", 2, 5), ("b", 2, 5)], 0),
    "two labels in a tag": ('["a", "b"]one["end-section"]two', "onetwo", [("a", 0, 3), ("b", 0, 3)], 0),
    "two labels, two ends": ('["a"]["b"]one["end-section"]["end-section"]', "one", [("a", 0, 3), ("b", 0, 3)], 0),
    "two labels, three ends": (
        '["a"]["b"]one["end-section"]["end-section"]["end-section"]',
        "one",
        [("a", 0, 3), ("b", 0, 3)],
        1,
    ),
    "two labels, unclosed": ('["a"]["b"]one', "one", [("a", 0, 3), ("b", 0, 3)], 1),
    "the same label twice": ('["a"]["a"]one["end-section"]', "one", [("a", 0, 3)], 1),
    "an end too late": ('["a"]["b"]one["end-section"]two["end-section"]', "onetwo", [("a", 0, 3), ("b", 0, 3)], 1),
    "single quotes": ("['a']one['end-section']", "one", [("a", 0, 3)], 0),
    "curly quotes": ("[“a”]one[‘end-section’]", "one", [("a", 0, 3)], 0),
    "spaces within": ('[ "a" ,"b" ]one["end-section"]', "one", [("a", 0, 3), ("b", 0, 3)], 0),
    "a label as it is written": ('["Überlegung …"]one["end-section"]', "one", [("Überlegung …", 0, 3)], 0),
    "no tag": ('["a\nb"]one[1] [end-section][""]', '["a\nb"]one[1] [end-section][""]', [], 0),
}


@pytest.mark.parametrize("name", PARSED)
def test_parse(name):
    annotated, text, sections, unbalanced = PARSED[name]
    assert parse_annotations(annotated) == (text, [Section(*s) for s in sections], unbalanced)


@pytest.mark.parametrize("seed", range(3))
def test_exact_copy_gives_exact_spans(seed):
    for row in make_rows(10, seed):
        text, sections, _ = parse_annotations(row["annotated_chain"])
        assert text == row["reasoning_chain"]
        assert annotate(row["annotated_chain"], text)[:4] == (sections, 0, 0, 0)


PIECES = [
    ("deduction", "alpha bravo charlie."),
    ("backtracking", " delta echo foxtrot golf."),
    (None, "\n\n"),
    ("deduction", "hotel india juliett kilo."),
    ("initializing", " lima mike november."),
]
ORIGINAL = "".join(text for _, text in PIECES)
FOUND = [(label, text.strip()) for label, text in PIECES if label]


def changed(index: int, text: str) -> str:
    """The annotated copy with one piece written differently."""
    return tagged([(label, text if i == index else old) for i, (label, old) in enumerate(PIECES)])


@pytest.mark.parametrize(
    "text",
    [" delta ECHO foxtrot golf.", " delta foxtrot golf.", " delta echo foxtrot golf so.", " delta ekko foxtrot golf."],
)
def test_edited_word_in_the_middle(text):
    found = annotate(changed(1, text), ORIGINAL)
    assert texts(found, ORIGINAL) == FOUND
    assert found[1:4] == (1, 0, 0)


def test_edited_word_at_the_border_moves_only_that_border():
    found = annotate(changed(1, " XXXXX echo foxtrot golf."), ORIGINAL)
    assert texts(found, ORIGINAL) == [FOUND[0], ("backtracking", "echo foxtrot golf."), *FOUND[2:]]
    assert found[1:4] == (1, 0, 0)


@pytest.mark.parametrize("kept", range(1, len(PIECES)))
def test_copy_that_lost_its_tail_loses_no_other_section(kept):
    found = annotate(tagged(PIECES[:kept]), ORIGINAL)
    assert texts(found, ORIGINAL) == [(label, text.strip()) for label, text in PIECES[:kept] if label]
    assert found[1:4] == (0, 0, 0)


@pytest.mark.parametrize("kept", range(1, len(PIECES)))
def test_original_that_lost_its_tail_loses_only_sections_in_it(kept):
    original = "".join(text for _, text in PIECES[:kept])
    found = annotate(tagged(PIECES), original)
    expected = [(label, text.strip()) for label, text in PIECES[:kept] if label]
    assert texts(found, original) == expected
    assert found[1:4] == (0, len(FOUND) - len(expected), 0)


@pytest.mark.parametrize("seed", range(5))
def test_text_dropped_between_sections(seed):
    """Every second stretch of the original is missing from the copy; the others keep their exact place."""
    rng = random.Random(seed)
    names = iter(rng.sample(range(1000, 9999), 200))
    stretches = [" ".join(f"w{next(names)}" for _ in range(rng.randint(2, 8))) for _ in range(12)]
    original, pieces, expected = "", [], []
    for number, stretch in enumerate(stretches):
        original += " " if original else ""
        if number % 2:
            label = rng.choice(LABELS)
            pieces.append((label, stretch))
            expected.append(Section(label, len(original), len(original) + len(stretch)))
        original += stretch
    annotated = tagged(pieces)
    assert annotate(annotated, original)[:4] == (expected, 0, 0, 0)
    _, moved, _ = parse_annotations(annotated)  # negative control: places in the copy are wrong in the original
    assert moved != expected


def test_long_text_of_few_words():
    """In a text of 900 words, of which there are twelve, each one is common; an edit still moves no other section."""
    rng = random.Random(0)
    words = "so then the box is red or blue but not that one".split()
    pieces = [("deduction", " ".join(rng.choices(words, k=30)) + ".") for _ in range(30)]
    text = "".join(piece for _, piece in pieces)
    _, sections, _ = parse_annotations(tagged(pieces))
    pieces[15] = ("deduction", "so" + pieces[15][1])
    found = annotate(tagged(pieces), text)
    assert found[:4] == (sections, 1, 0, 0)


@pytest.mark.parametrize(
    ("word", "lost"), [("efg", 0), ("efgh", 0), ("efghi", 1), ("efghijkl", 1)], ids=["most", "half", "less", "little"]
)
def test_section_that_is_more_than_half_lost_is_lost(word, lost):
    original = "first abcd 1234 last"
    copy = [("deduction", "first"), ("backtracking", f" abcd {word}"), ("deduction", " last")]
    found = annotate(tagged(copy), original)
    rest = [("deduction", "first"), ("deduction", "last")]
    assert texts(found, original) == (rest if lost else [rest[0], ("backtracking", "abcd"), rest[1]])
    assert found[1:4] == (1 - lost, lost, 0)


def test_nothing_in_common_is_lost():
    found = annotate('["a"]abc def["end-section"]', "123, 456")
    assert found[:4] == ([], 0, 1, 0)


@pytest.mark.parametrize(
    "copy",
    [
        '["a"]one  two["end-section"]["b"]three\n\nfour["end-section"]',
        '["a"]one\ntwo["end-section"] ["b"]three four["end-section"]',
        '["a"]one two ["end-section"]["b"]three\tfour["end-section"]',
        '\n["a"]one two["end-section"]["b"]   three four\n\n["end-section"]\n',
    ],
)
def test_white_space_is_no_difference(copy):
    original = "one two\nthree four"
    found = annotate(copy, original)
    assert texts(found, original) == [("a", "one two"), ("b", "three\nfour".replace("\n", " "))]
    assert found[1:4] == (0, 0, 0)


@pytest.mark.parametrize(
    ("copy", "spans"),
    [
        ('["a"]one["end-section"] ["b"]two["end-section"]', [(0, 3), (4, 7)]),
        ('["a"]one["end-section"]["b"] two["end-section"]', [(0, 3), (3, 7)]),
        ('["a"]one ["end-section"]["b"]two["end-section"]', [(0, 4), (4, 7)]),
        ('["a"]one ["end-section"]["b"] two["end-section"]', [(0, 4), (4, 7)]),
    ],
    ids=["outside", "second", "first", "both"],
)
def test_white_space_belongs_to_the_section_whose_tags_hold_it(copy, spans):
    assert [(s.start, s.end) for s in annotate(copy, "one two").sections] == spans


def test_tags_without_partner_are_counted():
    found = annotate('["a"]one["b"]two["end-section"]["end-section"]three', "one two three".replace(" ", ""))
    assert found.unbalanced == 2


ink = st.text("abcd.,é漢", min_size=1, max_size=6)
space = st.sampled_from(["", " ", "\n\n"])


@st.composite
def annotated_texts(draw, words=ink):
    """A random text cut into random sections, also in the middle of words: (its pieces, the text)."""
    pieces = draw(
        st.lists(
            st.tuples(
                st.sampled_from([None, *LABELS]),
                st.tuples(space, st.lists(words, max_size=4).map(" ".join), space).map("".join),
            ),
            min_size=1,
            max_size=8,
        )
    )
    return pieces, "".join(text for _, text in pieces)


@given(annotated_texts())
@example(([("deduction", "a"), ("deduction", "a"), (None, "a"), ("deduction", " a ")], "aaa a "))
def test_exact_copy_property(drawn):
    """An unedited copy gives back the very spans it was cut at, white space included."""
    pieces, text = drawn
    expected, cursor = [], 0
    for label, piece in pieces:
        if label and piece.strip():
            expected.append(Section(label, cursor, cursor + len(piece)))
        cursor += len(piece)
    assert annotate(tagged(pieces), text)[:4] == (expected, 0, 0, 0)


BRACKETS = [
    '["total"]',
    "['x']",
    '["name", "age"]',
    "[1]",
    "[x]",
    "<b>",
    '["open"',
    "{k}",
    '("yes")',
    "[“a”]",
    '["total"]["x"]',
]


@settings(max_examples=300)
@given(annotated_texts(st.one_of(ink, st.sampled_from(BRACKETS))))
def test_exact_copy_of_text_with_brackets_property(drawn):
    """Whatever brackets the model writes, an unedited copy gives back the very spans, and none of them is a tag."""
    pieces, text = drawn
    expected, cursor = [], 0
    for label, piece in pieces:
        if label and piece.strip():
            expected.append(Section(label, cursor, cursor + len(piece)))
        cursor += len(piece)
    found = annotate(tagged(pieces), text)
    assert found[:4] == (expected, 0, 0, 0)
    assert not found.strange and set(found.names) <= set(LABELS)


@given(annotated_texts(), st.data())
def test_edited_copy_property(drawn, data):
    """Whatever is deleted from the copy, sections rise, never overlap, stay in the text, and none goes uncounted.

    White space lies outside the tags here.
    """
    pieces, text = drawn
    edited = []
    for label, piece in pieces:
        gone = data.draw(st.sets(st.integers(0, max(0, len(piece) - 1)), max_size=3))
        piece = "".join(c for i, c in enumerate(piece) if i not in gone)
        edited.append((label, piece.strip() if label else piece))
    found = annotate(tagged(edited), text)
    end = 0
    for section in found.sections:
        assert end <= section.start < section.end <= len(text)
        end = section.end
    asked = [label for label, piece in edited if label and piece]
    assert len(found.sections) + found.lost == len(asked)
    left = iter(asked)
    assert all(section.label in left for section in found.sections)  # in order


@pytest.mark.real
def test_real_chains():
    """The figures that the data set's description gives."""
    if not REAL.is_file():
        pytest.skip(f"{REAL.name} is not here")
    rows = json.loads(REAL.read_text(encoding="utf-8"))
    found = [annotate(row["annotated_chain"], row["reasoning_chain"]) for row in rows]
    assert len(found) == 1000
    assert all(f.sections for f in found)
    labels = [[s.label for s in f.sections] for f in found]
    assert sum(chain.count("backtracking") for chain in labels) == 695
    assert sum("backtracking" in chain for chain in labels) == 424
    assert sum(f.lost for f in found) <= 5
    for f in found:
        spans = list(dict.fromkeys((s.start, s.end) for s in f.sections))  # once where a section has two labels
        assert all(a[1] <= b[0] for a, b in zip(spans, spans[1:], strict=False))


@pytest.mark.parametrize(
    ("copy", "original"),
    [
        ('["a"]foo ["end-section"]["b"] bars["end-section"]', "xfoo barsx"),
        ('["a"]a ["end-section"]["b"] a["end-section"]', "aa  aa"),
    ],
)
def test_edited_sections_share_no_white_space(copy, original):
    sections = annotate(copy, original).sections
    assert all(x.end <= y.start for x, y in zip(sections, sections[1:], strict=False))


@pytest.mark.parametrize(
    ("copy", "original"),
    [
        ('["a"]a b c d e f g h["end-section"]', "- - - - - - - -"),
        ('["a"]a b["end-section"]', "1 2"),
    ],
)
def test_white_space_alone_does_not_find_a_section(copy, original):
    assert annotate(copy, original)[:4] == ([], 0, 1, 0)


@settings(max_examples=300)
@given(annotated_texts(), st.data())
def test_edited_copy_and_original_property(drawn, data):
    """Whatever is deleted from either text, sections rise, never overlap, and hold text; white space is anywhere."""

    def delete(piece):
        gone = data.draw(st.sets(st.integers(0, max(0, len(piece) - 1)), max_size=3))
        return "".join(c for i, c in enumerate(piece) if i not in gone)

    pieces, text = drawn
    edited = [(label, delete(piece)) for label, piece in pieces]
    text = delete(text)
    end = 0
    for section in annotate(tagged(edited), text).sections:
        assert end <= section.start < section.end <= len(text)
        assert text[section.start : section.end].strip()
        end = section.end


def test_a_section_is_not_blown_up_by_a_stray_word():
    """The copy lacks a long stretch, in which a word of the next section happens to be."""
    lost = " ".join(f"w{i}" for i in range(200))
    original = f"first part here. {lost} Strange {lost} Wait, that is not right."
    copy = '["a"]first part here.["end-section"] ["b"]Strange, that is not right.["end-section"]'
    found = annotate(copy, original)
    assert texts(found, original) == [("a", "first part here."), ("b", ", that is not right.")]


def test_a_stretch_that_is_missing_at_a_border_belongs_to_no_section():
    """Whatever the missing sentence begins or ends with."""
    original = "So we add two. So we add three. So we have five."
    copy = '["a"]So we add two.["end-section"] ["b"]So we have five.["end-section"]'
    assert texts(annotate(copy, original), original) == [("a", "So we add two."), ("b", "So we have five.")]


@pytest.mark.parametrize("loop", [False, True])
def test_sentences_that_begin_and_end_alike_keep_their_borders(loop, monkeypatch):
    """A third of the sentences is edited, a fifth dropped, a fifth of others put in: nearly all keep their exact place."""
    rng = random.Random(0)
    begins, ends = ["So the", "So we", "Wait, the", "Then we"], ["in all.", "is right.", "at once."]

    def sentence():
        return f"{rng.choice(begins)} {' '.join(f'w{rng.randrange(60)}' for _ in range(rng.randint(3, 9)))} {rng.choice(ends)}"

    sentences = [sentence() for _ in range(6 if loop else 120)] * (20 if loop else 1)
    copy, expected, place = [], [], 0
    for text in sentences:
        span, place = (place, place + len(text)), place + len(text) + 1
        if rng.random() < 0.2:
            continue
        if rng.random() < 0.2:
            copy.append(("note", sentence()))
        copy.append(("a", text if rng.random() < 0.7 else text.replace(" w", " v", 1)))
        expected.append(span)
    annotated, original = " ".join(tagged([piece]) for piece in copy), " ".join(sentences)

    def exact():
        return {(s.start, s.end) for s in annotate(annotated, original).sections if s.label == "a"} & set(expected)

    assert len(exact()) > 0.95 * len(expected)
    monkeypatch.setattr("streamprobe.data.annotations.slide_both", lambda partner, *_: partner)
    assert len(exact()) < 0.9 * len(expected)  # negative control


def test_names_are_mapped_before_anything_is_counted():
    copy = '["5. back"]one["end-section"] <back>two["end-section"] ["Back"]three["stop"]'
    names = {"5. back": "back", "Back": "back", "<back>": "back", "stop": "end-section"}
    found = annotate(copy, "one two three", names)
    assert texts(found, "one two three") == [("back", "one"), ("back", "two"), ("back", "three")]
    assert found[1:4] == (0, 0, 0) and set(found.names) == set(names) and not found.strange
    assert [s.label for s in annotate(copy, "one two three").sections] == ["5. back", "Back"]  # negative control


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("Backtracking", "backtracking"),
        ("5. backtracking", "backtracking"),
        ("back_tracking", "backtracking"),
        ("back-Tracking", "backtracking"),
        (" 12) BACK tracking ", "backtracking"),
        ("back tracks", "backtracks"),
        ("5", "5"),
        ("?", "?"),
        ("É", plain_name("e\u0301")),
    ],
)
def test_nearly_equal_names_have_one_plain_name(name, plain):
    assert plain_name(name) == plain


def test_a_name_that_is_not_there_names_the_nearest():
    check_names({"Backtracking": "backtracking"}, {"Backtracking", "deduction"})
    with pytest.raises(InputError, match="no tag names 'Backtrack'; expected a name .* the nearest is 'Backtracking'"):
        check_names({"Backtrack": "backtracking"}, {"Backtracking", "deduction"})
    with pytest.raises(InputError, match="expected a name that the data have; fix"):
        check_names({"Backtrack": "backtracking"}, set())


@pytest.mark.parametrize("mark", ["\x1b", "\x07", "\u202e", "\u2028", "\u200b", "\ud800", "\n"])
def test_a_tag_holds_nothing_invisible(mark: str) -> None:
    """What could command a terminal, or turn its text around, is no label."""
    text = f'["a{mark}b"]one["end-section"] ["c"]two["end-section"]'
    assert {section.label for section in parse_annotations(text)[1]} == {"c"}
    assert {section.label for section in parse_annotations(text.replace(mark, "-"))[1]} == {"a-b", "c"}  # control
