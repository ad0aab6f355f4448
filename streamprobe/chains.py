"""Annotated text -> token ids and label arrays; and the split.

Shapes: T tokens in a chain, C labels.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from streamprobe.annotations import NAMES, Annotation, Section, annotate, check_names, rejoin
from streamprobe.errors import InputError
from streamprobe.lags import INSIDE, ONSET, OUTSIDE, UNKNOWN


@dataclass
class Record:
    """One annotated chain as text."""

    id: str
    problem: str
    response: str
    sections: list[Section]  # characters of `response`


@dataclass
class Chain:
    """One annotated chain as the model sees it."""

    id: str
    ids: Tensor  # [T] int64
    codes: Tensor  # [T, C] int8, see `lags`
    support: Tensor  # [T] bool: may this token be a sample?
    start: int = 0  # the first token of the response
    category: str = ""  # the kind of problem, to which results can be split


@dataclass
class Counts:
    """What became of every chain and section that was read: printed and written, so nothing is dropped silently."""

    read: int = 0
    used: int = 0
    repaired: int = 0  # chains used with an edited or lost section, or a tag that is unbalanced or not understood
    edited_sections: int = 0
    lost_sections: int = 0
    unbalanced_tags: int = 0
    refused: Counter[str] = field(default_factory=Counter)  # reason -> chains
    labels: Counter[str] = field(default_factory=Counter)  # label -> sections
    label_chains: Counter[str] = field(default_factory=Counter)  # label -> chains
    strange_tags: Counter[str] = field(default_factory=Counter)  # a tag whose form is not understood -> how often
    characters: int = 0
    labelled_characters: int = 0

    def use(self, record: Record, found: Annotation) -> None:
        """Counts a chain that is used."""
        self.used += 1
        self.repaired += bool(found.edited or found.lost or found.unbalanced or found.strange)
        self.edited_sections += found.edited
        self.lost_sections += found.lost
        self.unbalanced_tags += found.unbalanced
        self.labels.update(s.label for s in found.sections)
        self.label_chains.update({s.label for s in found.sections})
        self.strange_tags.update(found.strange)
        self.characters += len(record.response)
        self.labelled_characters += sum(end - start for start, end in {(s.start, s.end) for s in found.sections})

    def as_dict(self) -> dict[str, Any]:
        """The counts as plain numbers and dicts."""
        return {name: dict(value) if isinstance(value, Counter) else value for name, value in vars(self).items()}


class Reading(NamedTuple):
    """How a chain is read."""

    prompt: str = "{problem}\n\n"  # see `format_prompt`
    support: str = "response"  # see `tokenize`, as for the next two
    unlabelled: str = "ignore"
    bos: bool = True
    response: str = "original"  # or `rejoined`, see `make_record`
    label_names: Mapping[str, str] = NAMES  # labels that are called otherwise here


class Division(NamedTuple):
    """Which chains are for what."""

    test_share: float = 0.2
    validation_share: float = 0.1
    seed: int = 42
    test_categories: Sequence[str] | None = None  # the test chains are those of these categories
    validate_on_test: bool = False  # no validation chains but the test chains


READ, DIVIDED = Reading(), Division()


def make_record(
    id: str,
    problem: object,
    response: object,
    annotated: object,
    kind: str = "original",
    label_names: Mapping[str, str] = NAMES,
) -> tuple[Record, Annotation] | str:
    """One row as a Record beside what was found of its annotation, or the reason why the row is refused.

    kind: the response as it was written (`original`), or the annotated sections joined by spaces (`rejoined`).
    """
    if not (isinstance(problem, str) and isinstance(response, str) and isinstance(annotated, str)):
        return "with a field that is missing or not text"
    if any("\ud800" <= c <= "\udfff" for c in problem + (annotated if kind == "rejoined" else response)):
        return "with text that is not Unicode"
    if not response.strip():
        return "with an empty response"
    if kind == "rejoined":
        response, found = rejoin(annotated, response, label_names)
    else:
        found = annotate(annotated, response, label_names)
    if found.strange and not found.asked:
        return f"whose tags are all of a form that is not understood, such as {found.strange[0]}"
    if not found.sections:
        return "without a section that is found in the response"
    return Record(id, problem, response, found.sections), found


def category_of(id: str) -> str:
    """The kind of problem that an id names: the part before its number; nothing where it is a number alone."""
    return re.sub(r"[\W_]*\d+$", "", id)


def split_chains(
    problems: Sequence[str],
    test_share: float = 0.2,
    validation_share: float = 0.1,
    seed: int = 42,
    test: Sequence[bool] | None = None,
) -> list[str]:
    """`train`, `validation`, `test` or `duplicate` for each chain.

    The test chains are the first `test_share` of numpy's `RandomState(seed).permutation`, as in the original
    experiment; the next ones, until `validation_share` of the rest is reached, are validation.  Chains that share a
    problem never cross: a twin of a validation problem is validation too, and a twin of a test problem is left out
    (`duplicate`), since the test set is the original's.  With `test`, the test chains are those where it is True.
    """
    order = np.random.RandomState(seed).permutation(len(problems)).tolist()
    n_test = int(len(problems) * test_share)
    first = order[:n_test] if test is None else [i for i in order if test[i]]
    where = [""] * len(problems)
    for i in first:
        where[i] = "test"
    held_out = {problems[i] for i in first}
    others = [i for i in order if not where[i]]
    rest = [i for i in others if problems[i] not in held_out]
    validation = {problems[i] for i in rest[: round(len(rest) * validation_share)]}
    for i in others:
        where[i] = "duplicate" if problems[i] in held_out else "validation" if problems[i] in validation else "train"
    return where


def format_prompt(problem: str, prompt: str, tokenizer: Any) -> str:
    """The text before the response: `chat` is the tokenizer's chat template, all else a format string of {problem}."""
    if prompt != "chat":
        return prompt.replace("{problem}", problem)
    if not tokenizer.chat_template:
        raise InputError(
            "prompt: chat with a tokenizer that has no chat template",
            "a tokenizer with one",
            "use --prompt '{problem}\\n\\n' or another format string",
        )
    turn = [{"role": "user", "content": problem}]
    return tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)


def encode(text: str, prompt: str, tokenizer: Any, with_bos: bool) -> tuple[list[int], list[tuple[int, int]]]:
    """Token ids of a text that `format_prompt` began, and the characters start .. end that each covers.

    Where the tokenizer has a BOS token the ids start with exactly one, or with none if not `with_bos`.
    """
    encoded = tokenizer(text, add_special_tokens=prompt != "chat", return_offsets_mapping=True)
    ids, offsets = list(encoded["input_ids"]), list(encoded["offset_mapping"])
    bos = tokenizer.bos_token_id
    if bos is None:
        return ids, offsets
    lead = next((i for i, token in enumerate(ids) if token != bos), len(ids))
    return [bos] * with_bos + ids[lead:], [(0, 0)] * with_bos + offsets[lead:]


def tokenize(
    record: Record,
    tokenizer: Any,
    labels: Sequence[str],
    prompt: str,
    support: str,
    unlabelled: str,
    with_bos: bool = True,
) -> Chain:
    """One record as token ids and label codes.

    A token takes the labels of the sections that hold its last character that is not white space (its last character,
    where all are), so a token that straddles a border belongs to the later section.  Text in no section is UNKNOWN
    (`unlabelled: ignore`) or OUTSIDE (`negative`).  The problem's tokens are neither samples nor labelled
    (`support: response`), or samples labelled OUTSIDE (`all`).  Special tokens are never either.
    """
    head = format_prompt(record.problem, prompt, tokenizer)
    text = head + record.response
    ids, offsets = encode(text, prompt, tokenizer, with_bos)
    special = set(tokenizer.all_special_ids)
    known = np.full(len(text), unlabelled == "negative")  # whether a character's labels are known
    known[: len(head)] = support == "all"
    of_char = np.full((len(text), len(labels)), -1, dtype=np.int64)  # the number of each label's section
    for number, (label, begin, stop) in enumerate(record.sections):
        known[len(head) + begin : len(head) + stop] = True
        if label in labels:
            of_char[len(head) + begin : len(head) + stop, labels.index(label)] = number

    codes = np.full((len(ids), len(labels)), UNKNOWN, dtype=np.int8)
    sample = np.zeros(len(ids), dtype=bool)
    seen, first = [-1] * len(labels), len(ids)
    for t, (token, (start, end)) in enumerate(zip(ids, offsets, strict=True)):
        if token in special or start >= end:
            continue
        last = start + (len(text[start:end].rstrip()) or end - start) - 1
        if last >= len(head):
            first = min(first, t)
        elif support == "response":
            continue
        sample[t] = True
        if not known[last]:
            continue
        codes[t] = OUTSIDE
        for c, number in enumerate(of_char[last].tolist()):
            if number >= 0:
                codes[t, c] = INSIDE if number == seen[c] else ONSET
                seen[c] = number
    return Chain(record.id, torch.tensor(ids), torch.from_numpy(codes), torch.from_numpy(sample), first)


def load_chains(
    rows: Sequence[dict[str, Any]],
    fields: tuple[str, str, str, str],
    tokenizer: Any,
    labels: Sequence[str],
    context: int,
    reading: Reading = READ,
    division: Division = DIVIDED,
    category_column: str | None = None,
) -> tuple[dict[str, list[Chain]], Counts]:
    """Rows -> the chains of `train`, `validation` and `test`, and what became of each row.

    `fields` names the columns of id, problem, response and annotation; the category of a chain is in `category_column`,
    or else in its id.  The split is drawn over all rows, so that a refused chain moves no other.  Chains of more than
    `context` tokens are refused.  Raises InputError for a test category or a label's name that no row has.
    """
    counts = Counts(read=len(rows))
    id_column, problem_column, response_column, annotation_column = fields
    problems = [row.get(problem_column) for row in rows]  # a missing one is nobody's twin
    names = [p if isinstance(p, str) else f"row {i} has no problem" for i, p in enumerate(problems)]
    ids = [str(row.get(id_column)) for row in rows]
    kinds = [str(row.get(category_column)) for row in rows] if category_column else [category_of(id) for id in ids]
    where = split_chains(
        names,
        division.test_share,
        0.0 if division.validate_on_test else division.validation_share,
        division.seed,
        None if division.test_categories is None else _in_categories(kinds, division.test_categories),
    )
    splits: dict[str, list[Chain]] = {"train": [], "validation": [], "test": []}
    named: set[str] = set()
    progress = tqdm(rows, desc="align", unit="chain", delay=2, disable=None, leave=False)
    for row, id, kind, split in zip(progress, ids, kinds, where, strict=True):
        if split == "duplicate":
            counts.refused["with a problem of the test split"] += 1
            continue
        problem, response, annotated = (row.get(name) for name in (problem_column, response_column, annotation_column))
        made = make_record(id, problem, response, annotated, reading.response, reading.label_names)
        if isinstance(made, str):
            counts.refused[made] += 1
            continue
        named.update(made[1].names)
        chain = tokenize(made[0], tokenizer, labels, *reading[:4])
        chain.category = kind
        if len(chain.ids) > context:
            counts.refused[f"longer than the model's context of {context:,} tokens"] += 1
            continue
        counts.use(*made)
        splits[split].append(chain)
    check_names(reading.label_names, named)
    if division.validate_on_test:
        splits["validation"] = splits["test"]
    return splits, counts


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
