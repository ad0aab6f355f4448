"""Chains whose text is an attack on the page that shows them, and random scores of their tokens."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from builders import sites_of

from streamprobe.data.tokenize import Chain
from streamprobe.evaluation.results import ScoredProbes
from streamprobe.evaluation.scores import Scored
from streamprobe.lags import INSIDE, ONSET, OUTSIDE, UNKNOWN, Column

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>'\"&$x^$"
LABEL = f"back {HOSTILE}"
N_CHAINS, LENGTH = 16, 60
REAL = [Column(LABEL, "token", lag) for lag in (0, 8)]


def chains_of(tokenizer: Any) -> list[Chain]:
    """Chains that say what an attacker would, each with sections at random places."""
    random = np.random.default_rng(0)
    chains = []
    for number in range(N_CHAINS):
        ids = tokenizer(f"é 中 {HOSTILE} " * 30)["input_ids"][:LENGTH]
        inside = np.repeat(random.random(LENGTH // 5) < 0.3, 5)
        codes = np.where(inside, INSIDE, OUTSIDE)
        codes[1:][inside[1:] & ~inside[:-1]] = ONSET
        codes[:4] = UNKNOWN
        responses = torch.ones(LENGTH, dtype=torch.bool)
        codes_of_label = torch.tensor(codes, dtype=torch.int8)[:, None]
        chains.append(Chain(f"{number} {HOSTILE}", torch.tensor(ids), codes_of_label, responses))
    return chains


def scored_probes(
    chains: Sequence[Chain], layers: list[int | str], columns: list[Column], *, strength: float, seed: int
) -> ScoredProbes:
    """Probes that score the positive tokens of the chains higher by `strength`."""
    random = torch.Generator().manual_seed(seed)
    codes = torch.cat([chain.codes[:, 0] for chain in chains])
    y = (codes >= INSIDE)[:, None].expand(-1, len(columns))
    valid = (codes != UNKNOWN)[:, None].expand(-1, len(columns)).clone()
    valid[50:52] &= torch.tensor([column.lag == 0 for column in columns])
    scores = torch.randn(len(codes), len(layers), len(columns), generator=random) - 2 + strength * y[:, None]
    chain = torch.arange(len(chains)).repeat_interleave(LENGTH)
    token = torch.arange(LENGTH).repeat(len(chains))
    nothing = torch.zeros(len(layers), len(columns))
    scored = Scored(scores, y & valid, valid, chain, token)
    return ScoredProbes(
        "newton", sites_of(layers), columns, scored, nothing - 1, torch.zeros(len(columns)), nothing, nothing
    )
