"""A row of a data set as a Record: one function a format, and the table in which config, help and errors find it.

To add a format, write a function `row, options -> Record` and a row in FORMATS.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from streamprobe.data import columns
from streamprobe.data.annotations import Annotation, Section, annotate, rejoin
from streamprobe.data.columns import Role
from streamprobe.data.label_rules import apply_rules
from streamprobe.data.messages import MESSAGES, messages
from streamprobe.data.prompts import is_unicode
from streamprobe.data.records import FormatOptions, Record, Refused, Row, Unusable
from streamprobe.data.spans import find_spans, is_span, read_span
from streamprobe.data.values import Named, label_names_of, outside

BIO = re.compile(r"([BILUES])-(.+)", re.DOTALL)  # how taggers write where a stretch begins, goes on and ends
SPACE_MARKS = {"Ġ": " ", "▁": " ", "Ċ": "\n"}  # how tokenizers write the space before a token, and a line end


class Format(NamedTuple):
    """A way in which texts and labels lie in a data set."""

    read: Callable[[Row, FormatOptions], Record]  # raises Unusable
    about: str  # for the help of the key `format`
    text: Role  # the column `FormatOptions.response`
    labels: Role | None = None  # the column `FormatOptions.annotation`, if they have one of their own
    labelled: bool = True  # whether a row has labels without `label_rules`


def text_of(row: Row, options: FormatOptions) -> tuple[str, str]:
    """The problem and the response of a row, as text.  Raises Unusable for a row without."""
    problem = row.get(options.problem) if options.problem else None
    response = row.get(options.response)
    problem = "" if problem is None else problem
    if not (isinstance(problem, str) and isinstance(response, str)):
        raise Unusable("with a field that is missing or not text")
    if not response.strip():
        raise Unusable("with an empty response")
    return problem, response


def annotated(row: Row, options: FormatOptions) -> Record:
    """A text, and a copy of it with `["label"]...["end-section"]` around its sections."""
    copy = row.get(options.annotation or "")
    if not isinstance(copy, str):
        raise Unusable("with a field that is missing or not text")
    problem, response = text_of(row, options)
    if not is_unicode(problem + (copy if options.rejoined else response)):
        raise Unusable("with text that is not Unicode")
    if options.rejoined:
        response, found = rejoin(copy, response, options.label_names)
    else:
        found = annotate(copy, response, options.label_names)
    if found.strange and not found.asked:
        raise Unusable(f"whose tags are all of a form that is not understood, such as {found.strange[0]}")
    return Record(response, found, problem)


def spans(row: Row, options: FormatOptions) -> Record:
    """A text, and a list of {start, end, label} in characters or {text, label}."""
    given = row.get(options.annotation or "")
    if not isinstance(given, list | None):
        raise Unusable("with spans that are no list")
    problem, response = text_of(row, options)
    found = find_spans(response, map(read_span, given or []), options.label_names)
    return Record(response, found, problem, complete=True)


def tokens(row: Row, options: FormatOptions) -> Record:
    """Words or tokens with a label each; none, `O` and 0 say that there is none."""
    words, labels = row.get(options.response), row.get(options.annotation or "")
    if columns.is_list_of_texts(words) and not options.labelled:
        labels = [None] * len(words or ())
    if not (columns.is_list_of_texts(words) and columns.is_list_of_labels(labels)):
        raise Unusable("with tokens that are no list of texts, or labels that are no list")
    assert isinstance(words, list) and isinstance(labels, list)
    return _joined(row, options, _as_written(words), labels)


def sentences(row: Row, options: FormatOptions) -> Record:
    """A list of {text, label}, or of texts with a list of labels beside it."""
    given, labels = row.get(options.response), row.get(options.annotation or "")
    if not isinstance(given, list) or not all(map(is_sentence, given)):
        raise Unusable("with sentences that are no list of {text, label}")
    pieces = [each if isinstance(each, str) else _first(each, SENTENCE) for each in given]
    if not options.labelled:
        labels = [None] * len(given)
    elif labels is None:
        labels = [None if isinstance(each, str) else _first(each, SENTENCE_LABEL) for each in given]
    if not columns.is_list_of_labels(labels):
        raise Unusable("with labels that are no list")
    return _joined(row, options, _spaced(pieces), labels, apart=True)


def text(row: Row, options: FormatOptions) -> Record:
    """A text alone, which has the labels that `label_rules` give it."""
    problem, response = text_of(row, options)
    return Record(response, Annotation([]), problem, complete=True)


def pooled(row: Row, options: FormatOptions) -> Record:
    """A text and one label for the whole of it."""
    problem, response = text_of(row, options)
    value, column = row.get(options.annotation or ""), options.annotation or ""
    unlabelled = value is None and options.rules  # as far as the data go
    named = Named([], []) if unlabelled else label_names_of(value, column, options)
    sections = [Section(label, 0, len(response)) for label in named.labels]
    return Record(response, Annotation(sections, names=named.given), problem, complete=True)


# What sentences are

SENTENCE, SENTENCE_LABEL = ("text", "sentence", "content", "chunk"), ("label", "labels", "tag", "category", "type")


def is_sentence(value: Any) -> bool:
    """A sentence, with or without its label beside it."""
    return isinstance(value, str) or (isinstance(value, Mapping) and isinstance(_first(value, SENTENCE), str))


def _first(value: Mapping[str, Any], names: Sequence[str]) -> Any:
    return next((value[name] for name in names if name in value), None)


# Pieces of a text, and a label for each


def _as_written(words: Sequence[str]) -> list[str]:
    """Tokens with the white space that lies between them."""
    if any(word.startswith(tuple(SPACE_MARKS)) for word in words):
        return [word.translate(str.maketrans(dict[str, Any](SPACE_MARKS))) for word in words]
    if any(word.startswith("##") for word in words[1:]):
        return [w[2:] if w.startswith("##") and i else f"{' ' if i else ''}{w}" for i, w in enumerate(words)]
    return _spaced(words)


def _spaced(pieces: Sequence[str]) -> list[str]:
    """Pieces of a text with a space between them, unless they have white space of their own there."""
    if any(a[-1:].isspace() or b[:1].isspace() for a, b in zip(pieces, pieces[1:], strict=False)):
        return list(pieces)
    return [f"{' ' if i else ''}{piece}" for i, piece in enumerate(pieces)]


def _joined(
    row: Row, options: FormatOptions, pieces: Sequence[str], labels: Sequence[Any], *, apart: bool = False
) -> Record:
    """A record of the pieces, of which each has a label: neighbours of one label are one section, or stay apart."""
    if len(labels) != len(pieces):
        raise Unusable(f"with {len(labels)} labels for {len(pieces)} pieces of text")
    problem = row.get(options.problem) if options.problem else None
    if not isinstance(problem, str | None):
        raise Unusable("with a field that is missing or not text")
    response, found = "".join(pieces), list[Section]()
    if not response.strip():
        raise Unusable("with an empty response")
    bio = all(outside(label) or (isinstance(label, str) and BIO.fullmatch(label)) for label in labels)
    place, given, before = 0, list[str](), list[str]()
    for piece, label in zip(pieces, labels, strict=True):
        start, place = place + len(piece) - len(piece.lstrip()), place + len(piece)
        tag = BIO.fullmatch(label) if bio and isinstance(label, str) else None
        raw = tag[2] if tag else label
        named = Named([], []) if outside(raw) else label_names_of(raw, options.annotation or "label", options)
        if named.labels and before == named.labels and not (apart or (tag and tag[1] in "BUS")):
            found[-1] = found[-1]._replace(end=place)
        else:
            found += [Section(name, start, place) for name in named.labels]
        before = list(named.labels)
        given += named.given
    return Record(response, Annotation(found, names=given), problem or "", complete=True)


# The tables

ID = Role(
    "the name of a row",
    ("task_id", "id", "uid", "uuid", "example_id", "question_id", "problem_id", "idx"),
    columns.is_name,
    columns.never,
    required=False,
)
PROBLEM = Role(
    "the problem",
    ("problem", "question", "prompt", "instruction", "query", "input", "task"),
    columns.is_text,
    columns.never,
    required=False,
)
TEXT = Role(
    "the text",
    ("reasoning_chain", "response", "completion", "generation", "generated_text", "output", "model_output", "reasoning")
    + ("cot", "chain_of_thought", "thinking", "trace", "text", "content", "document", "solution", "answer", "sentence"),
    columns.is_text,
    columns.is_text,
)
COPY = Role(
    'a copy of it with ["label"]...["end-section"]',
    ("annotated_chain", "annotated_response", "annotated_text", "annotated", "annotation"),
    columns.is_text,
    columns.has_tags,
)
SPANS = Role(
    "a list of {start, end, label} or {text, label}",
    ("spans", "annotations", "annotation", "entities", "labels", "label", "highlights"),
    lambda value: columns.all_of(value, is_span),
    lambda value: columns.some_of(value, is_span),
)
TOKENS = Role("a list of words or tokens", ("tokens", "words"), columns.is_list_of_texts, columns.never)
TAGS = Role(
    "a list with a label for each",
    ("labels", "tags", "token_labels", "ner_tags", "label"),
    columns.is_list_of_labels,
    columns.never,
)
SENTENCES = Role(
    "a list of {text, label}",
    ("sentences", "steps", "segments", "chunks"),
    lambda value: columns.all_of(value, is_sentence),
    lambda value: columns.some_of(value, lambda each: columns.has_keys(each, SENTENCE, SENTENCE_LABEL)),
)
LABEL = Role(
    "the label of the whole text",
    ("label", "labels", "class", "is_correct", "correct", "toxic", "toxicity", "deceptive", "deception"),
    columns.is_label,
    columns.is_yes_or_no,
)
FORMATS = {  # the one whose columns there are is taken; of several the first
    "annotated": Format(
        annotated, 'the text, and a copy of it with its sections in ["label"]...["end-section"]', TEXT, COPY
    ),
    "spans": Format(spans, "the text, and a list of {start, end, label} in characters, or {text, label}", TEXT, SPANS),
    "messages": Format(
        messages,
        "turns of a chat, with spans or labels on those of the assistant",
        MESSAGES,
        Role(
            "spans or a label of the chat",
            (*SPANS.names, *LABEL.names),
            lambda value: SPANS.possible(value) or LABEL.possible(value),
            columns.never,
            required=False,
        ),
    ),
    "tokens": Format(tokens, "a list of words or tokens, and a list with a label for each", TOKENS, TAGS),
    "sentences": Format(sentences, "a list of {text, label}", SENTENCES, TAGS._replace(required=False)),
    "pooled": Format(pooled, "the text, and one label for the whole of it", TEXT, LABEL),
    "text": Format(text, "the text alone, with the labels that label_rules give it", TEXT, labelled=False),
}


def read_row(row: Row, number: int, format: Format, options: FormatOptions, *, name: str = "") -> Record | Refused:
    """Row `number` (from 0) as a Record, or Refused with the reason.

    Where the format names no id and no category, these are of the columns of `options`; a row without an id has the
    `name`, or else is named by its place (the first is `#1`).
    """
    given = row.get(options.id) if options.id else None
    id = (name or f"#{number + 1}") if given is None else str(given)
    category = "" if given is None else category_of(id)
    category = str(row.get(options.category)) if options.category else category
    try:
        if not is_unicode(id + category):
            raise Unusable("with an id or a category that is not Unicode")
        record = format.read(row, options)
        if not is_unicode(record.problem + record.response):
            raise Unusable("with text that is not Unicode")
        record = apply_rules(record, options.rules)
        return replace(record, id=record.id or id, category=record.category or category)
    except Unusable as why:
        return Refused(str(why), row.get(options.problem) if options.problem else None, id, category)


def category_of(id: str) -> str:
    """The kind of problem that an id names: the part before its number; nothing where it is a number alone."""
    return re.sub(r"[\W_]*\d+$", "", id)
