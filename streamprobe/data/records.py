"""What every format makes of a row: a labelled text, or the reason why it is none."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from streamprobe.data.annotations import Annotation, Section

Row = Mapping[str, Any]  # a row of a data set, by column


class Piece(NamedTuple):
    """Characters start .. end of a record's response: what the assistant says in one field of one turn of a chat."""

    turn: int
    start: int
    end: int
    field: str = "content"


@dataclass(frozen=True)
class Chat:
    """A conversation as the tokenizer's chat template takes it."""

    messages: Sequence[Mapping[str, Any]]  # a role and a content each
    pieces: Sequence[Piece]  # of the record's response, in its order
    tools: Any = None  # that the assistant may call, as the template takes them


@dataclass(frozen=True)
class Record:
    """One labelled text: what every format makes of a row."""

    response: str  # what the model wrote; of a chat all that the assistant says
    annotation: Annotation  # its sections, in characters of `response`, and what had to be repaired
    problem: str = ""  # what came before it; of a chat the text of the turns before the assistant's first one
    id: str = ""
    category: str = ""  # the kind of problem, to which results can be split
    row: int = 0  # which of the records that are read, from 0: see `sources.read_records`
    complete: bool = False  # whether text in no section is known to have no label
    everywhere: frozenset[str] = frozenset()  # labels that are known of all the text, such as those of label rules
    chat: Chat | None = None  # the conversation that the response is part of

    @property
    def sections(self) -> Sequence[Section]:
        """The labelled stretches of `response`."""
        return self.annotation.sections


@dataclass(frozen=True)
class Refused:
    """A row that is no Record; the problem in its column still counts in the split, so that it moves no other."""

    reason: str
    problem: object = ""
    id: str = ""
    category: str = ""
    row: int = 0


class Unusable(Exception):
    """Raised by a format for a row that it cannot use; the message is the reason under which the row is counted."""
