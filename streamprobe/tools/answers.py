"""A stream of what a model writes: the answers to some problems, again and again, each labelled by rules.

The answers of a batch are drawn from a seed that is made of the run's seed, the trip over the problems and the number
of the batch, and of nothing else.  So a stream goes on where another one stood without writing anew what came before,
and batches are the same whichever of several processes writes them: batch b is written by rank b mod W, and shared.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from streamprobe.data.annotations import Annotation
from streamprobe.data.label_rules import LabelRule, apply_rules
from streamprobe.data.problems import Problem
from streamprobe.data.prompts import encode_head, format_chat, format_prompt
from streamprobe.data.records import Record, Refused
from streamprobe.data.tokenize import TextOptions
from streamprobe.data.written import spell, written_as
from streamprobe.errors import InputError
from streamprobe.system.distributed import least, owner, share_bytes, world


class Asked(NamedTuple):
    """A problem as a model reads it."""

    problem: Problem
    head: str
    ids: Sequence[int]


def ask(problem: Problem | Refused, tokenizer: Any, text: TextOptions, *, most: int) -> Asked | Refused:
    """A problem as the model reads it in a run of these options; Refused if that is more than `most` tokens.

    Raises InputError for a chat template that is missing.
    """
    if isinstance(problem, Refused):
        return problem
    try:
        if problem.turns:
            head = format_chat(problem.turns, tokenizer, text.day)
        else:
            head = format_prompt(problem.text, text.prompt, tokenizer, text.day)
    except InputError:
        if text.prompt != "chat" or not tokenizer.chat_template:
            raise
        reason = "whose turns the chat template does not take"
        return Refused(reason, problem.text, problem.id, problem.category)
    ids, _ = encode_head(head, text.prompt, tokenizer, text.bos)
    if not 0 < len(ids) <= most:
        reason = f"with a prompt of more than {most:,} tokens, which leaves too little of the model's context"
        return Refused(reason if ids else "without a token to read", problem.text, problem.id, problem.category)
    return Asked(problem, head, ids)


def read_answer(asked: Asked, ids: Sequence[int], tokenizer: Any, rules: Sequence[LabelRule]) -> Record | Refused:
    """What a model wrote as these tokens, as a record with the labels of the rules; Refused if it is no text."""
    id, text, category, _ = asked.problem
    spelling = spell(tokenizer, asked.ids, ids)
    if not spelling.text.strip():
        return Refused("with an empty response", text, id, category)
    written = written_as(spelling, asked.head, ids)
    record = Record(spelling.text, Annotation([]), text, id, category, complete=True, written=written)
    return apply_rules(record, rules)


Ids = list[list[int]]  # of the answers of a batch


@dataclass(frozen=True)
class Author:
    """How answers come to be."""

    write: Callable[[Sequence[Asked], int], Ids]  # the ids of the answers to these, drawn from a seed
    read: Callable[[Asked, Sequence[int]], Record | Refused]  # the record of an answer
    batch_size: int  # answers that are written at once
    responses: int  # answers to each problem on a trip over them
    seed: int


class Answers:
    """The answers to some problems, without an end or for one trip over them: a `Stream`.

    A record's id is that of its problem and the number of the answer to it, from 0: `algebra_7/2`.  Problems that
    cannot be asked come first, as Refused.  All ranks are given all records.
    """

    def __init__(
        self,
        asked: Sequence[Asked | Refused],
        author: Author,
        *,
        trips: int | None = None,
        stopped: Callable[[], bool] = lambda: False,
    ):
        """`trips` over the problems (None: without an end).

        Once `stopped` is true, and it stays so, the stream ends, on all ranks; a batch in work is not given.

        Raises InputError where no problem can be asked.
        """
        self.asked = [each for each in asked if isinstance(each, Asked)]
        self.refused = [each for each in asked if isinstance(each, Refused)]
        self.author, self.trips, self.stopped = author, trips, stopped
        self.trip = self.batch = self.place = self.given = 0  # the last two: of the next record
        if not self.asked:
            reasons = ", ".join(sorted({each.reason for each in self.refused})) or "none at all"
            raise InputError(f"no problem that can be answered ({reasons})", "at least one", "use other data")

    def __iter__(self) -> Iterator[Record | Refused]:
        while self.given < len(self.refused):
            self.given += 1
            yield replace(self.refused[self.given - 1], row=self.given - 1)
        while self.trips is None or self.trip < self.trips:
            begun, useful = self.batch + self.place == 0, False
            while self.batch < self._n_batches:
                written = self._write_next()
                if written is None:
                    return
                for ids in written:
                    for record in self._records(ids):
                        useful |= isinstance(record, Record)
                        yield record
                    self.batch, self.place = self.batch + 1, 0
            if begun and not useful:
                raise InputError(
                    f"a model that answers none of {len(self.asked):,} problems with text",
                    "text to label",
                    "check --prompt and --model, or use other data",
                )
            self.trip, self.batch = self.trip + 1, 0

    def state(self) -> dict[str, Any]:
        """Where it stands: the trip, the batch, the place in it, the records given; and which problems they are of."""
        trip, batch, place = self.trip, self.batch, self.place
        if place and place == len(self._units(batch)):
            batch, place = batch + 1, 0
        return {"trip": trip, "batch": batch, "place": place, "given": self.given, "problems": self._digest()}

    def load(self, state: dict[str, Any]) -> None:
        """Goes on where the stream that gave `state` stood.  Raises InputError where the problems are others."""
        if state.get("problems") != self._digest():
            raise InputError(
                "other problems, or otherwise written, than those that the run began with",
                "the same ones",
                "give the run its own --data and --prompt",
            )
        self.trip, self.batch, self.place, self.given = (state[name] for name in ("trip", "batch", "place", "given"))

    def _digest(self) -> str:
        """What tells the prompts from others."""
        content = [[each.problem.id, each.head, list(each.ids)] for each in self.asked]
        return hashlib.sha256(json.dumps([content, len(self.refused)]).encode()).hexdigest()[:16]

    @property
    def _n_batches(self) -> int:
        """Batches of a trip."""
        return -(-len(self.asked) * self.author.responses // self.author.batch_size)

    def _units(self, batch: int) -> list[tuple[Asked, int]]:
        """What is answered in a batch, and which of the answers on this trip each is."""
        size, each = self.author.batch_size, self.author.responses
        places = range(batch * size, min((batch + 1) * size, len(self.asked) * each))
        return [(self.asked[place // each], place % each) for place in places]

    def _write_next(self) -> list[Ids] | None:
        """The next batches, one from each rank as far as there are so many; None where the stream is to end."""
        batches = range(self.batch, min(self.batch + world().size, self._n_batches))
        own: dict[int, Ids] = {}
        if not self.stopped():
            for batch in batches:
                if owner(batch) == world().rank:
                    own[batch] = self.author.write([asked for asked, _ in self._units(batch)], self._seed(batch))
        if not least(int(not self.stopped())):  # what was written when it was stopped is cut short
            return None
        return [json.loads(share_bytes(json.dumps(own.get(b)).encode(), owner(b))) for b in batches]

    def _seed(self, batch: int) -> int:
        """The seed of a batch."""
        words = f"{self.author.seed} {self.trip} {batch}".encode()
        return int.from_bytes(hashlib.sha256(words).digest()[:8], "big") >> 1

    def _records(self, written: Ids) -> Iterator[Record | Refused]:
        """The records of a batch from `place` on."""
        units = list(zip(self._units(self.batch), written, strict=True))
        for (asked, number), ids in units[self.place :]:
            record = self.author.read(asked, ids)
            name = f"{asked.problem.id}/{self.trip * self.author.responses + number}"
            row, self.place, self.given = self.given, self.place + 1, self.given + 1
            yield replace(record, id=name, row=row)
