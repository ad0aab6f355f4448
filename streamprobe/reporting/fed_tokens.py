"""What will be fed of a few chains, token by token: its text, its label codes, and what every column asks of it.

All of it is read off the chains themselves and off `LagBuffer`, from which the probes get it too.

Shapes: T tokens in a chain, C labels, K columns.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from streamprobe.data.prompts import special_ids
from streamprobe.data.tokenize import Chain
from streamprobe.lags import INSIDE, ONSET, Column, LagBuffer

CHAINS = 8  # that are shown, unless asked otherwise
ROOM = 24_000  # tokens in all; excerpts get shorter where there are more
SHORTEST = 300  # tokens of an excerpt
NOT_ASKED, NEGATIVE, POSITIVE = -1, 0, 1
PRINTED = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes that stand for themselves in a byte-level piece
BYTES = {chr(byte): byte for byte in PRINTED} | {
    chr(256 + n): byte for n, byte in enumerate(sorted(set(range(256)) - set(PRINTED)))
}


class Word(NamedTuple):
    """The text of a token: some of the chain's (`text`), the name of a special token (`special`), or bytes of a
    character that has others in other tokens, as \\xNN (`bytes`)."""

    text: str
    kind: str


class FedChain(NamedTuple):
    """A chain of a split, and the tokens first .. first + n - 1 of it."""

    split: str
    id: str
    length: int  # T
    start: int  # the first token of the response
    first: int
    ids: list[int]  # [n]
    words: list[Word]  # [n]
    codes: Tensor  # [n, C] int8, see `lags`
    support: Tensor  # [n] bool: may this token be a sample?
    asked: Tensor  # [n, K] int8: NOT_ASKED, or what the column's target is


def collect(
    splits: Mapping[str, Sequence[Chain]],
    columns: Sequence[Column],
    *,
    labels: Sequence[str],
    arrays: Sequence[str],
    tokenizer: Any,
    most: int = CHAINS,
) -> list[FedChain]:
    """At most `most` chains of the splits; `labels` are the first C of the chains' label `arrays`."""
    chosen = choose(splits, most, len(labels))
    longest = max(SHORTEST, ROOM // len(chosen))
    return [
        _excerpt(name, chain, LagBuffer(columns, arrays), n_labels=len(labels), longest=longest, tokenizer=tokenizer)
        for name, chain in chosen
    ]


def choose(splits: Mapping[str, Sequence[Chain]], most: int, n_labels: int) -> list[tuple[str, Chain]]:
    """As many chains of each split as of any other, no chain twice: two thirds with a section, then some without.

    Each kind is taken evenly spaced, in the order of the data.
    """
    rows: set[int] = set()
    left: dict[str, list[Chain]] = {}
    for name, chains in splits.items():
        left[name] = [chain for chain in chains if chain.row not in rows]
        rows |= {chain.row for chain in left[name]}
    quota = dict.fromkeys(left, 0)
    while sum(quota.values()) < min(most, len(rows)):
        name = min((name for name in left if quota[name] < len(left[name])), key=lambda name: quota[name])
        quota[name] += 1
    return [(name, chain) for name, chains in left.items() for chain in _some(chains, quota[name], n_labels)]


def _some(chains: Sequence[Chain], n: int, n_labels: int) -> list[Chain]:
    """`n` of the chains."""
    has = [bool((chain.codes[:, :n_labels] >= INSIDE).any()) for chain in chains]
    positive = [chain for chain, inside in zip(chains, has, strict=True) if inside]
    others = [chain for chain, inside in zip(chains, has, strict=True) if not inside]
    n_others = max(min(n // 3, len(others)), n - len(positive))
    return [*_spaced(positive, n - n_others), *_spaced(others, n_others)]


def _spaced(chains: Sequence[Chain], n: int) -> list[Chain]:
    return [chains[(2 * i + 1) * len(chains) // (2 * n)] for i in range(n)]


def _excerpt(split: str, chain: Chain, buffer: LagBuffer, *, n_labels: int, longest: int, tokenizer: Any) -> FedChain:
    """At most `longest` tokens: from the beginning or, where no section begins there, around the first that does."""
    pairs = buffer.push(chain.ids, chain.codes, chain.support, last=True)
    asked = torch.where(pairs.valid, pairs.targets.to(torch.int8), NOT_ASKED)
    codes = chain.codes[:, :n_labels]
    onsets = (codes == ONSET).any(1).nonzero()[:, 0].tolist()
    onset, length = min(onsets, default=0), len(chain.ids)
    first = 0 if onset < longest else min(onset - longest // 2, length - longest)
    shown = slice(first, first + longest)
    ids = chain.ids[shown].tolist()
    return FedChain(
        split,
        chain.id,
        length,
        chain.start,
        first,
        ids,
        words(ids, tokenizer),
        codes[shown],
        chain.support[shown],
        asked[shown],
    )


def words(ids: Sequence[int], tokenizer: Any) -> list[Word]:
    """What each token stands for in a text, whatever its neighbours are."""
    special = special_ids(tokenizer)
    known = {token: _word(token, tokenizer, special) for token in set(ids)}
    return [known[token] for token in ids]


def _word(token: int, tokenizer: Any, special: set[int]) -> Word:
    piece = str(tokenizer.convert_ids_to_tokens(token))
    if token in special:
        return Word(piece, "special")
    alone, twice = (tokenizer.decode([token] * n, clean_up_tokenization_spaces=False) for n in (1, 2))
    if "\ufffd" in alone and (content := _bytes(piece)) is not None:
        text = content.decode(errors="backslashreplace")
        return Word(text, "bytes" if "\\x" in text else "text")
    if alone == piece:
        return Word(piece, "text")
    return Word(twice.removeprefix(alone), "text")  # the second one, since the first of a text may lose its space


def _bytes(piece: str) -> bytes | None:
    """The bytes of a tokenizer's entry, as byte-level ones and byte fallback write them; None for another one."""
    if fallback := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", piece):
        return bytes.fromhex(fallback[1])
    return bytes(BYTES[c] for c in piece) if set(piece) <= BYTES.keys() else None
