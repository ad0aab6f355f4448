"""Exact ranking metrics of many probes at once, and intervals that resample chains.

Shapes: N tokens, P probes that share their targets (the layers of one column), M positives, C chains, R resamples.

Everything follows from one small table.  For each positive i of a probe, count the positives and the negatives that
score at least as high (`tp`, `fp`) and the negatives that tie with it (`tied`).  With all positives sorted, a threshold
at positive i gives precision tp / (tp + fp); AUROC is the fraction of (positive, negative) pairs in the right order,
ties counted half; and no threshold between two positives can beat the one at the upper end, so F1 needs no others.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Ranking:
    """What every metric of P probes follows from: counts at each positive, sorted by falling score."""

    threshold: Tensor  # [M, P] the positive's score
    tp: Tensor  # [M, P] positives that score at least as high
    fp: Tensor  # [M, P] negatives that score at least as high
    tied: Tensor  # [M, P] negatives that score the same
    n_positive: int
    n_negative: int


def rank(scores: Tensor, targets: Tensor) -> Ranking:
    """Ranks scores [N, P] (float, no NaN) against targets [N] (bool)."""
    assert scores.ndim == 2 and targets.shape == scores.shape[:1]
    assert not scores.isnan().any(), "a NaN score has no rank"
    positive = scores[targets].T.contiguous().sort(dim=1, descending=True).values  # [P, M]
    negative = scores[~targets].T.contiguous().sort(dim=1).values  # [P, N - M], rising
    below = torch.searchsorted(negative, positive)
    up_to = torch.searchsorted(negative, positive, right=True)
    n_negative = negative.shape[1]
    falling = -positive
    tp = torch.searchsorted(falling, falling, right=True)
    return Ranking(positive.T, tp.T, (n_negative - below).T, (up_to - below).T, int(targets.sum()), n_negative)


def auroc(ranking: Ranking) -> Tensor:
    """Area under the ROC curve [P], ties counted half (Mann-Whitney U); NaN where a class is absent."""
    beaten = ranking.n_negative - ranking.fp.double() + ranking.tied / 2
    return beaten.sum(0) / (ranking.n_positive * ranking.n_negative or float("nan"))


def average_precision(ranking: Ranking) -> Tensor:
    """Mean precision at the positives [P], as in scikit-learn; NaN where a class is absent."""
    precision = ranking.tp / (ranking.tp + ranking.fp).double()
    return precision.sum(0) / (ranking.n_positive if ranking.n_negative and ranking.n_positive else float("nan"))


def f1_at(scores: Tensor, targets: Tensor, threshold: Tensor | float) -> Tensor:
    """F1 [P] of `scores [N, P] >= threshold` ([P] or a number); 0 without a hit, NaN without positives or threshold."""
    said = scores >= threshold
    hits = (said & targets[:, None]).sum(0).double()
    f1 = 2 * hits / (said.sum(0) + targets.sum())
    known = targets.any() & ~torch.as_tensor(threshold).isnan()
    return torch.where(known, f1, float("nan"))


def best_threshold(ranking: Ranking) -> Tensor:
    """The threshold [P] with the highest F1 (the highest such, among equals); NaN without positives."""
    if not ranking.n_positive:
        return torch.full(ranking.threshold.shape[1:], float("nan"))
    f1 = 2 * ranking.tp.double() / (ranking.tp + ranking.fp + ranking.n_positive)
    return ranking.threshold.gather(0, f1.argmax(0, keepdim=True))[0]


def tpr_at_fpr(ranking: Ranking, fpr: float = 0.05) -> Tensor:
    """The largest true positive rate [P] of a threshold whose false positive rate is at most `fpr`."""
    if not (ranking.n_positive and ranking.n_negative):
        return torch.full(ranking.threshold.shape[1:], float("nan"))
    allowed = ranking.fp <= fpr * ranking.n_negative
    return (ranking.tp.double() * allowed).amax(0) / ranking.n_positive


def measure(
    scores: Tensor,
    targets: Tensor,
    valid: Tensor,
    *,
    threshold: Tensor | None = None,
    half: Tensor | None = None,
) -> dict[str, Tensor]:
    """Every point metric of every probe: name -> float64 [L, K] (NaN where a class is absent).

    scores [N, L, K] are logits.  `f1` cuts at `threshold` [L, K], which without one given is the best for these very
    tokens and is returned as `threshold`.  `f1_at_half` cuts at `half` [K], where a probability of one half lies: at 0,
    unless the logits have been shifted.
    """
    half = torch.zeros(targets.shape[1]) if half is None else half
    columns: list[dict[str, Tensor]] = []
    for k in range(targets.shape[1]):
        s, y = scores[valid[:, k], :, k], targets[valid[:, k], k]
        ranking = rank(s, y)
        cut = best_threshold(ranking) if threshold is None else threshold[:, k]
        columns.append(
            {
                "auroc": auroc(ranking),
                "average_precision": average_precision(ranking),
                "f1": f1_at(s, y, cut),
                "threshold": cut,
                "f1_at_half": f1_at(s, y, half[k]),
                "tpr_at_5fpr": tpr_at_fpr(ranking),
            }
        )
    return {name: torch.stack([c[name].double() for c in columns], dim=1) for name in columns[0]}
