"""Problems that a model is to answer: rows of any data of which only the problem is needed."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from streamprobe.data import columns
from streamprobe.data.columns import Role, Table, listed
from streamprobe.data.file_types import Rows
from streamprobe.data.formats import ID, PROBLEM, TEXT, category_of
from streamprobe.data.messages import MESSAGES, is_turn, read_turn
from streamprobe.data.prompts import is_unicode
from streamprobe.data.records import Refused, Row, Unusable
from streamprobe.errors import InputError


class Problem(NamedTuple):
    """What a model is asked."""

    id: str
    text: str  # of turns all that they say but for the system's
    category: str = ""  # the kind of problem, to which results can be split
    turns: Sequence[Mapping[str, Any]] = ()  # of the chat that it is; none where it is a text


class Problems(NamedTuple):
    """The problems of some data, in their order, and the columns that they were found in."""

    found: list[Problem | Refused]
    problem_column: str
    id_column: str | None
    is_chat: bool  # whether some are turns, so that all go through the chat template

    @property
    def keys(self) -> dict[str, Any]:
        """The keys of a config that say where they are."""
        return {"problem_column": self.problem_column, "id_column": self.id_column}


def _is_asked(value: Any) -> bool:
    """Whether a value is a text or a list of turns."""
    return columns.is_text(value) or columns.some_of(value, is_turn)


ASKED = Role("a problem", (*PROBLEM.names, *MESSAGES.names, *TEXT.names), _is_asked, _is_asked)


def find_problems(
    rows: Rows,
    shown: str,
    *,
    problem: str | None = None,
    id: str | None = None,
    category: str | None = None,
    most: int | None = None,
) -> Problems:
    """The problem of each row, or Refused where it has none; at most so many of the rows, evenly spaced (None: all).

    A problem is a text, or turns of a chat, of which a last one of the assistant's is left out.  It lies in the column
    that is named, in one of a known name such as `problem`, `question`, `prompt` or `messages`, or in the only one that
    may hold it.  `id` and `category` are columns, as in `read_row`; `shown` names the data in errors.  Raises
    InputError where no column holds problems, and where one that is named is not there.
    """
    table = Table(rows)
    for key, name in {"problem": problem, "id": id, "category": category}.items():
        if name is not None and name not in table:
            fix, known = f"correct --{key}_column", f"one of {listed(map(repr, table.values))}"
            raise InputError(f"data {shown} without the column {name!r}", known, fix)
    id = table.find(ID, id, [problem, category])
    column = table.find(ASKED, problem, [id, category])
    if column is None:
        raise InputError(
            f"data {shown} with the columns {listed(map(repr, table.values))}",
            "a column with a problem to answer, such as 'problem', 'question', 'prompt' or 'messages'",
            "name it with --problem_column",
        )
    chosen = rows if most is None or most >= len(rows) else [rows[i] for i in _evenly(len(rows), most)]
    found = [_read(row, number, column, id=id, category=category) for number, row in enumerate(chosen)]
    is_chat = any(isinstance(each, Problem) and each.turns for each in found)
    return Problems(found, column, id, is_chat)


def _evenly(n: int, most: int) -> list[int]:
    return np.linspace(0, n - 1, most).astype(int).tolist()


def _read(row: Row, number: int, column: str, *, id: str | None, category: str | None) -> Problem | Refused:
    """The problem of row `number` (from 0), named as `formats.read_row` names a record."""
    given = row.get(id) if id else None
    name = f"#{number + 1}" if given is None else str(given)
    kind = str(row.get(category)) if category else category_of(name)
    try:
        turns = _turns_of(row.get(column))
        said = "\n\n".join(turn["content"] for turn in turns if turn["role"] != "system")
        text = said if turns else row[column]
        if not is_unicode(name + kind + text + "".join(turn["content"] for turn in turns)):
            raise Unusable("with text that is not Unicode")
        return Problem(name, text, kind, turns)
    except Unusable as why:
        return Refused(str(why), row.get(column), name, kind, number)


def _turns_of(value: Any) -> list[dict[str, Any]]:
    """The turns that a value asks with; none where it is a text.  Raises Unusable for what is neither."""
    if isinstance(value, str) and value.strip():
        return []
    if not columns.some_of(value, is_turn):
        raise Unusable("without a problem")
    turns = [read_turn(each) for each in value]
    turns = turns[:-1] if turns[-1]["role"] == "assistant" else turns
    if not any(turn["role"] == "user" for turn in turns):
        raise Unusable("without a turn of the user")
    return turns
