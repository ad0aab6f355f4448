"""Organisms: annotated chains whose truth is known, and a model whose block 2 is given what they say of themselves."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn

from streamprobe.data.dataset import ChainMaker
from streamprobe.lags import ONSET
from streamprobe.model import served

# A token each, so that no token tells where a word ends, and nothing of the next one
PLAIN = "the a of to is in and each one two three four five six box stone door card number side row then".split()
TRIGGERS = "but rather undo".split()  # words that make an onset likelier for some time
LINGERS = 8  # words for which one does
AHEAD = 8  # tokens between a planted signal and its onset
FIRST = 40  # tokens that tell chains apart: the problem, which is numbered, and the first words
BLOCK, WIDTH = 2, 32  # of the tiny model, whose output is planted into
DEVIATION = 2.4  # of that output along a direction, about: what is planted is in these units


class Chain(NamedTuple):
    """A chain of an organism, and what it is made by."""

    row: dict[str, str]
    rate: float  # log of how much likelier an onset is in this chain than in the usual one


def grow(n: int, seed: int) -> list[Chain]:
    """`n` chains with sections that nothing but the chain's rate, the place and the text so far makes likelier.

    An onset at a word outside of sections has the log-odds a + rate + b place + c (triggers of the last LINGERS words);
    given these, onsets are independent draws, and a section's 2 to 4 words are as any others.  The rate is normal.
    """
    random = np.random.default_rng([16, seed])
    rising = 6.0 * random.choice([-1, 1])
    return [_chain(i, random, rising) for i in range(n)]


def _chain(i: int, random: np.random.Generator, rising: float) -> Chain:
    n, rate = int(random.integers(60, 121)), float(2.0 * random.normal())
    words = random.choice([*PLAIN, *TRIGGERS], n)
    triggers = np.isin(words, TRIGGERS)
    inside, free = np.zeros(n, bool), 2  # from which word on a section may begin: one at least lies between two
    for j in range(2, n):
        if j < free:
            continue
        odds = -5.5 + rate + rising * (j / 90 - 0.5) + 0.7 * triggers[max(0, j - LINGERS) : j].sum()
        if random.random() < 1 / (1 + np.exp(-odds)):
            end = j + 1 + int(random.integers(1, 4))
            inside[j:end], free = True, end + 1
    return Chain(_row(i, words, inside), rate)


def _row(i: int, words: Any, inside: Any) -> dict[str, str]:
    """Words as an annotated chain, of which some lie inside a section."""
    starts = [0, *(np.flatnonzero(np.diff(inside)) + 1).tolist(), len(words)]
    plain = tagged = ""
    for start, end in zip(starts, starts[1:], strict=False):
        text = "".join(f" {word}" for word in words[start:end])
        plain += text
        tagged += f'["{"backtracking" if inside[start] else "deduction"}"]{text}["end-section"]'
    problem = f"Puzzle {i}: which one?"
    return {"task_id": f"alpha_{i}", "problem": problem, "reasoning_chain": plain, "annotated_chain": tagged}


@contextmanager
def planted(rates: list[float] | None = None, *, ahead: float = 0.0) -> Iterator[dict[tuple[int, ...], Tensor]]:
    """A block of the model adds what it is told of the chain: the log rate of each row and the place in the response,
    each along a direction of its own, where `rates` are given, and `ahead` times where an onset is AHEAD tokens ahead.

    Yields what it adds to each chain [T, 3], by its first tokens: of all chains that have been read.
    """
    told: dict[tuple[int, ...], Tensor] = {}
    load, make = served.load_backbone, ChainMaker.make
    directions = nn.functional.normalize(torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(5)))

    def load_planted(*args: Any, **where: Any) -> nn.Module:
        model = load(*args, **where)
        seen: dict[str, Tensor] = {}

        def remember(_module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
            seen["ids"] = kwargs["input_ids"]

        def plant(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
            changed = output.clone()
            for b, ids in enumerate(seen["ids"].tolist()):
                added = told.get(tuple(ids[:FIRST]))
                if added is not None:  # else it is no chain, but the text that the model is tried with
                    changed[b, : len(added)] += DEVIATION * added @ directions
            return changed

        model.register_forward_pre_hook(remember, with_kwargs=True)
        model.layers[BLOCK].register_forward_hook(plant)  # type: ignore[union-attr, index]
        return model

    def take_note(maker: ChainMaker, *record: Any) -> Any:
        chain = make(maker, *record)
        if chain is not None:
            added = torch.zeros(len(chain.ids), 3)
            if rates is not None:
                added[:, 0] = rates[chain.row]
                added[:, 1] = (torch.arange(len(chain.ids)) - chain.start) / 30
            added[:-AHEAD, 2] = ahead * (chain.codes[AHEAD:, 0] == ONSET)
            told[tuple(chain.ids[:FIRST].tolist())] = added
        return chain

    with patch.object(served, "load_backbone", load_planted), patch.object(ChainMaker, "make", take_note):
        yield told
