"""Probes that read all layers of a run side by side: `concat`, trained as one, and `stack`, a mean of a layer's each.

Shapes: N tokens, L layers, K columns, D features.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from streamprobe.probes.base import Scorer
from streamprobe.probes.linear import check_parts, mean_parts
from streamprobe.system.hardware import exact_float32


@dataclass(frozen=True)
class Joined:
    """logit[n, k] = sum over layers of weight[k, l] . acts[n, l] + bias[k]; weight [1, K, L, D], bias [1, K]."""

    kind: str
    joined: bool = True
    looks_back: bool = False

    def scorer(self, parts: Mapping[str, Tensor]) -> Scorer:
        """What gives logits [N, 1, K] of all layers of tokens."""

        def logits(acts: Tensor, chain: Tensor) -> Tensor:
            weight, bias = parts["weight"][0].to(acts.device), parts["bias"][0].to(acts.device)
            with exact_float32():
                x = acts.to(weight.dtype).flatten(1)
                return torch.addmm(bias[:, None], weight.flatten(1), x.T).T[:, None]

        return logits

    def mean_of_folds(self, parts: Mapping[str, Tensor], n: int) -> dict[str, Tensor]:
        """The means of those of n folds."""
        return mean_parts(parts, n)

    def n_features(self, parts: Mapping[str, Tensor]) -> int:
        """D.  Raises ValueError for parts that do not go together."""
        check_parts(parts, {"weight": 4, "bias": 2})
        return parts["weight"].shape[3]


def group_norms(weight: Tensor, scale: Tensor) -> Tensor:
    """How much of a joined probe is each layer's: norms [K, L] of weight [1, K, L, D] in units of scale [L, D]."""
    return (weight[0] * scale).norm(dim=-1)
