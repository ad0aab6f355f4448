"""One record as token ids and label codes.

Shapes: T tokens in a chain, C labels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from streamprobe.data.formats import Record
from streamprobe.data.prompts import encode, open_response, special_ids
from streamprobe.lags import INSIDE, ONSET, OUTSIDE, UNKNOWN


class TextOptions(NamedTuple):
    """How a record becomes the text that the model reads, and which of its tokens count: keys of the config."""

    prompt: str = "{problem}\n\n"  # see `prompts.format_prompt`
    support: str = "response"  # see `tokenize`, as for the next one
    unlabelled: str = "ignore"
    bos: bool = True  # whether a chain begins with the BOS token
    day: str | None = None  # that a chat template writes, YYYY-MM-DD; none is today


AS_TEXT = TextOptions()


@dataclass(frozen=True)
class Chain:
    """One annotated chain as the model sees it."""

    id: str
    ids: Tensor  # [T] int64
    codes: Tensor  # [T, C] int8, see `lags`
    support: Tensor  # [T] bool: may this token be a sample?
    start: int = 0  # the first token of the response
    category: str = ""  # the kind of problem, to which results can be split
    row: int = 0  # which of the data
    marker: str = ""  # with which the prompt ends and the response begins; it was left out of the prompt


class Characters(NamedTuple):
    """What is known of every character of a text."""

    known: np.ndarray  # [characters] bool: whether its labels are known
    section: np.ndarray  # [characters, C] int64: the number of each label's section, or -1


class Rendered(NamedTuple):
    """A record as the model reads it: the text, and its tokens with the characters start .. end that each covers."""

    text: str
    ids: list[int]  # [T]
    offsets: list[tuple[int, int]]  # [T] into `text`; (0, 0) for a token that stands for none of it
    head: int  # characters before the response
    marker: str  # with which the prompt ends and the response begins; it was left out of the prompt


def render(record: Record, tokenizer: Any, options: TextOptions = AS_TEXT) -> Rendered:
    """The text of a record with its prompt, and its tokens.  Raises InputError as `prompts.open_response` does."""
    head, marker = open_response(record.problem, record.response, options.prompt, tokenizer, day=options.day)
    text = head + record.response
    return Rendered(text, *encode(text, options.prompt, tokenizer, options.bos), len(head), marker)


def tokenize(record: Record, tokenizer: Any, labels: Sequence[str], options: TextOptions = AS_TEXT) -> Chain:
    """One record as token ids and label codes for each of `labels`.

    A token takes the labels of the sections that hold its last character that is not white space (its last character,
    where all are), so a token that straddles a border belongs to the later section.  Text in no section is UNKNOWN
    (`unlabelled: ignore`) or OUTSIDE (`negative`).  The problem's tokens are neither samples nor labelled
    (`support: response`), or samples labelled OUTSIDE (`all`).  Special tokens are never either.
    """
    text, ids, offsets, head, marker = render(record, tokenizer, options)
    characters = _label_characters(record, head, labels, options)
    special = special_ids(tokenizer)
    codes = np.full((len(ids), len(labels)), UNKNOWN, dtype=np.int8)
    sample = np.zeros(len(ids), dtype=bool)
    seen, first = [-1] * len(labels), len(ids)
    for t, (token, (start, end)) in enumerate(zip(ids, offsets, strict=True)):
        if token in special or start >= end:
            continue
        last = start + (len(text[start:end].rstrip()) or end - start) - 1
        if last >= head:
            first = min(first, t)
        elif options.support == "response":
            continue
        sample[t] = True
        if characters.known[last]:
            codes[t] = _codes_at(characters.section[last].tolist(), seen)
    tensors = torch.tensor(ids), torch.from_numpy(codes), torch.from_numpy(sample)
    return Chain(record.id, *tensors, first, record.category, record.row, marker)


def _label_characters(record: Record, head: int, labels: Sequence[str], options: TextOptions) -> Characters:
    """The labels of the characters of a prompt of `head` characters and the response behind it."""
    size = head + len(record.response)
    known = np.full(size, options.unlabelled == "negative")
    known[:head] = options.support == "all"
    section = np.full((size, len(labels)), -1, dtype=np.int64)
    for number, (label, begin, stop) in enumerate(record.sections):
        known[head + begin : head + stop] = True
        if label in labels:
            section[head + begin : head + stop, labels.index(label)] = number
    return Characters(known, section)


def _codes_at(numbers: Sequence[int], seen: list[int]) -> list[int]:
    """The code of each label [C] at a token in the sections `numbers`; `seen` are the last ones, brought up to date."""
    codes = []
    for c, number in enumerate(numbers):
        codes.append(OUTSIDE if number < 0 else INSIDE if number == seen[c] else ONSET)
        seen[c] = number if number >= 0 else seen[c]
    return codes
