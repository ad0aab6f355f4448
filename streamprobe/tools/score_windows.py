"""Many texts through the model, a window of them at a time, and what became of each."""

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from streamprobe.data.counts import in_any_file
from streamprobe.data.dataset import NOT_FINITE
from streamprobe.data.records import Record, Refused, Unusable
from streamprobe.data.tokenize import TextOptions
from streamprobe.errors import InputError
from streamprobe.model.blocks import context
from streamprobe.probes.base import Probes
from streamprobe.system.console import shows_progress
from streamprobe.tools.score import Encoded, encode, score_encoded
from streamprobe.tools.score_tables import ScoredRecord

TEXTS, TOKENS = 256, 2**16  # a window is full with so many texts, or so many of their tokens
NAMED = 10  # ids of texts that are not scored and are said, for each reason
SHOWN, AROUND = 20, 24  # lines of a summary; characters on both sides of the place that it shows


class Scorer(NamedTuple):
    """What scores texts."""

    model: Any
    tokenizer: Any
    probes: Probes
    options: TextOptions
    max_batch_tokens: int


@dataclass
class Tally:
    """What became of the texts so far, so that nothing is dropped silently; all of it can stand in JSON."""

    read: int = 0
    scored: int = 0
    tokens: int = 0
    without_problem: int = 0  # texts that are scored with an empty one
    left_out: dict[str, list[str]] = field(default_factory=dict)  # reason -> ids, the first few
    n_left_out: dict[str, int] = field(default_factory=dict)  # reason -> how many

    @classmethod
    def of(cls, state: Any, path: Path) -> "Tally":
        """The tally whose `as_dict` a beginning of the file at `path` holds.  Raises InputError for what is none."""
        if state is None:
            return cls()
        usual = {name: type(value) for name, value in cls().as_dict().items()}
        if not isinstance(state, dict) or {name: type(value) for name, value in state.items()} != usual:
            raise InputError(f"{path} with a damaged beginning", "one that score wrote", "remove it, and start anew")
        return cls(**state)

    def leave_out(self, record: Record | Refused, reason: str) -> None:
        """Counts a text that is not scored."""
        self.n_left_out[reason] = self.n_left_out.get(reason, 0) + 1
        names = self.left_out.setdefault(reason, [])
        if len(names) < NAMED:
            names.append(in_any_file(record.id))

    def use(self, scored: ScoredRecord) -> None:
        """Counts a text that is scored."""
        self.scored += 1
        self.tokens += len(scored.text.tokens)
        self.without_problem += not scored.record.problem.strip()

    def as_dict(self) -> dict[str, Any]:
        """What `Tally(**...)` is made of again."""
        return asdict(self)

    def lines(self, prompt: str) -> list[str]:
        """In words: how many texts and tokens, and which texts are not scored and why."""
        said = [f"{self.scored:,} of {self.read:,} texts scored, {self.tokens:,} tokens"]
        if self.without_problem and (prompt == "chat" or "{problem}" in prompt):
            said.append(f"{self.without_problem:,} of these have no problem: the prompt stands around an empty one")
        for reason, names in self.left_out.items():
            n = self.n_left_out[reason]
            more = f" and {n - len(names):,} more" if n > len(names) else ""
            said.append(f"not scored: {n:,} {'text' if n == 1 else 'texts'} {reason}: {', '.join(names)}{more}")
        return said


def score_records(records: Sequence[Record | Refused], scorer: Scorer, tally: Tally) -> Iterator[list[ScoredRecord]]:
    """Windows of the records behind the first `tally.read`, scored, in their order; `tally` is kept true to them.

    Within a window texts of like length are read together; windows, and with them every number, are the same for any
    place at which it was begun between two of them.
    """
    most = context(scorer.model.config)
    hidden = not shows_progress()
    with tqdm(total=len(records), initial=tally.read, desc="score", unit="text", disable=hidden, leave=False) as bar:
        while tally.read < len(records):
            window, encoded = list[Record](), list[Encoded]()
            while tally.read < len(records) and len(window) < TEXTS and sum(map(_length, encoded)) < TOKENS:
                record = records[tally.read]
                tally.read += 1
                try:
                    if isinstance(record, Refused):
                        raise Unusable(record.reason)
                    encoded.append(encode(record, scorer.tokenizer, scorer.options, most))
                    window.append(record)
                except Unusable as why:
                    tally.leave_out(record, str(why))
                    bar.update()
            found = score_encoded(encoded, scorer.model, scorer.probes, scorer.max_batch_tokens, on_text=bar.update)
            yield _finite(list(map(ScoredRecord, window, found, [each.read for each in encoded])), tally)


def _length(text: Encoded) -> int:
    return len(text.chain.ids)


def _finite(window: Sequence[ScoredRecord], tally: Tally) -> list[ScoredRecord]:
    """Those whose activations are numbers, counted."""
    finite = []
    for each in window:
        if each.text.probabilities.isfinite().all():
            tally.use(each)
            finite.append(each)
        else:
            tally.leave_out(each.record, NOT_FINITE)
    return finite


class Peak(NamedTuple):
    """A text in a summary: the first ones of a sorted list have the highest probabilities."""

    highest: float
    order: int  # less the row: of equals the first text comes first
    id: str
    tokens: int
    alarms: int  # how often the alarm begins
    where: str  # the text around the token of the highest probability


class Summary:
    """The texts at which a single probe gives the highest probabilities, whatever the number of texts."""

    def __init__(self, alarm: float):
        self.alarm, self.peaks, self.alarmed = alarm, list[Peak](), 0

    def add(self, scored: ScoredRecord) -> None:
        """Takes in a text."""
        record, found = scored.record, scored.text.probabilities.flatten()
        on = (found >= self.alarm).int()
        begins = int(on[0] + (on.diff() > 0).sum())
        self.alarmed += begins > 0
        at = int(found.argmax())
        start, end = (max(0, place) for place in scored.text.offsets[at].tolist())
        before, after = scored.read[max(0, start - AROUND) : start], scored.read[end : end + AROUND]
        where = " ".join(f"{before}▲{scored.read[start:end]}{after}".split())
        peak = Peak(float(found[at]), -record.row, record.id, len(found), begins, where)
        (heapq.heappush if len(self.peaks) < SHOWN else heapq.heappushpop)(self.peaks, peak)

    def lines(self) -> list[str]:
        """A line for each of the texts."""
        peaks = sorted(self.peaks, reverse=True)
        names = [" ".join(peak.id.split())[:AROUND] for peak in peaks]
        width = max([len("text"), *map(len, names)])
        head = f"{'text':<{width}}  tokens  highest  alarms  ▲ where it is highest"
        return [head] + [
            f"{name:<{width}}  {peak.tokens:>6,}  {peak.highest:>7.3f}  {peak.alarms:>6,}  {peak.where}"
            for name, peak in zip(names, peaks, strict=True)
        ]
