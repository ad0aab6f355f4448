"""Tokens of several chains, cut into calls, for probes that look back in a chain."""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from streamprobe.probes.base import Scorer


def pieces(lengths: list[int], random: np.random.Generator) -> Iterator[list[range]]:
    """The tokens of chains of these lengths in calls: of each some of the chains, in random order, with some tokens."""
    done = [0] * len(lengths)
    while any(d < n for d, n in zip(done, lengths, strict=True)):
        call = []
        for c in random.permutation(len(lengths)):
            n = min(int(random.integers(0, 9)) * int(random.integers(1, 9)), lengths[c] - done[c])
            if n:
                first = sum(lengths[:c]) + done[c]
                call.append(range(first, first + n))
                done[c] += n
        if call:
            yield call


def chains_of(lengths: list[int]) -> Tensor:
    """The chain of every token [N], by numbers that are no places."""
    return torch.repeat_interleave(1000 - 7 * torch.arange(len(lengths)), torch.tensor(lengths))


def in_pieces(make: Callable[[], Scorer], acts: Tensor, lengths: list[int], seed: int) -> Tensor:
    """The logits [N, L, K] of tokens that a new scorer is given piece by piece."""
    scorer, chain, found = make(), chains_of(lengths), {}
    for call in pieces(lengths, np.random.default_rng(seed)):
        rows = [i for piece in call for i in piece]
        found |= dict(zip(rows, scorer(acts[rows], chain[rows]), strict=True))
    return torch.stack([found[i] for i in range(len(acts))])


def logits_before_a_change(make: Callable[[], Scorer], acts: Tensor, lengths: list[int], at: int) -> list[Tensor]:
    """Logits of the tokens of every chain before its token `at`, as they are and with all tokens from `at` on changed.

    The tokens come in three calls, the second of which holds token `at`.
    """
    place = torch.cat([torch.arange(n) for n in lengths])
    changed = torch.where((place >= at)[:, None, None], -100 * acts.flip(0) - 3, acts)
    found = []
    for own in (acts, changed):
        scorer, chain, logits = make(), chains_of(lengths), torch.zeros(0)
        parts = [place < at // 2, (place >= at // 2) & (place < at + at // 2), place >= at + at // 2]
        logits = torch.zeros(len(acts), *scorer(acts[:1], torch.tensor([-1])).shape[1:])
        for part in parts:
            logits[part] = scorer(own[part], chain[part])
        found.append(logits[place < at])
    return found
