"""Every probe's logit for every token.

Shapes: N tokens, L layers, K columns.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from streamprobe.activations.batch import TokenBatch
from streamprobe.activations.feed import Feed
from streamprobe.errors import InputError
from streamprobe.probes.base import Probes


class Scored(NamedTuple):
    """Tokens as L x K probes see them, on the CPU."""

    scores: Tensor  # [N, L, K] logits, float32
    targets: Tensor  # [N, K] bool
    valid: Tensor  # [N, K] bool
    chain: Tensor  # [N] int64
    token: Tensor  # [N] int64: the token's place in its chain


def evaluate(pairs: Sequence[tuple[Probes, Feed]], batches: Iterable[TokenBatch]) -> list[Scored]:
    """Every probe's logit for every token, for each bank and its feed.  Raises InputError if one is not finite."""
    scores: list[list[Tensor]] = [[] for _ in pairs]
    rest = []
    for batch in batches:
        for (bank, feed), own in zip(pairs, scores, strict=True):
            own.append(bank.scores(feed.features(batch)).cpu())
        rest.append((batch.targets.cpu(), batch.valid.cpu(), batch.chain.cpu(), batch.token.cpu()))
    targets, valid, chain, token = (torch.cat(each) for each in zip(*rest, strict=True))
    columns = [feed.columns.cpu() for _, feed in pairs]
    result = [
        Scored(torch.cat(own), targets[:, k], valid[:, k], chain, token) for own, k in zip(scores, columns, strict=True)
    ]
    if not all(scored.scores.isfinite().all() for scored in result):
        raise InputError("scores that are infinite or not numbers", "finite weights", "lower --learning_rate")
    return result
