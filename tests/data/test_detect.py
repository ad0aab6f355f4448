"""The format of a data set is read off its columns; what fits none is reported with the nearest one."""

from typing import Any

import pytest

from streamprobe.data.detect import AUTO, FormatQuery, find_format
from streamprobe.data.formats import FORMATS
from streamprobe.data.label_rules import parse_rule
from streamprobe.data.records import FormatOptions
from streamprobe.errors import InputError

SPAN, TURNS = (
    {"start": 0, "end": 2, "label": "a"},
    [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}],
)


def found(row: dict[str, Any], *more: dict[str, Any], rules: tuple[str, ...] = (), **asked: Any) -> tuple[Any, ...]:
    options = FormatOptions(rules=[parse_rule(rule) for rule in rules])
    name, o = find_format([row, *more], "data.json", FormatQuery(**asked), options)
    return name, o.response, o.annotation, o.problem, o.id


CASES: dict[str, tuple[dict[str, Any], tuple[Any, ...]]] = {
    "the original's": (
        {"task_id": "a_1", "problem": "p", "reasoning_chain": "t", "annotated_chain": "t"},
        ("annotated", "reasoning_chain", "annotated_chain", "problem", "task_id"),
    ),
    "tags in a column of any name": (
        {"text": "t", "gpt4o": '["a"]t["end-section"]'},
        ("annotated", "text", "gpt4o", None, None),
    ),
    "spans in a column of any name": ({"text": "tt", "marks": [SPAN]}, ("spans", "text", "marks", None, None)),
    "spans beside a question": (
        {"question": "q", "answer": "t", "spans": []},
        ("spans", "answer", "spans", "question", None),
    ),
    "messages": ({"messages": TURNS, "id": 5}, ("messages", "messages", None, None, "id")),
    "messages with a label": ({"chat": TURNS, "label": 1}, ("messages", "chat", "label", None, None)),
    "messages and their answer as text": (
        {"problem": "p", "solution": "s", "messages": TURNS},
        ("messages", "messages", None, "problem", None),
    ),
    "tokens": ({"tokens": ["a"], "ner_tags": [0]}, ("tokens", "tokens", "ner_tags", None, None)),
    "sentences": (
        {"prompt": "p", "steps": [{"text": "t", "label": "a"}]},
        ("sentences", "steps", None, "prompt", None),
    ),
    "a label": ({"prompt": "p", "response": "t", "label": "lie"}, ("pooled", "response", "label", "prompt", None)),
    "yes or no in a column of any name": (
        {"statement": "t", "lies": True},
        ("pooled", "statement", "lies", None, None),
    ),
    "only a prompt": ({"id": "x", "prompt": "p", "label": 0}, ("pooled", "prompt", "label", None, "id")),
    "capitals": ({"Text": "t", "Label": "a"}, ("pooled", "Text", "Label", None, None)),
}


@pytest.mark.parametrize("name", CASES)
def test_the_format_is_read_off_the_columns(name):
    row, wanted = CASES[name]
    assert found(row) == wanted
    format, text, labels, *_ = wanted
    assert found(row, format=format, response=text, annotation=labels)[:3] == wanted[:3]


def test_a_text_alone_needs_rules_or_no_labels():
    row = {"question": "q", "answer": "t"}
    assert found(row, rules=("a=x",)) == found(row, labelled=False) == ("text", "answer", None, "question", None)
    assert found(row | {"label": 1}, rules=("a=x",))[0] == "pooled"
    with pytest.raises(InputError, match="text is the nearest: it lacks label_rules|the nearest: it lacks"):
        found(row)


def test_columns_that_are_named_are_taken():
    row = {"response": "t", "other": "u", "spans": [SPAN], "mine": [SPAN], "id": "a", "name": "b", "q": "p"}
    assert found(row)[:3] == ("spans", "response", "spans")
    asked = {"response": "other", "annotation": "mine", "id": "name", "problem": "q"}
    assert found(row, **asked) == ("spans", "other", "mine", "q", "name")


def test_most_values_of_a_column_decide():
    good, odd = {"text": "tt", "spans": [SPAN]}, {"text": 5, "spans": "x"}
    assert found(good, odd, good)[0] == "spans"
    with pytest.raises(InputError):
        found(odd, odd, good)


BAD: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "no column fits": ({"x": 1, "y": 2.5}, {}, r"data\.json with the columns 'x', 'y'; expected .* is the nearest"),
    "texts alone": ({"a": "s", "b": "t"}, {}, "the nearest"),
    "nearly spans": ({"text": "t", "span": "0-2"}, {}, "spans is the nearest: it lacks a list of .start, end, label"),
    "nearly annotated": ({"text": "t", "annotated_chains": 5}, {}, "annotated is the nearest: it lacks a copy of it"),
    "a column that is not there": (
        {"text": "t"},
        {"response": "body"},
        "without the column 'body'; expected one of 'text'",
    ),
    "labels that are not there": ({"text": "t"}, {"annotation": "y"}, "without the column 'y'.*--annotation_column"),
    "the wrong format": (
        {"text": "t", "label": 1},
        {"format": "spans"},
        "those of format spans, which lacks a list of",
    ),
    "a column of another kind": (
        {"text": "t", "label": 1},
        {"format": "spans", "annotation": "label"},
        "format spans, which",
    ),
    "tokens for a chat": ({"tokens": ["a"], "labels": ["x"]}, {"format": "messages"}, "lacks a list of turns"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_fits_no_format_is_one_line(name):
    row, asked, message = BAD[name]
    with pytest.raises(InputError, match=message) as caught:
        found(row, **asked)
    assert "\n" not in str(caught.value)


def test_every_format_has_a_row_that_auto_takes():
    assert {wanted[0] for _, wanted in CASES.values()} == {
        name for name in FORMATS if name != "text"
    } and AUTO not in FORMATS
