"""The format `messages`: turns of a chat, with spans or labels on what the assistant says in them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from streamprobe.data import columns
from streamprobe.data.annotations import Annotation, Section, merge_overlaps
from streamprobe.data.columns import Role
from streamprobe.data.prompts import is_unicode
from streamprobe.data.records import Chat, FormatOptions, Piece, Record, Row, Unusable
from streamprobe.data.spans import Span, find_spans, read_span
from streamprobe.data.values import Named, label_names_of

ROLES = {  # what others call the roles of a chat template
    **dict.fromkeys(("assistant", "gpt", "bot", "model", "chatgpt", "ai"), "assistant"),
    **dict.fromkeys(("human", "user"), "user"),
    "observation": "tool",
}
THOUGHTS = ("reasoning_content", "thinking", "reasoning")  # fields with what is thought before the content
LABELS = ("spans", "annotations", "annotation", "labels", "label")  # what a turn is labelled with
TURN = ("message", "message_index", "turn", "turn_index")  # with which a span of the row says which turn it is in


def is_chat(value: Any) -> bool:
    """Whether a value is a list of turns with one of the assistant's among them."""
    turns = value if columns.some_of(value, is_turn) else []
    return any(ROLES.get(str(turn.get("role", turn.get("from"))).lower()) == "assistant" for turn in turns)


def is_turn(value: Any) -> bool:
    """Whether a value is a turn of a chat: {role, content}, or {from, value}."""
    return columns.has_keys(value, ("role", "from"), ("content", "value", "tool_calls"))


MESSAGES = Role(
    "a list of turns, {role, content} each",
    ("messages", "conversation", "conversations", "chat", "dialogue", "dialog", "turns"),
    is_chat,
    is_chat,
)


class Marks(NamedTuple):
    """What labels a turn: spans of its content, and labels of all that it says."""

    spans: Sequence[Span] = ()
    labels: Sequence[Named] = ()


NO_MARKS = Marks()


@dataclass
class _Reader:
    """What is read of the assistant's turns, one after another."""

    names: Mapping[str, str]
    response: str = ""
    pieces: list[Piece] = field(default_factory=list)
    found: list[Annotation] = field(default_factory=list)

    def take(self, turn: int, message: Mapping[str, Any], marks: Sequence[Marks]) -> None:
        """Adds what a turn says, with its marks: the characters of spans are those of its content."""
        start = len(self.response)
        thought = next((name for name in THOUGHTS if isinstance(message.get(name), str)), None)
        if thought:
            self._add(turn, thought, message[thought])
        content = len(self.response)
        self._add(turn, "content", message["content"])
        for own in marks:
            self.mark(content, own.spans)
            for named in own.labels:
                sections = [Section(label, start, len(self.response)) for label in named.labels]
                self.found.append(Annotation(sections, names=named.given))

    def mark(self, start: int, spans: Sequence[Span]) -> None:
        """Adds spans of what was read from the character `start` on; text is looked for in contents."""
        within = [
            (max(p.start - start, 0), p.end - start) for p in self.pieces if p.field == "content" and p.end > start
        ]
        found = find_spans(self.response[start:], spans, self.names, within=within)
        moved = [Section(s.label, s.start + start, s.end + start) for s in found.sections]
        self.found.append(found._replace(sections=moved))

    def _add(self, turn: int, field: str, text: str) -> None:
        if text:
            self.pieces.append(Piece(turn, len(self.response), len(self.response) + len(text), field))
            self.response += text

    def annotation(self) -> Annotation:
        """All that was found."""
        return Annotation(
            merge_overlaps(section for each in self.found for section in each.sections),
            edited=sum(each.edited for each in self.found),
            lost=sum(each.lost for each in self.found),
            names=[name for each in self.found for name in each.names],
            missing=[text for each in self.found for text in each.missing],
        )


def messages(row: Row, options: FormatOptions) -> Record:
    """Turns of a chat; their labels lie in the turns, or in the column with the annotation.

    A turn has `spans` of its content, or a `label` of all that it says.  A row has spans, each with the number of its
    `message` where the assistant has several turns and the span is given in characters, or one label of the chat.
    """
    given = row.get(options.response)
    if not columns.some_of(given, is_turn):
        raise Unusable("with a chat that is no list of {role, content}")
    assert isinstance(given, list)
    turns = [read_turn(each) for each in given]
    own = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
    if not own:
        raise Unusable("without a turn of the assistant")
    of_turns, of_all = _marks_of_row(row, options, own) if options.labelled else ({}, [])
    reader = _Reader(options.label_names)
    for i in own:
        marks = _marks_of_turn(given[i], options) if options.labelled else NO_MARKS
        reader.take(i, turns[i], [marks, of_turns.get(i, NO_MARKS)])
    reader.mark(0, of_all)
    if not reader.response.strip():
        raise Unusable("with an empty response")
    if not is_unicode(json.dumps(turns, ensure_ascii=False, default=str)):
        raise Unusable("with text that is not Unicode")
    problem = "\n\n".join(turn["content"] for turn in turns[: own[0]] if turn["role"] != "system")
    chat = Chat(turns, reader.pieces, _tools_of(row.get("tools")))
    return Record(reader.response, reader.annotation(), problem, complete=True, chat=chat)


def read_turn(value: Mapping[str, Any]) -> dict[str, Any]:
    """A turn as a chat template takes it: a role and a content, and what else it has but for its labels.

    Raises Unusable for what is none.
    """
    rest = {name: value[name] for name in value if name not in (*LABELS, "role", "from", "content", "value")}
    role = value.get("role", value.get("from"))
    content = value.get("content", value.get("value"))
    if isinstance(content, list):  # of parts, as models that see pictures take them
        if not all(isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in content):
            raise Unusable("with a turn that holds something else than text")
        content = "".join(part["text"] for part in content)
    if not isinstance(role, str) or not isinstance(content, str | None):
        raise Unusable("with a turn without a role, or whose content is not text")
    return {"role": ROLES.get(role.lower(), role.lower()), "content": content or "", **_without_nothing(rest)}


def _without_nothing(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that hold something: a table has every field in every row."""
    return {name: value for name, value in fields.items() if value is not None and value != []}


def _marks_of_turn(value: Mapping[str, Any], options: FormatOptions) -> Marks:
    """What the fields of a turn label it with."""
    spans: list[Span] = []
    labels: list[Named] = []
    for name in LABELS:
        given = value.get(name)
        for each in given if isinstance(given, list) else [given]:
            if isinstance(each, Mapping | list):
                spans.append(read_span(each))
            elif each is not None:
                labels.append(label_names_of(each, name, options))
    return Marks(spans, labels)


def _marks_of_row(row: Row, options: FormatOptions, own: Sequence[int]) -> tuple[dict[int, Marks], list[Span]]:
    """What a row says of each of the assistant's turns `own`, and of all that they say together.

    Raises Unusable for spans of no turn.
    """
    given = row.get(options.annotation) if options.annotation else None
    if given is None:
        return {}, []
    if not isinstance(given, list) or not all(isinstance(each, Mapping | list) for each in given):
        return dict.fromkeys(own, Marks(labels=[label_names_of(given, options.annotation or "", options)])), []
    of_turns: dict[int, list[Span]] = {}
    of_all: list[Span] = []
    for each in given:
        turn = next((each[name] for name in TURN if name in each), None) if isinstance(each, Mapping) else None
        span = read_span(each)
        if turn is None and span.start is None:
            of_all.append(span)
        elif turn is None and len(own) > 1:
            raise Unusable("with a span without its message, where the assistant has several turns")
        elif turn is not None and turn not in own:
            raise Unusable("with a span in a message that is none of the assistant's")
        else:
            of_turns.setdefault(own[0] if turn is None else turn, []).append(span)
    return {turn: Marks(spans) for turn, spans in of_turns.items()}, of_all


def _tools_of(value: Any) -> Any:
    """The tools that a template is given; data sets often hold them as JSON."""
    if isinstance(value, str):
        try:
            return json.loads(value) or None
        except (ValueError, RecursionError):
            raise Unusable("with tools that are no JSON") from None
    return value or None
