"""What became of the chains that were read: printed and written, so that nothing is dropped silently."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from streamprobe.data.annotations import Section
from streamprobe.data.records import Record

NAMED = 10_000  # ids, or other texts of the data, that counts hold of a kind


@dataclass
class Counts:
    """What became of every chain and section that was read: printed and written, so nothing is dropped silently."""

    read: int = 0
    used: int = 0
    repaired: int = 0  # chains used with an edited or lost section, or a tag that is unbalanced or not understood
    edited_sections: int = 0
    lost_sections: int = 0
    unbalanced_tags: int = 0
    without_sections: int = 0  # chains that are used as negatives
    without_problem: int = 0  # chains that are used with an empty one
    refused: dict[str, list[str]] = field(default_factory=dict)  # reason -> ids of the chains
    markers: Counter[str] = field(default_factory=Counter)  # left out of a prompt, see `Chain` -> chains
    labels: Counter[str] = field(default_factory=Counter)  # label -> sections
    label_chains: Counter[str] = field(default_factory=Counter)  # label -> chains
    strange_tags: Counter[str] = field(default_factory=Counter)  # a tag whose form is not understood -> how often
    missing_spans: Counter[str] = field(default_factory=Counter)  # text that was marked and is not there -> how often
    unnamed: Counter[str] = field(default_factory=Counter)  # reason -> chains refused beside those whose ids are kept
    characters: int = 0
    labelled_characters: int = 0

    @property
    def n_refused(self) -> int:
        """How many chains were refused."""
        return sum(map(self.n_refused_for, self.refused))

    def n_refused_for(self, reason: str) -> int:
        """How many for one reason."""
        return len(self.refused[reason]) + self.unnamed[reason]

    def refuse(self, reason: str, id: str) -> None:
        """Counts a chain that is not used."""
        ids = self.refused.setdefault(in_any_file(reason), [])
        if len(ids) < NAMED:
            ids.append(in_any_file(id))
        else:
            self.unnamed[in_any_file(reason)] += 1

    def take_back(self, id: str, reason: str) -> None:
        """Counts a chain that was used as one that is not."""
        self.used -= 1
        self.refuse(reason, id)

    def use(self, record: Record, marker: str = "") -> None:
        """Counts a chain that is used."""
        found = record.annotation
        self.used += 1
        self.without_sections += not record.sections
        self.without_problem += not record.problem.strip()
        self.markers.update([marker] * bool(marker))
        self.repaired += bool(found.edited or found.lost or found.unbalanced or found.strange)
        self.edited_sections += found.edited
        self.lost_sections += found.lost
        self.unbalanced_tags += found.unbalanced
        self.labels.update(s.label for s in record.sections)
        self.label_chains.update({s.label for s in record.sections})
        _count(self.strange_tags, found.strange)
        _count(self.missing_spans, found.missing)
        self.characters += len(record.response)
        self.labelled_characters += len(record.response) if record.complete else _covered(record.sections)

    def as_dict(self) -> dict[str, Any]:
        """The counts as plain numbers and dicts."""
        return {name: dict(value) if isinstance(value, Counter) else value for name, value in vars(self).items()}

    @classmethod
    def of(cls, counted: Mapping[str, Any]) -> "Counts":
        """What `as_dict` gave."""
        counters = {each.name for each in fields(cls) if each.default_factory is Counter}
        values: dict[str, Any] = {name: Counter(n) if name in counters else n for name, n in counted.items()}
        return cls(**values)


def _count(counter: Counter[str], texts: Iterable[str]) -> None:
    """Counts texts, of which at most NAMED different ones are told apart."""
    for text in map(in_any_file, texts):
        if text in counter or len(counter) < NAMED:
            counter[text] += 1


def _covered(sections: Sequence[Section]) -> int:
    """Characters that are in one of the sections, which are in the order of the text."""
    covered = end = 0
    for section in sections:
        covered += max(0, section.end - max(end, section.start))
        end = max(end, section.end)
    return covered


def in_any_file(text: str) -> str:
    """Text in letters that every file takes: half characters (surrogates) are written as escapes."""
    return text.encode(errors="backslashreplace").decode()
