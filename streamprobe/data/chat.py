"""Where in the text that a chat template writes the turns are: never by tokenising pieces of it."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from streamprobe.data.alignment import fold
from streamprobe.data.annotations import align
from streamprobe.data.prompts import render_chat
from streamprobe.data.records import Chat, Unusable
from streamprobe.errors import InputError

STAND_IN = (
    "\ue000{}\ue001"  # for what a turn says, where the template's own text is asked for: letters that no text has
)
FIELDS = ("reasoning_content", "thinking", "reasoning", "content")  # of a turn, in the order in which they are written


class Placed(NamedTuple):
    """Characters start .. end of a rendered text that one field of a turn says."""

    turn: int
    front: int  # where the template's own text in front of them begins
    start: int
    end: int


class RenderedChat(NamedTuple):
    """The text of a chat, and where in it each character is that the assistant says."""

    text: str
    place: np.ndarray  # [len(response)] int64: where in `text`, or -1 where the template left it out
    pieces: list[Placed]  # those of the assistant that were found, in the order of the text


class _Said(NamedTuple):
    """What one field of a turn says."""

    turn: int
    field: str
    text: str


def place_chat(chat: Chat, response: str, tokenizer: Any, day: str | None = None) -> RenderedChat:
    """Renders a chat and finds in it what the assistant says: `response` holds it piece by piece, see `Chat`.

    The template's own text between the turns is learnt by rendering stand-ins for all that the turns say; where a
    template writes something else for those, each is looked for behind the one before it.  What a template changes is
    aligned, what it leaves out (such as the thoughts of earlier turns) has no place.  Raises Unusable for turns that
    the template does not take, and InputError where there is no template.
    """
    tools = {"tools": chat.tools} if chat.tools else {}

    def render(messages: Sequence[Any]) -> str:
        return render_chat(messages, tokenizer, day, **tools)

    try:
        text = render(chat.messages)
    except InputError as error:
        if not tokenizer.chat_template:
            raise
        raise Unusable(f"whose turns the chat template does not take ({error.__cause__})") from error
    said = list(_all_said(chat))
    found = _between_stand_ins(text, said, chat, render) or _one_after_another(text, said)
    place = np.full(len(response), -1, dtype=np.int64)
    pieces = []
    front = 0
    for each, (start, end) in zip(said, found, strict=True):
        own = next((p for p in chat.pieces if (p.turn, p.field) == (each.turn, each.field)), None)
        if own is not None and end > start:
            place[own.start : own.end] = _places(each.text, text[start:end], start)
            pieces.append(Placed(each.turn, front, start, end))
        front = max(front, end)
    return RenderedChat(text, place, pieces)


def _all_said(chat: Chat) -> Iterator[_Said]:
    """What every turn says, whoever's it is, in the order in which templates write it."""
    for turn, message in enumerate(chat.messages):
        for field in FIELDS:
            if isinstance(message.get(field), str) and message[field]:
                yield _Said(turn, field, message[field])


def _between_stand_ins(text: str, said: Sequence[_Said], chat: Chat, render: Any) -> list[tuple[int, int]] | None:
    """Start and end of what is said, between the template's own texts; None where stand-ins give others."""
    messages = [dict(message) for message in chat.messages]
    for number, each in enumerate(said):
        messages[each.turn][each.field] = STAND_IN.format(number)
    try:
        pattern = render(messages)
    except InputError:
        return None
    found, cursor = [], 0
    for number, each in enumerate(said):
        before, stand_in, pattern = pattern.partition(STAND_IN.format(number))
        own = before if number == 0 or stand_in else ""
        if not text.startswith(own, cursor):
            return None
        cursor += len(own)
        if not stand_in:  # the template leaves this one out
            return None
        behind = pattern.partition(STAND_IN.format(number + 1))[0]
        changed = text.find(behind, cursor) if behind else -1
        end = next((cursor + len(c) for c in _written(each.text) if text.startswith(c + behind, cursor)), changed)
        if end < 0:
            return None
        found.append((cursor, end))
        cursor = end
    return found if text[cursor:] == pattern else None


def _written(text: str) -> list[str]:
    """How a template may write what is said."""
    return list(dict.fromkeys((text, text.strip(), text.lstrip(), text.rstrip(), text.strip("\n"))))


def _one_after_another(text: str, said: Sequence[_Said]) -> list[tuple[int, int]]:
    """Start and end of what is said, each behind the one before; of what is not found an end at its start."""
    found, cursor = [], 0
    for each in said:
        start, end = next(
            ((at, at + len(c)) for c in _written(each.text) if c and (at := text.find(c, cursor)) >= 0), (-1, -1)
        )
        if start < 0:
            start, end = _aligned(each.text, text, cursor)
        found.append((start, end))
        cursor = end
    return found


def _aligned(said: str, text: str, cursor: int) -> tuple[int, int]:
    """Where a changed copy of what is said is in the text behind the cursor, if at least half of it is there."""
    first, last = align(said, text[cursor:])
    hits = np.flatnonzero(first >= 0)
    if 2 * len(hits) < len("".join(fold(said).text.split())):
        return cursor, cursor
    return cursor + int(first[hits[0]]), cursor + int(last[hits[-1]]) + 1


def _places(said: str, written: str, start: int) -> np.ndarray:
    """For each character of what is said its place in a text that holds `written` at `start`, or -1: [len(said)]."""
    if said == written:
        return start + np.arange(len(said))
    left = said.find(written)
    if left >= 0:
        places = np.full(len(said), -1, dtype=np.int64)
        places[left : left + len(written)] = start + np.arange(len(written))
        return places
    first, _ = align(said, written)
    alike = 2 * int((first >= 0).sum()) >= len("".join(written.split()))
    return np.where((first >= 0) & alike, start + first, -1)
