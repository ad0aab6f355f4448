"""Annotated text -> token ids and label arrays, by split.

Shapes: T tokens in a chain, C labels.
"""

import hashlib
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from streamprobe.data.annotations import NAMES, Annotation, check_names
from streamprobe.data.formats import Record, category_of, make_record
from streamprobe.data.prompts import is_unicode
from streamprobe.data.splits import split_chains
from streamprobe.data.tokenize import Chain, tokenize
from streamprobe.errors import InputError
from streamprobe.lags import Column, LagBuffer
from streamprobe.system.console import shows_progress


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
    characters: int = 0
    labelled_characters: int = 0

    @property
    def n_refused(self) -> int:
        """How many chains were refused."""
        return sum(map(len, self.refused.values()))

    def refuse(self, reason: str, id: str) -> None:
        """Counts a chain that is not used."""
        self.refused.setdefault(in_any_file(reason), []).append(in_any_file(id))

    def use(self, record: Record, found: Annotation, marker: str = "") -> None:
        """Counts a chain that is used."""
        self.used += 1
        self.without_sections += not found.sections
        self.without_problem += not record.problem.strip()
        self.markers.update([marker] * bool(marker))
        self.repaired += bool(found.edited or found.lost or found.unbalanced or found.strange)
        self.edited_sections += found.edited
        self.lost_sections += found.lost
        self.unbalanced_tags += found.unbalanced
        self.labels.update(s.label for s in found.sections)
        self.label_chains.update({s.label for s in found.sections})
        self.strange_tags.update(map(in_any_file, found.strange))
        self.characters += len(record.response)
        self.labelled_characters += sum(end - start for start, end in {(s.start, s.end) for s in found.sections})

    def as_dict(self) -> dict[str, Any]:
        """The counts as plain numbers and dicts."""
        return {name: dict(value) if isinstance(value, Counter) else value for name, value in vars(self).items()}


def in_any_file(text: str) -> str:
    """Text in letters that every file takes: half characters (surrogates) are written as escapes."""
    return text.encode(errors="backslashreplace").decode()


class Reading(NamedTuple):
    """How a chain is read."""

    prompt: str = "{problem}\n\n"  # see `format_prompt`
    support: str = "response"  # see `tokenize`, as for the next two
    unlabelled: str = "ignore"
    bos: bool = True
    response: str = "original"  # or `rejoined`, see `make_record`
    day: str | None = None  # on which a chat template is rendered, YYYY-MM-DD; none is today
    label_names: Mapping[str, str] = NAMES  # labels that are called otherwise here


class Division(NamedTuple):
    """Which chains are for what."""

    test_share: float = 0.2
    validation_share: float = 0.1
    seed: int = 42
    test_categories: Sequence[str] | None = None  # the test chains are those of these categories
    validate_on_test: bool = False  # no validation chains but the test chains
    by: str = "problem"  # or `chain`, see `split_chains`


READ, DIVIDED = Reading(), Division()
NOT_FINITE = "with activations that are infinite or not numbers"


def load_chains(
    rows: Sequence[dict[str, Any]],
    fields: tuple[str, str, str, str],
    tokenizer: Any,
    labels: Sequence[str],
    context: int,
    reading: Reading = READ,
    division: Division = DIVIDED,
    category_column: str | None = None,
    bad: Collection[int] = (),
    partial: bool = False,
) -> tuple[dict[str, list[Chain]], Counts]:
    """Rows -> the chains of `train`, `validation` and `test`, and what became of each row.

    `fields` names the columns of id, problem, response and annotation; the category of a chain is in `category_column`,
    or else in its id.  A row without an id is named by its place (the first is `#1`), one without a problem has an
    empty one.  The split is drawn over all rows, so that a refused chain moves no other.  Chains of more than `context`
    tokens are refused, and so are the rows `bad`, with whose activations something is wrong.  Raises InputError for a
    test category that no row has, and for a label's name unless the rows are a `partial` choice of the data's.
    """
    counts = Counts(read=len(rows))
    id_column, problem_column, *texts = fields
    ids = [f"#{i}" if (id := row.get(id_column)) is None else str(id) for i, row in enumerate(rows, 1)]
    kinds = [str(row.get(category_column)) for row in rows] if category_column else [category_of(id) for id in ids]
    where = _divide([row.get(problem_column) for row in rows], kinds, division)
    splits: dict[str, list[Chain]] = {"train": [], "validation": [], "test": []}
    named: set[str] = set()
    progress = tqdm(rows, desc="align", unit="chain", delay=2, disable=not shows_progress(), leave=False)
    for number, (row, id, kind, split) in enumerate(zip(progress, ids, kinds, where, strict=True)):
        made: str | tuple[Chain, Record, Annotation]
        if split == "duplicate":
            made = "with a problem of the test split"
        elif number in bad:
            made = NOT_FINITE
        elif not is_unicode(id + kind):
            made = "with an id or a category that is not Unicode"
        else:
            made = _make_chain(id, [row.get(name) for name in (problem_column, *texts)], tokenizer, labels, reading)
        if not isinstance(made, str) and len(made[0].ids) > context:
            made = f"longer than the model's context of {context:,} tokens"
        if isinstance(made, str):
            counts.refuse(made, id)
            continue
        chain, record, found = made
        chain.category, chain.row = kind, number
        named.update(found.names)
        counts.use(record, found, chain.marker)
        splits[split].append(chain)
    if not partial:
        check_names(reading.label_names, named)
    if division.validate_on_test:
        splits["validation"] = splits["test"]
    return splits, counts


def _make_chain(
    id: str, texts: Sequence[object], tokenizer: Any, labels: Sequence[str], reading: Reading
) -> tuple[Chain, Record, Annotation] | str:
    """The chain of a row, of its problem, response and annotation, and what it was made of; or why it is refused."""
    problem, response, annotated = texts
    problem = "" if problem is None else problem
    made = make_record(id, problem, response, annotated, reading.response, reading.unlabelled, reading.label_names)
    if isinstance(made, str):
        return made
    return tokenize(made[0], tokenizer, labels, *reading[:4], day=reading.day), *made


def _divide(problems: Sequence[object], kinds: Sequence[str], division: Division) -> list[str]:
    return split_chains(
        problems,
        test_share=division.test_share,
        validation_share=0.0 if division.validate_on_test else division.validation_share,
        seed=division.seed,
        by=division.by,
        test=None if division.test_categories is None else _in_categories(kinds, division.test_categories),
    )


def _in_categories(kinds: Sequence[str], chosen: Sequence[str]) -> list[bool]:
    strange = sorted(set(chosen) - set(kinds))
    if strange:
        known = ", ".join(sorted(set(kinds))[:20])
        raise InputError(
            f"test_categories {' '.join(strange)}, which no chain has", f"of {known}", "mend --test_categories"
        )
    return [kind in chosen for kind in kinds]


def fingerprint(splits: dict[str, list[Chain]]) -> str:
    """SHA-256 of everything that is fed: token ids, labels and support of every chain, by split."""
    digest = hashlib.sha256()
    for name, chains in splits.items():
        digest.update(name.encode())
        for c in chains:
            for tensor in (c.ids, c.codes, c.support):
                digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def count_tokens(
    chains: Sequence[Chain], columns: Sequence[Column], labels: Sequence[str]
) -> tuple[int, Tensor, Tensor]:
    """What `stream` will yield, without the model: its tokens, and valid tokens and positives of each column [K]."""
    buffer = LagBuffer(columns, labels)
    tokens, valid, positive = (
        0,
        torch.zeros(len(columns), dtype=torch.int64),
        torch.zeros(len(columns), dtype=torch.int64),
    )
    for c in chains:
        pairs = buffer.push(c.ids, c.codes, c.support, last=True)
        tokens += int(pairs.valid.any(1).sum())
        valid += pairs.valid.sum(0)
        positive += pairs.targets.sum(0)
    return tokens, valid, positive
