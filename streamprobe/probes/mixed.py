"""What a kind of probe adds to the joint control beside a layer: probes that read the logits of others.

Shapes: N tokens, L layers, S sites (the control, then those of the kind), K columns.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from streamprobe.probes.base import Scorer
from streamprobe.probes.linear import check_parts, mean_parts
from streamprobe.probes.sites import MIXED


class Logits(NamedTuple):
    """What other probes say of some tokens, at the columns that the joint control has."""

    nested: Tensor  # [N, L + 1, K] of the control, and of those that read it and a layer
    kind: Tensor  # [N, S - 1, K]


@dataclass(frozen=True)
class Mixed:
    """At the first site the control itself, and then for each site of the kind a weighted sum of logits.

    logit[n, s, k] = nested[s, k] . logits.nested[n, :, k] + own[s, k] logits.kind[n, s - 1, k] + bias[s, k]

    with nested [S, K, L + 1], own and bias [S, K]; the control's `own` is not used.
    """

    kind: str = MIXED
    joined: bool = False
    looks_back: bool = False

    def scorer(self, parts: Mapping[str, Tensor]) -> Scorer:
        """What gives logits [N, S, K] of Logits."""

        def logits(said: Logits, chain: Tensor) -> Tensor:
            nested, own, bias = (parts[name].to(said.kind.device) for name in ("nested", "own", "bias"))
            found = torch.einsum("nlk,skl->skn", said.nested, nested)
            found[1:] += own[1:, :, None] * said.kind.permute(1, 2, 0)
            return (found + bias[..., None]).permute(2, 0, 1)

        return logits

    def mean_of_folds(self, parts: Mapping[str, Tensor], n: int) -> dict[str, Tensor]:
        """The means of the weights of n folds."""
        return mean_parts(parts, n)

    def n_features(self, parts: Mapping[str, Tensor]) -> int:
        """L + 1 logits beside their own.  Raises ValueError for parts that do not go together."""
        check_parts(parts, {"nested": 3, "own": 2, "bias": 2})
        return parts["nested"].shape[2]
