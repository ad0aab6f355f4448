"""Every probe's logit for every token.

Shapes: N tokens, L layers, K columns.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from streamprobe.activations.batch import TokenBatch
from streamprobe.errors import InputError
from streamprobe.probes.linear import ProbeBank


class Scored(NamedTuple):
    """Tokens as L x K probes see them, on the CPU."""

    scores: Tensor  # [N, L, K] logits, float32
    targets: Tensor  # [N, K] bool
    valid: Tensor  # [N, K] bool
    chain: Tensor  # [N] int64
    token: Tensor  # [N] int64: the token's place in its chain


class Share(NamedTuple):
    """The part of a TokenBatch that a solver is fed."""

    name: str
    features: Callable[[TokenBatch], Tensor]  # -> [N, L, D], its own L and D
    columns: Tensor  # [k] which of the batch's K columns

    def of(self, batch: TokenBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Features [N, L, D], targets [N, k] and valid [N, k]."""
        return self.features(batch), batch.targets[:, self.columns], batch.valid[:, self.columns]


def evaluate(pairs: Sequence[tuple[ProbeBank, Share]], batches: Iterable[TokenBatch]) -> list[Scored]:
    """Every probe's logit for every token, for each bank.  Raises InputError where one is not finite."""
    scores: list[list[Tensor]] = [[] for _ in pairs]
    rest = []
    for batch in batches:
        for (bank, share), own in zip(pairs, scores, strict=True):
            own.append(bank.scores(share.features(batch)).cpu())
        rest.append((batch.targets.cpu(), batch.valid.cpu(), batch.chain.cpu(), batch.token.cpu()))
    targets, valid, chain, token = (torch.cat(part) for part in zip(*rest, strict=True))
    columns = [share.columns.cpu() for _, share in pairs]
    result = [
        Scored(torch.cat(own), targets[:, k], valid[:, k], chain, token) for own, k in zip(scores, columns, strict=True)
    ]
    if not all(scored.scores.isfinite().all() for scored in result):
        raise InputError("scores that are infinite or not numbers", "finite weights", "lower --learning_rate")
    return result
