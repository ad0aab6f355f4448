"""Let the model of a run answer while its probes look on: one prompt, the rows of a file, or turns as they are typed.

Shapes: T tokens of a prompt.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from streamprobe.data.file_types import Rows
from streamprobe.data.messages import MESSAGES, is_turn, read_turn
from streamprobe.data.records import Unusable
from streamprobe.errors import InputError
from streamprobe.model.blocks import context
from streamprobe.model.sampling import Sampling
from streamprobe.probes.base import Probes
from streamprobe.system.console import say, shows_colour, typed_at_terminal, warn, write
from streamprobe.tools.generation import Pieces, PromptStyle, Turn
from streamprobe.tools.marked_text import as_json, for_terminal
from streamprobe.tools.watch import Mark, Step, alarm_threshold, marks, read_steps, watch

COLUMNS = ("problem", "prompt", *MESSAGES.names)  # in which a row's prompt is looked for


class Question(NamedTuple):
    """What the model is asked."""

    number: int  # from 1: which turn of a conversation, or row of a file
    text: str  # as it is shown
    ids: Tensor  # [T] what the model reads
    name: str = ""  # that is shown with it
    id: str | None = None  # of its row
    typed: bool = False  # at the terminal, where it stands already
    samples: Tensor | None = None  # [T] which of these probes that look back have read: see `watch`

    @property
    def keys(self) -> dict[str, object]:
        """What each line of JSON says of it."""
        return {"prompt": self.number} | ({} if self.id is None else {"id": self.id})


class Answer(NamedTuple):
    """What the model wrote, as it was marked."""

    question: Question
    marks: list[Mark]
    stopped: bool  # by Ctrl-C

    @property
    def text(self) -> str:
        """What was written."""
        return "".join(mark.text for mark in self.marks)


def users_turn(text: str) -> Turn:
    """Text as the turn of a user."""
    return {"role": "user", "content": text}


def turns_of(row: dict[str, Any], column: str) -> list[Turn]:
    """The turns that a row asks with: of `column`, or else of one of COLUMNS, a text or a list of chat messages.

    A last message of the assistant is left out: it is written anew.  Raises InputError for anything else.
    """
    names = dict.fromkeys((column, *COLUMNS))
    asked = next((row[name] for name in names if row.get(name) is not None), None)
    if asked is None:
        raise InputError("no prompt", "one in a column such as problem, prompt or messages", "name it so")
    if isinstance(asked, str) and asked.strip():
        return [users_turn(asked)]
    if isinstance(asked, list) and all(map(is_turn, asked)):
        try:
            turns: list[Turn] = [read_turn(each) for each in asked]
        except Unusable as why:
            got = f"the prompt {ascii(asked)[:60]}, {why}"
            raise InputError(got, "chat messages of a role and a text", "correct the row") from why
        turns = turns[:-1] if turns and turns[-1]["role"] == "assistant" else turns
        if any(turn["role"] == "user" for turn in turns):
            return turns
    expected = "some text, or chat messages of a role and a text, a user's among them"
    raise InputError(f"the prompt {ascii(asked)[:60]}", expected, "correct the row")


def questions_of(rows: Rows, style: PromptStyle, *, column: str, id_column: str) -> list[Question]:
    """What every row asks.  Raises InputError for the first that cannot be asked, by its number."""
    questions = []
    for number, row in enumerate(rows, 1):
        try:
            turns = turns_of(row, column)
            ids = style.encode(turns)
        except InputError as error:
            raise InputError(f"row {number} with {error.got}", error.expected, error.fix) from error
        shown = [turn["content"] if len(turns) == 1 else f"{turn['role']}: {turn['content']}" for turn in turns]
        id = None if row.get(id_column) is None else str(row[id_column])
        name = f"row {number}" + (f" ({id})" if id is not None else "")
        questions.append(Question(number, "\n".join(shown), ids, name, id, samples=style.samples(turns, ids)))
    return questions


def converse(turns: Iterable[str], style: PromptStyle, answer: Callable[[Question], Answer]) -> Iterator[Answer]:
    """The answer to each turn of a user, with what was said before in the model's context where the run has turns.

    A turn that cannot be asked, such as one that no longer fits, is reported in a line and forgotten.
    """
    before: list[Turn] = []
    for number, text in enumerate(turns, 1):
        said = [*before, users_turn(text)]
        try:
            ids = style.encode(said)
        except InputError as error:
            warn(f"streamprobe: {error}")
            continue
        typed, samples = typed_at_terminal(), style.samples(said, ids)
        given = answer(Question(number, text, ids, f"turn {number}", typed=typed, samples=samples))
        yield given
        if style.has_turns:
            before = [*said, {"role": "assistant", "content": given.text}]


@dataclass(frozen=True)
class Monitor:
    """A model that answers, and the probe at `place` that marks what it writes, token by token."""

    model: Any
    tokenizer: Any
    bank: Probes
    place: tuple[int, int]
    sampling: Sampling
    lines: bool = False  # whether a line of JSON is printed for each token, in place of the text

    def answer(self, question: Question) -> Answer:
        """Lets the model answer, and prints each token as it comes.  Ctrl-C stops it; a second one is raised.

        Sampling begins with the given seed at question 1, with the next one at question 2, and so on.
        """
        torch.manual_seed(self.sampling.seed + question.number - 1)
        room = context(self.model.config) - len(question.ids)
        if not (self.lines or question.typed):
            say("\n".join(["", *filter(None, [question.name]), question.text]))
        pieces, most = Pieces(self.tokenizer, question.ids.tolist()), min(self.sampling.max_new_tokens, room)
        shown, stopped = list[Mark](), False
        options: dict[str, Any] = {"samples": question.samples, **self.sampling.options}
        with closing(watch(self.model, self.bank, question.ids, most, **options)) as written:
            try:
                steps = self._printed(read_steps(written, self.bank, self.place, pieces), question)
                self._show(marks(steps, alarm_threshold(self.bank, self.place), pieces), shown)
            except KeyboardInterrupt as error:
                if isinstance(error.__context__, KeyboardInterrupt):  # the second came while the first was obeyed
                    raise
                stopped = True
        if not self.lines:
            say()
        return Answer(question, shown, stopped)

    def _printed(self, steps: Iterable[Step], question: Question) -> Iterator[Step]:
        """The steps, each printed as JSON on its way if these are wanted."""
        for position, step in enumerate(steps):
            if self.lines:
                write(as_json(step, question.keys, position))
            yield step

    def _show(self, found: Iterable[Mark], shown: list[Mark]) -> None:
        """Prints the marks unless JSON is, and appends them to `shown`."""
        colour = shows_colour()
        for mark in found:
            if not self.lines:
                write(for_terminal(mark, bool(shown) and shown[-1].alarm, colour))
            shown.append(mark)
