"""What every format makes of a row: a labelled text, or the reason why it is none."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from streamprobe.data.annotations import NAMES, Annotation, Section, merge_overlaps

Row = Mapping[str, Any]  # a row of a data set, by column


class FormatOptions(NamedTuple):
    """Which columns hold what, and how a format reads them."""

    id: str | None = "task_id"
    problem: str | None = "problem"
    response: str = "reasoning_chain"  # what is read: text, or a list of turns, tokens or sentences
    annotation: str | None = "annotated_chain"  # its labels
    category: str | None = None  # None: the id without its number
    rejoined: bool = False  # the annotated sections alone, joined by spaces, instead of the response as it was written
    label_names: Mapping[str, str] = NAMES  # labels that are called otherwise in the data -> what they are called here
    rules: Sequence[Any] = ()  # labels that the text itself gives: see `label_rules`
    yes_or_no: bool = True  # whether a label of 1 or 0 says yes or no, and is not the number of a class
    labelled: bool = True  # whether labels are wanted; else they are passed over, whatever they are


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
class Written:
    """A response as the tokens that a model wrote, which may be others than its tokenizer makes of the text."""

    head: str  # the text in front of the response, as the model read it
    ids: Sequence[int]  # of the response
    spans: Sequence[tuple[int, int]]  # the characters start .. end of the response that each covers; (0, 0) for none


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
    ruled: Sequence[Section] = ()  # sections that label rules give it
    everywhere: frozenset[str] = frozenset()  # the labels of these rules, which are known of all the text
    chat: Chat | None = None  # the conversation that the response is part of
    written: Written | None = None  # the tokens of the response, where a model wrote it for this run

    @property
    def sections(self) -> Sequence[Section]:
        """The labelled stretches of `response`, those of one label that overlap made one."""
        return merge_overlaps([*self.annotation.sections, *self.ruled]) if self.ruled else self.annotation.sections

    @property
    def origin(self) -> str:
        """What twins have in common: the problem, or the response where there is none."""
        return self.problem if self.problem.strip() else self.response


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
