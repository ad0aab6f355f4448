"""Each format gives the codes of the same chain in the format `annotated`, token by token."""

import json
from typing import Any

import pytest
from builders import make_letters, make_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from streamprobe.data.detect import AUTO, FormatQuery, find_format
from streamprobe.data.formats import FORMATS, read_row
from streamprobe.data.label_rules import parse_rule
from streamprobe.data.records import FormatOptions, Record, Refused
from streamprobe.data.tokenize import TextOptions, tokenize
from streamprobe.lags import INSIDE, ONSET, OUTSIDE, UNKNOWN

LABELS = ["deduction", "backtracking"]
PIECES = [
    ("So 7 🙂 fits.", "deduction"),
    ("Wait, 漢字 is wrong 👍🏽.", "backtracking"),
    ("no.", "backtracking"),
    ("Take 3 then.", None),
]
TEXT = " ".join(piece for piece, _ in PIECES)
PROBLEM = "reach 漢 10 🙂?"
TOKENIZERS = {"byte-level": make_tokenizer(), "bpe": make_letters("bpe"), "unigram": make_letters("unigram")}
NEGATIVE = TextOptions(unlabelled="negative")


def sections() -> list[tuple[int, int, str]]:
    found, start = [], 0
    for piece, label in PIECES:
        found += [(start, start + len(piece), label)] if label else []
        start += len(piece) + 1
    return found


COPY = " ".join(f'["{label}"]{piece}["end-section"]' if label else piece for piece, label in PIECES)
WORDS = [(word, label if i else f"B-{label}") for piece, label in PIECES for i, word in enumerate(piece.split(" "))]
BIO = [
    "O" if label.endswith("None") or label is None else label if label[1] == "-" else f"I-{label}"
    for _, label in ((w, label or "None") for w, label in WORDS)
]
ROWS: dict[str, dict[str, Any]] = {
    "annotated": {"response": TEXT, "annotated_response": COPY},
    "spans": {"response": TEXT, "spans": [{"start": a, "end": b, "label": label} for a, b, label in sections()]},
    "spans as triples": {"text": TEXT, "entities": [list(section) for section in sections()]},
    "spans by text": {"text": TEXT, "marked": [{"text": TEXT[a:b], "label": label} for a, b, label in sections()]},
    "tokens": {"tokens": [word for word, _ in WORDS], "ner_tags": BIO},
    "sentences": {"sentences": [{"text": piece, "label": label} for piece, label in PIECES]},
    "sentences and labels": {"steps": [piece for piece, _ in PIECES], "labels": [label for _, label in PIECES]},
}


def read(row: dict[str, Any], format: str = AUTO, **options: Any) -> Record:
    """The record of a row in the format that its columns have."""
    rules = [parse_rule(text) for text in options.pop("rules", [])]
    found = find_format([row], "data", FormatQuery(format, **options), FormatOptions(rules=rules))
    record = read_row(row, 0, FORMATS[found.name], found.options)
    assert isinstance(record, Record), record
    return record


def refused(row: dict[str, Any], like: dict[str, Any]) -> str:
    """The reason for which a row is refused, in data of rows like another one."""
    found = find_format([like, like, row], "data", FormatQuery(), FormatOptions())
    record = read_row(row, 0, FORMATS[found.name], found.options)
    assert isinstance(record, Refused)
    return record.reason


def codes(record: Record, tokenizer: Any, options: TextOptions = NEGATIVE) -> list[list[int]]:
    chain = tokenize(record, tokenizer, LABELS, options)
    return [
        code if sample else ["-"] for code, sample in zip(chain.codes.tolist(), chain.support.tolist(), strict=True)
    ]


@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
@pytest.mark.parametrize("name", ROWS)
def test_every_format_gives_the_codes_of_the_annotated_form(name, tokenizer):
    wanted = codes(read(ROWS["annotated"] | {"problem": PROBLEM}), tokenizer)
    assert codes(read(ROWS[name] | {"problem": PROBLEM}), tokenizer) == wanted
    assert codes(read(ROWS[name] | {"problem": PROBLEM}, name.split(" ")[0]), tokenizer) == wanted


def test_the_codes_are_those_of_the_letters():
    """By hand: a token of a letter, and one for each byte of an unknown one."""
    letters = {*"abcdefghijklmnopqrstuvwxyz.,:>()#SW "}
    wanted: list[list[Any]] = [["-"]] * (2 + sum(1 if c in letters else len(c.encode()) for c in PROBLEM + "\n\n"))
    of, starts = {}, set()
    for start, end, label in sections():
        of |= dict.fromkeys(range(start, end), label)
        starts.add(start)
    for i, c in enumerate(TEXT):
        for byte in range(1 if c in letters else len(c.encode())):
            inside = ONSET if i in starts and not byte else INSIDE
            wanted.append([inside if of.get(i) == label else OUTSIDE for label in LABELS])
    found = codes(read(ROWS["spans"] | {"problem": PROBLEM}), TOKENIZERS["bpe"])
    assert found == wanted


@pytest.mark.parametrize("name", ROWS)
def test_another_text_fails_without_its_own_codes(name):
    """Moving one mark changes the codes in every format."""
    row = json.loads(json.dumps(ROWS[name]).replace("backtracking", "deduction", 1))
    tokenizer = TOKENIZERS["byte-level"]
    assert codes(read(row), tokenizer) != codes(read(ROWS["annotated"]), tokenizer)


# Spans


def test_text_of_a_span_is_meant_everywhere_or_at_its_nth_place():
    row = {"text": "wait, no. wait a bit, wait.", "spans": [{"text": "wait", "label": "a"}]}
    assert [(s.start, s.end) for s in read(row).sections] == [(0, 4), (10, 14), (22, 26)]
    row["spans"] = [
        {"text": "wait", "label": "a", "n": 2},
        {"text": "hmm", "label": "a"},
        {"text": "wait", "n": 4, "label": "b"},
    ]
    record = read(row)
    assert [tuple(s) for s in record.sections] == [("a", 10, 14)]
    assert record.annotation.lost == 2 and record.annotation.missing == ["hmm", "wait"]


def test_a_span_whose_characters_say_another_text_is_moved_to_it():
    """As where characters were counted in UTF-16."""
    text = "🙂🙂 wait, no wait"
    start = len("🙂🙂 ".encode("utf-16-le")) // 2
    row = {"text": text, "spans": [{"start": start, "end": start + 4, "text": "wait", "label": "a"}]}
    record = read(row)
    assert [tuple(s) for s in record.sections] == [("a", 3, 7)] and record.annotation.edited == 1
    del row["spans"][0]["text"]
    assert [tuple(s) for s in read(row).sections] == [("a", start, start + 4)]  # nothing says that it is wrong


def test_spans_of_one_label_that_overlap_are_one():
    row = {"text": "abcdefgh", "spans": [[0, 4, "a"], [2, 6, "a"], [6, 8, "a"], [1, 3, "b"]]}
    assert [tuple(s) for s in read(row).sections] == [("a", 0, 6), ("b", 1, 3), ("a", 6, 8)]


ALPHABET = "ab .\n🙂漢é👍🏽"


@given(st.data())
def test_spans_come_back_from_codes_up_to_the_borders_of_tokens(data):
    text = "x" + data.draw(st.text(ALPHABET, min_size=1, max_size=30)) + "x"
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=6)))
    spans = [(a, b) for a, b in zip(cuts[::2], cuts[1::2], strict=False) if text[a:b].strip()]
    row = {"text": text, "spans": [[a, b, "deduction"] for a, b in spans]}
    for tokenizer in TOKENIZERS.values():
        record = read(row, "spans")
        chain = tokenize(record, tokenizer, LABELS, NEGATIVE)
        places = tokens_of(text, tokenizer, chain)
        wanted, before = [], -1
        for start, end in places:
            last = start + len(text[start:end].rstrip() or text[start:end]) - 1
            number = next((i for i, (a, b) in enumerate(spans) if a <= last < b), -1)
            wanted.append(OUTSIDE if number < 0 else INSIDE if number == before else ONSET)
            before = number if number >= 0 else before
        assert chain.codes[chain.support, 0].tolist() == wanted
        for number, (a, b) in enumerate(spans):  # what the codes say is the span, but for tokens across its borders
            assert all(code >= INSIDE for code, (s, e) in zip(wanted, places, strict=True) if a <= s and e <= b), number


def tokens_of(text: str, tokenizer: Any, chain: Any) -> list[tuple[int, int]]:
    """The characters that each sample covers, found by walking the text with the bytes of the tokens."""
    from streamprobe.data.tokenize import render

    rendered = render(Record(text, read({"text": text, "spans": [[0, 1, "a"]]}).annotation), tokenizer, NEGATIVE)
    return [
        (s - rendered.head, e - rendered.head)
        for (s, e), keep in zip(rendered.offsets, chain.support.tolist(), strict=True)
        if keep
    ]


# Labels of whole texts


@pytest.mark.parametrize(
    ("cell", "column", "labels"),
    [
        (True, "deceptive", ["deceptive"]),
        (False, "deceptive", []),
        (1, "label", ["label"]),
        ("0", "label", []),
        ("honest", "label", ["honest"]),
        (["a", "b"], "labels", ["a", "b"]),
        (1.0, "toxic", ["toxic"]),
        (3, "label", ["3"]),
        ("TRUE", "is_correct", ["is_correct"]),
    ],
)
def test_one_label_for_a_text(cell, column, labels):
    record = read({"text": TEXT, column: cell})
    assert [tuple(s) for s in record.sections] == [(label, 0, len(TEXT)) for label in labels] and record.complete


def test_every_token_carries_the_label_of_its_text():
    chain = tokenize(read({"question": PROBLEM, "answer": TEXT, "label": "deduction"}), TOKENIZERS["unigram"], LABELS)
    assert (chain.codes[chain.support, 0] >= INSIDE).all() and (chain.codes[chain.support, 1] == OUTSIDE).all()
    assert (chain.codes[~chain.support] == UNKNOWN).all() and chain.support.sum() > 50


def test_label_names_map_yes_and_no():
    found = find_format(
        [{"text": "a", "label": 1}], "data", FormatQuery(), FormatOptions(label_names={"1": "lie", "0": "true"})
    )
    for value, label in ((1, "lie"), (0, "true")):
        record = read_row({"text": "a", "label": value}, 0, FORMATS[found.name], found.options)
        assert isinstance(record, Record) and [s.label for s in record.sections] == [label]


# Label rules

PARAGRAPHS = "So. Wait, no!\nIt is 3 (wait). 错了。Wait。\n\nNew one. Then wait. End"


@pytest.mark.parametrize(
    ("rule", "found"),
    [
        ("a=(?i)wait", ["Wait", "wait", "Wait", "wait"]),
        ("a=match:wait", ["wait", "wait"]),
        ("a=sentence:(?i)wait", ["Wait, no!", "It is 3 (wait).", "Wait。", "Then wait."]),
        ("a=paragraph:Then", ["New one. Then wait. End"]),
        ("a=after:one", [". Then wait. End"]),
        ("a=after:End", []),
        ("a=x*", []),
    ],
)
def test_a_rule_labels_what_matches_and_its_scope(rule, found):
    record = read({"text": PARAGRAPHS}, rules=[rule])
    assert [PARAGRAPHS[s.start : s.end] for s in record.sections] == found


def test_the_label_of_a_rule_is_known_everywhere_and_others_stay_unknown():
    row = {"response": "so. wait. hmm.", "annotated_response": 'so. ["deduction"]wait.["end-section"] hmm.'}
    chain = tokenize(read(row, rules=["backtracking=hmm"]), TOKENIZERS["bpe"], LABELS, TextOptions())
    deduction, backtracking = chain.codes[chain.support].T.tolist()
    assert deduction == [UNKNOWN] * 4 + [ONSET] + [INSIDE] * 4 + [UNKNOWN] * 5
    assert backtracking == [OUTSIDE] * 10 + [ONSET, INSIDE, INSIDE, OUTSIDE]


def test_a_rule_changes_nothing_of_what_is_known_of_other_labels():
    row = {"response": "so. wait. hmm.", "annotated_response": 'so. ["backtracking"]wait.["end-section"] hmm.'}
    plain, ruled = read(row), read(row, rules=["backtracking=hmm"])
    tokenizer = TOKENIZERS["bpe"]
    before, after = (tokenize(each, tokenizer, LABELS, TextOptions()).codes[:, 0].tolist() for each in (plain, ruled))
    assert before == after and OUTSIDE in before
    assert [s.label for s in ruled.sections] == ["backtracking", "backtracking"]


def test_numbers_of_classes_are_labels_and_yes_and_no_are_the_name_of_the_column():
    classes, answers = (
        [{"text": f"a{n}", "label": n % 4} for n in range(8)],
        [{"text": "a", "label": n} for n in (0, 1)],
    )
    for rows, wanted in ((classes, ["0", "1", "2", "3"]), (answers, ["label"])):
        found = find_format(rows, "data", FormatQuery(), FormatOptions())
        records = [read_row(row, 0, FORMATS[found.name], found.options) for row in rows]
        labels = {s.label for record in records if isinstance(record, Record) for s in record.sections}
        assert sorted(labels) == wanted
    flags = {"tokens": ["a", "b", "c"], "hallucinated": [False, True, True]}
    assert [tuple(s) for s in read(flags, "tokens", annotation="hallucinated").sections] == [("hallucinated", 2, 5)]
    assert [tuple(s) for s in read({"tokens": ["a", "b"], "labels": ["0", "x"]}).sections] == [("x", 2, 3)]


def test_a_row_without_a_label_is_a_text_where_rules_label_it():
    rows = [{"text": "so wait", "label": "a"}, {"text": "wait no", "label": None}]
    found = find_format(rows, "data", FormatQuery(), FormatOptions(rules=[parse_rule("b=wait")]))
    records = [read_row(row, 0, FORMATS[found.name], found.options) for row in rows]
    assert [[s.label for s in record.sections] for record in records if isinstance(record, Record)] == [
        ["a", "b"],
        ["b"],
    ]
    assert (
        find_format([{"text": "t", "cut": True}], "data", FormatQuery(), FormatOptions(rules=[parse_rule("b=x")])).name
        == "text"
    )


def test_rules_and_spans_of_long_texts_take_no_long():
    """Work that grows with the square of a text would take minutes here."""
    blank = "a" + " " * 100_000 + "wait"
    assert [s.label for s in read({"text": blank}, rules=["a=sentence:wait"]).sections] == ["a"]
    many = "wait. " * 20_000
    assert len(read({"text": many}, rules=["a=sentence:wait"]).sections) == 20_000
    spans = [{"text": "a", "label": "x"}] * 10_000
    assert len(read({"text": "ab" * 1000, "spans": spans}).sections) == 1000


def test_the_first_match_counts_whichever_way_a_rule_looks():
    text = "a 1 b 2 c"
    for rule in (r"x=after:\d", r"x=after:(?r)\d"):
        assert [text[s.start : s.end] for s in read({"text": text}, rules=[rule]).sections] == [" b 2 c"]


# Pieces


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["So", "we", "fit", "."], "So we fit ."),
        (["So", " we", " fit", "."], "So we fit."),
        (["ĠSo", "Ġwe", "Ċ", "fit"], " So we\nfit"),
        (["▁So", "▁w", "e"], " So we"),
        (["play", "##ing", "it"], "playing it"),
    ],
)
def test_tokens_are_joined_as_they_were_written(words, text):
    assert read({"tokens": words, "labels": ["a"] * len(words)}).response == text


def test_neighbours_of_one_label_are_one_section_unless_a_new_one_begins():
    words, tags = ["a", "b", "c", "d", "e"], ["B-x", "I-x", "B-x", "O", "I-x"]
    record = read({"tokens": words, "labels": tags})
    assert [record.response[s.start : s.end] for s in record.sections] == ["a b", "c", "e"]
    assert [s.label for s in read({"tokens": words, "labels": [0, 2, 2, 7, 0]}).sections] == ["2", "7"]


# What is refused

BAD = {
    "a span outside": ("spans", {"spans": [[0, 900, "a"]]}, "outside of its text"),
    "an empty span": ("spans", {"spans": [[3, 3, "a"]]}, "of no character"),
    "a span without label": ("spans", {"spans": [{"start": 0, "end": 2}]}, "has no label"),
    "a label that is a number": ("spans", {"spans": [{"start": 0, "end": 2, "label": 5}]}, "has no label"),
    "a start that is text": ("spans", {"spans": [{"start": "0", "end": 2, "label": "a"}]}, "no whole number"),
    "a span without an end": ("spans", {"spans": [{"start": 0, "label": "a"}]}, "without start and end"),
    "n below 1": ("spans", {"spans": [{"text": "a", "n": 0, "label": "a"}]}, "below 1"),
    "a span that is text": ("spans", {"spans": ["wait"]}, "neither"),
    "spans that are text": ("spans", {"spans": "wait"}, "no list"),
    "an empty text": ("spans", {"response": " "}, "empty response"),
    "text that is a number": ("spans", {"response": 5}, "not text"),
    "a problem that is a list": ("spans", {"problem": ["a"]}, "not text"),
    "too few labels": ("tokens", {"ner_tags": ["O"]}, "labels for"),
    "tokens that are numbers": ("tokens", {"tokens": [1, 2]}, "no list of texts"),
    "labels that are fractions": ("tokens", {"ner_tags": [0.5] * len(WORDS)}, "no list"),
    "sentences without text": ("sentences", {"sentences": [{"label": "a"}]}, "no list of"),
    "no label": ("pooled", {"label": None}, "without a label"),
    "a blank label": ("pooled", {"label": " "}, "without a label"),
    "a fraction": ("pooled", {"label": 0.3}, "fraction"),
    "a label that is an object": ("pooled", {"label": {"a": 1}}, "without a label"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_is_refused_with_its_reason(name):
    format, wrong, reason = BAD[name]
    good = ROWS.get(format, {"text": TEXT, "label": "a"}) | {"problem": PROBLEM}
    assert reason in refused(good | wrong, good)
    with pytest.raises(AssertionError):
        refused(good, good)
