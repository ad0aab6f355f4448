"""Where in the text that a chat template writes the turns are: never by tokenising pieces of it."""

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np

from streamprobe.data.alignment import fold
from streamprobe.data.annotations import align
from streamprobe.data.prompts import render_chat
from streamprobe.data.records import Chat, Unusable
from streamprobe.errors import InputError

STAND_IN = "\ue000{}\ue001"  # for what a turn says, in letters that no text has
FIELDS = ("reasoning_content", "thinking", "reasoning", "content")  # of a turn, in the order in which they are written
TAGS = re.compile(r"\s*</?think(?:ing)?>\s*")  # at which templates take a content apart


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
    """What a turn says from character `start` of one of its fields on, up to the next tag or the end."""

    turn: int
    field: str
    start: int
    text: str


Place = tuple[int, int]  # start and end in the rendered text; equal for what is not in it


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
    found = _find(text, said, chat, render)
    place = np.full(len(response), -1, dtype=np.int64)
    pieces: list[Placed] = []
    front = 0
    for (turn, field), group in groupby(zip(said, found, strict=True), lambda each: each[0][:2]):
        parts = [(own, at) for own, at in group if at[1] > at[0]]
        piece = next((p for p in chat.pieces if (p.turn, p.field) == (turn, field)), None)
        if piece and parts:
            places = _places_of_field(response[piece.start : piece.end], text, parts, front)
            place[piece.start : piece.end] = places
            if places.max() >= 0:  # not where the template writes something else, such as capitals
                pieces.append(Placed(turn, front, int(places[places >= 0].min()), int(places.max()) + 1))
        front = max([front, *(end for _, (_, end) in parts)])
    return RenderedChat(text, place, pieces)


def _all_said(chat: Chat) -> Iterator[_Said]:
    """What every turn says, whoever's it is, in the order in which templates write it, without tags and blank text."""
    for turn, message in enumerate(chat.messages):
        for field in FIELDS:
            text, start = message.get(field), 0
            if isinstance(text, str):
                for tag in (*TAGS.finditer(text), None):
                    part = text[start : tag.start() if tag else len(text)]
                    if part.strip():
                        yield _Said(turn, field, start, part)
                    start = tag.end() if tag else start


def _find(text: str, said: Sequence[_Said], chat: Chat, render: Callable[[Sequence[Any]], str]) -> list[Place]:
    """Where in the text everything is that is said."""
    messages = [dict(message) for message in chat.messages]
    for number, each in reversed(list(enumerate(said))):  # from behind, so that places stay
        own = messages[each.turn][each.field]
        end = each.start + len(each.text)
        messages[each.turn][each.field] = own[: each.start] + STAND_IN.format(number) + own[end:]
    try:
        pattern = render(messages)
    except InputError:
        return _one_after_another(text, said, range(len(said)))
    there = [number for number in range(len(said)) if STAND_IN.format(number) in pattern]
    return _between_stand_ins(text, said, pattern, there) or _one_after_another(text, said, there)


def _between_stand_ins(text: str, said: Sequence[_Said], pattern: str, there: Collection[int]) -> list[Place] | None:
    """What is said between the template's own texts, learnt from a `pattern` with stand-ins for those `there`.

    None where the template's own texts are not the same as with stand-ins.
    """
    places: dict[int, Place] = {}
    cursor = 0
    for number in sorted(there, key=lambda number: pattern.index(STAND_IN.format(number))):
        before, _, pattern = pattern.partition(STAND_IN.format(number))
        if not text.startswith(before, cursor):
            return None
        cursor += len(before)
        behind = pattern.partition("\ue000")[0]
        changed = text.find(behind, cursor) if behind else -1
        own = _written(said[number].text)
        end = next((cursor + len(c) for c in own if text.startswith(c + behind, cursor)), changed)
        if end < 0:
            return None
        places[number] = (cursor, end)
        cursor = end
    if text[cursor:] != pattern:
        return None
    return [places.get(number, (0, 0)) for number in range(len(said))]


def _written(text: str) -> list[str]:
    """How a template may write what is said."""
    return list(dict.fromkeys((text, text.strip(), text.lstrip(), text.rstrip(), text.strip("\n"))))


def _one_after_another(text: str, said: Sequence[_Said], there: Collection[int]) -> list[Place]:
    """Everything that is said and is `there`, each behind the one before it."""
    found: list[Place] = []
    cursor = 0
    for number, each in enumerate(said):
        start = end = cursor
        if number in there:
            exact = ((text.find(c, cursor), len(c)) for c in _written(each.text))
            start, size = next(((at, size) for at, size in exact if at >= 0), (-1, 0))
            start, end = (start, start + size) if start >= 0 else _aligned(each.text, text, cursor)
        found.append((start, end))
        cursor = end
    return found


def _aligned(said: str, text: str, cursor: int) -> Place:
    """Where a changed copy of what is said is in the text behind the cursor, if at least half of it is there."""
    first, last = align(said, text[cursor:])
    hits = np.flatnonzero(first >= 0)
    if 2 * len(hits) < len("".join(fold(said).text.split())):
        return cursor, cursor
    return cursor + int(first[hits[0]]), cursor + int(last[hits[-1]]) + 1


def _places_of_field(said: str, text: str, parts: Sequence[tuple[_Said, Place]], front: int) -> np.ndarray:
    """For each character of a field its place in the text, or -1, given those of its parts: [len(said)].

    Tags and white space between parts, in front of the first and behind the last are where they stand in the text.
    """
    places = np.full(len(said), -1, dtype=np.int64)
    done, cursor = 0, front
    for own, (start, end) in parts:
        stop = own.start + len(own.text)
        places[own.start : stop] = _places(own.text, text[start:end], start)
        gap = said[done : own.start]
        if text[cursor:start].endswith(gap):
            places[done : own.start] = np.arange(start - len(gap), start)
        elif gap:
            places[done : own.start] = _places(gap, text[cursor:start], cursor)
        done, cursor = stop, end
    if text.startswith(said[done:], cursor):
        places[done:] = np.arange(cursor, cursor + len(said) - done)
    return places


def _places(said: str, written: str, start: int) -> np.ndarray:
    """For each character of what is said its place in a text that holds `written` at `start`, or -1: [len(said)]."""
    if said == written:
        return start + np.arange(len(said))
    left = said.find(written) if written else -1
    if left >= 0:
        places = np.full(len(said), -1, dtype=np.int64)
        places[left : left + len(written)] = start + np.arange(len(written))
        return places
    first, _ = align(said, written)
    alike = 2 * int((first >= 0).sum()) >= len("".join(written.split()))
    return np.where((first >= 0) & alike, start + first, -1)
