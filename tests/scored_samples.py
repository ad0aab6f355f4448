"""Scores and targets that make ranking hard: ties, and classes of one token."""

import numpy as np
import torch
from torch import Tensor

KINDS = ["many ties", "no ties", "single positive", "single negative", "all tied", "half precision"]


def sample(kind: str, seed: int, n: int = 120, n_probes: int = 4) -> tuple[Tensor, Tensor]:
    """Scores [N, P] float32 and targets [N] bool, both classes present."""
    random = torch.Generator().manual_seed(seed)
    targets = torch.rand(n, generator=random) < 0.25
    if kind == "single positive":
        targets = torch.arange(n) == n // 3
    if kind == "single negative":
        targets = torch.arange(n) != n // 3
    scores = torch.randn(n, n_probes, generator=random) + 0.7 * targets[:, None]
    if kind in ("many ties", "single positive", "single negative"):
        scores = (1.5 * scores).round()
    if kind == "all tied":
        scores = torch.full((n, n_probes), -0.25)
    if kind == "half precision":
        scores = scores.bfloat16().float()
    return scores, targets


def columns(scores: Tensor) -> list[np.ndarray]:
    """The scores of each probe, in float64, which holds every float32."""
    return list(scores.double().T.numpy())
