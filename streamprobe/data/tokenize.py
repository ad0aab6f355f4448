"""One record as token ids and label codes.

Shapes: T tokens in a chain, C labels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from streamprobe.data.formats import Record
from streamprobe.data.prompts import encode, open_response, special_ids
from streamprobe.lags import INSIDE, ONSET, OUTSIDE, UNKNOWN


@dataclass
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


def tokenize(
    record: Record,
    tokenizer: Any,
    labels: Sequence[str],
    prompt: str,
    support: str,
    unlabelled: str,
    with_bos: bool = True,
    day: str | None = None,
) -> Chain:
    """One record as token ids and label codes.

    A token takes the labels of the sections that hold its last character that is not white space (its last character,
    where all are), so a token that straddles a border belongs to the later section.  Text in no section is UNKNOWN
    (`unlabelled: ignore`) or OUTSIDE (`negative`).  The problem's tokens are neither samples nor labelled
    (`support: response`), or samples labelled OUTSIDE (`all`).  Special tokens are never either.  `day`: see
    `format_prompt`.
    """
    head, marker = open_response(record.problem, record.response, prompt, tokenizer, day)
    text = head + record.response
    ids, offsets = encode(text, prompt, tokenizer, with_bos)
    special = special_ids(tokenizer)
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
    return Chain(record.id, torch.tensor(ids), torch.from_numpy(codes), torch.from_numpy(sample), first, marker=marker)
