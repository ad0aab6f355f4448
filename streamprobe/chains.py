"""Annotated text -> token ids and label arrays; and the split.

Shapes: T tokens in a chain, C labels.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from streamprobe.annotations import Section, annotate
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


@dataclass
class Counts:
    """What became of every chain and section that was read: printed and written, so nothing is dropped silently."""

    read: int = 0
    used: int = 0
    repaired: int = 0  # chains with an edited or lost section or an unbalanced tag, used all the same
    edited_sections: int = 0
    lost_sections: int = 0
    unbalanced_tags: int = 0
    refused: Counter[str] = field(default_factory=Counter)  # reason -> chains
    labels: Counter[str] = field(default_factory=Counter)  # label -> sections
    characters: int = 0
    labelled_characters: int = 0

    def as_dict(self) -> dict[str, Any]:
        """The counts as plain numbers and dicts."""
        return {name: dict(value) if isinstance(value, Counter) else value for name, value in vars(self).items()}


def fetch(data: str, sha256: str | None = None) -> str:
    """A local copy of a URL (in the `datasets` cache) or `data` itself; with `sha256`, checks the file's digest."""
    from datasets import DownloadManager

    if "://" in data:
        try:
            path = DownloadManager().download(data)
        except (OSError, ConnectionError) as error:
            raise InputError(
                f"data {data}: {error}", "a URL that can be downloaded", "check the URL and the network"
            ) from None
    else:
        path = data
    if sha256:
        got = hashlib.sha256(Path(path).read_bytes()).hexdigest()
        if got != sha256:
            raise InputError(
                f"data {data} with SHA-256 {got}",
                sha256,
                "download it again, or change data_sha256 if the change is meant",
            )
    return str(path)


def read_rows(data: str, split: str, columns: Sequence[str], sha256: str | None = None) -> list[dict[str, Any]]:
    """The rows of a JSON, JSON-lines or parquet file, a URL of one, or a data set on the hub.

    Rows are streamed, so that no converted copy is cached.  Raises InputError where the data cannot be read or a
    column of `columns` is missing.
    """
    from datasets import load_dataset, logging
    from datasets.exceptions import DatasetsError

    logging.set_verbosity(logging.CRITICAL)  # what goes wrong is told below, once
    suffix = Path(data.split("?")[0]).suffix
    local = suffix in (".json", ".jsonl", ".parquet")
    if sha256 and not local:
        raise InputError(f"data_sha256 with the data set {data}", "a file to check", "drop data_sha256")
    if local and "://" not in data and not Path(data).is_file():
        raise InputError(f"data {data}, which does not exist", "an existing file", "check the path")
    try:
        if local:
            kind = "parquet" if suffix == ".parquet" else "json"
            rows = list(load_dataset(kind, data_files=fetch(data, sha256), split="train", streaming=True))
        else:
            rows = list(load_dataset(data, split=split, streaming=True))
    except (DatasetsError, OSError, ValueError, StopIteration) as error:  # an empty file ends in the last one
        if isinstance(error, InputError):
            raise
        cause = error.__cause__ or error
        raise InputError(
            f"data {data}, which cannot be read ({type(cause).__name__}: {cause})",
            "a JSON list, JSON lines or parquet file with one chain a row, a URL of one, or a data set on the hub",
            "check the file's content, or the id and the network",
        ) from None
    if not rows:
        raise InputError(f"data {data} with no rows", "one chain a row", "check the file")
    for column in columns:
        if column not in rows[0]:
            raise InputError(
                f"data {data} without the column {column!r}",
                f"one of {', '.join(map(repr, rows[0]))}",
                "name the columns with --problem_column, --response_column, --annotation_column and --id_column",
            )
    return rows


def make_record(id: str, problem: object, response: object, annotated: object, counts: Counts) -> Record | str:
    """One row as a Record, or the reason why it is refused; counts both."""
    if not (isinstance(problem, str) and isinstance(response, str) and isinstance(annotated, str)):
        return "a field is missing or not text"
    if not response.strip():
        return "empty response"
    found = annotate(annotated, response)
    if not found.sections:
        return "no section found in the response"
    counts.repaired += bool(found.edited or found.lost or found.unbalanced)
    counts.edited_sections += found.edited
    counts.lost_sections += found.lost
    counts.unbalanced_tags += found.unbalanced
    counts.labels.update(s.label for s in found.sections)
    counts.characters += len(response)
    counts.labelled_characters += sum(s.end - s.start for s in found.sections)
    return Record(id, problem, response, found.sections)


def split_chains(
    problems: Sequence[str], test_share: float = 0.2, validation_share: float = 0.1, seed: int = 42
) -> list[str]:
    """`train`, `validation`, `test` or `duplicate` for each chain.

    The test chains are the first `test_share` of numpy's `RandomState(seed).permutation`, as in the original
    experiment; the next ones, until `validation_share` of the rest is reached, are validation.  Chains that share a
    problem never cross: a twin of a validation problem is validation too, and a twin of a test problem is left out
    (`duplicate`), since the test set is the original's.
    """
    order = np.random.RandomState(seed).permutation(len(problems))
    n_test = int(len(problems) * test_share)
    where = [""] * len(problems)
    held_out = {problems[i] for i in order[:n_test]}
    for i in order[:n_test]:
        where[i] = "test"
    rest = [i for i in order[n_test:] if problems[i] not in held_out]
    validation = {problems[i] for i in rest[: round(len(rest) * validation_share)]}
    for i in order[n_test:]:
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


def tokenize(
    record: Record, tokenizer: Any, labels: Sequence[str], prompt: str, support: str, unlabelled: str
) -> Chain:
    """One record as token ids and label codes.

    A token takes the label of the section that holds its last character that is not white space (its last character,
    where all are), so a token that straddles a border belongs to the later section.  Text in no section is UNKNOWN
    (`unlabelled: ignore`) or OUTSIDE (`negative`).  The problem's tokens are neither samples nor labelled
    (`support: response`), or samples labelled OUTSIDE (`all`).  Special tokens are never either.  Where the tokenizer
    has a BOS token the ids start with exactly one.
    """
    head = format_prompt(record.problem, prompt, tokenizer)
    text = head + record.response
    encoded = tokenizer(text, add_special_tokens=prompt != "chat", return_offsets_mapping=True)
    ids, offsets = list(encoded["input_ids"]), list(encoded["offset_mapping"])
    bos = tokenizer.bos_token_id
    if bos is not None:
        lead = next((i for i, token in enumerate(ids) if token != bos), len(ids))
        ids, offsets = [bos, *ids[lead:]], [(0, 0), *offsets[lead:]]

    special = set(tokenizer.all_special_ids)
    of_char = np.full(len(text), -1 if unlabelled == "ignore" else -2, dtype=np.int64)  # which section, -2: negative
    of_char[: len(head)] = -1 if support == "response" else -2
    for number, section in enumerate(record.sections):
        of_char[len(head) + section.start : len(head) + section.end] = number

    codes = np.full((len(ids), len(labels)), UNKNOWN, dtype=np.int8)
    sample = np.zeros(len(ids), dtype=bool)
    seen = -1
    for t, (token, (start, end)) in enumerate(zip(ids, offsets, strict=True)):
        if token in special or start >= end:
            continue
        last = start + (len(text[start:end].rstrip()) or end - start) - 1
        if last < len(head) and support == "response":
            continue
        sample[t] = True
        number = of_char[last]
        if number == -1:
            continue
        codes[t] = OUTSIDE
        label = record.sections[number].label if number >= 0 else None
        if label in labels:
            codes[t, labels.index(label)] = INSIDE if number == seen else ONSET
        seen = number if number >= 0 else seen
    return Chain(record.id, torch.tensor(ids), torch.from_numpy(codes), torch.from_numpy(sample))


def load_chains(
    rows: Sequence[dict[str, Any]],
    fields: tuple[str, str, str, str],
    tokenizer: Any,
    labels: Sequence[str],
    context: int,
    prompt: str = "{problem}\n\n",
    support: str = "response",
    unlabelled: str = "ignore",
    shares: tuple[float, float] = (0.2, 0.1),
    split_seed: int = 42,
) -> tuple[dict[str, list[Chain]], Counts]:
    """Rows -> the chains of `train`, `validation` and `test`, and what became of each row.

    `fields` names the columns of id, problem, response and annotation; `shares` are those of `split_chains`.  The split
    is drawn over all rows, so that a refused chain moves no other.  Chains of more than `context` tokens are refused.
    """
    counts = Counts(read=len(rows))
    id_column, problem_column, response_column, annotation_column = fields
    where = split_chains([str(row[problem_column]) for row in rows], *shares, split_seed)
    splits: dict[str, list[Chain]] = {"train": [], "validation": [], "test": []}
    for row, split in zip(rows, where, strict=True):
        if split == "duplicate":
            counts.refused["with a problem of the test split"] += 1
            continue
        values = row[problem_column], row[response_column], row[annotation_column]
        record = make_record(str(row[id_column]), *values, counts)
        if isinstance(record, str):
            counts.refused[record] += 1
            continue
        chain = tokenize(record, tokenizer, labels, prompt, support, unlabelled)
        if len(chain.ids) > context:
            counts.refused[f"longer than the model's context of {context:,} tokens"] += 1
            continue
        counts.used += 1
        splits[split].append(chain)
    return splits, counts


def fingerprint(splits: dict[str, list[Chain]]) -> str:
    """SHA-256 of everything that is fed: token ids, labels and support of every chain, by split."""
    digest = hashlib.sha256()
    for name, chains in splits.items():
        digest.update(name.encode())
        for c in chains:
            for tensor in (c.ids, c.codes, c.support):
                digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()
