"""Exact ranking metrics of many probes at once.

Shapes: N tokens, L layers, K columns, P probes that share their targets (the layers of one column), M positives.

Everything follows from one small table.  For each positive i of a probe, count the positives and the negatives that
score at least as high (`tp`, `fp`) and the negatives that tie with it (`tied`).  With all positives sorted, a threshold
at positive i gives precision tp / (tp + fp); AUROC is the fraction of (positive, negative) pairs in the right order,
ties counted half; and no threshold between two positives can beat the one at the upper end, so F1 needs no others.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from streamprobe.evaluation.sorting import sort_rising


@dataclass
class Ranking:
    """What every metric of P probes follows from: sorted scores of both classes, and counts at each positive."""

    positive: Tensor  # [P, M] scores of the positives, falling: the thresholds that matter
    negative: Tensor  # [P, N - M] scores of the negatives, rising
    tp: Tensor  # [P, M] positives that score at least as high
    fp: Tensor  # [P, M] negatives that score at least as high
    tied: Tensor  # [P, M] negatives that score the same

    @property
    def n_positive(self) -> int:
        """M."""
        return self.positive.shape[1]

    @property
    def n_negative(self) -> int:
        """N - M."""
        return self.negative.shape[1]

    @property
    def undefined(self) -> Tensor:
        """What a metric without its classes is: NaN [P], float64."""
        return torch.full(self.positive.shape[:1], float("nan"), dtype=torch.float64, device=self.positive.device)


def rank(scores: Tensor, targets: Tensor, valid: Tensor | None = None) -> Ranking:
    """Ranks scores [N, P] (float, no NaN) against targets [N] (bool), of the tokens where `valid` [N] is True."""
    assert scores.ndim == 2 and targets.shape == scores.shape[:1]
    classes = (targets, ~targets) if valid is None else (targets & valid, ~targets & valid)
    return rank_sorted(*(sort_rising(scores.T.index_select(1, own.nonzero()[:, 0])) for own in classes))


def rank_sorted(rising: Tensor, negative: Tensor) -> Ranking:
    """The ranking of positives [P, M] and negatives [P, N - M], both of rising scores."""
    assert not any(each[:, -1:].isnan().any() for each in (rising, negative)), "a NaN score has no rank"
    below = torch.searchsorted(negative, rising)
    up_to = torch.searchsorted(negative, rising, right=True)
    tp = rising.shape[1] - torch.searchsorted(rising, rising)
    positive, tp, fp, tied = (each.flip(1) for each in (rising, tp, negative.shape[1] - below, up_to - below))
    return Ranking(positive, negative, tp, fp, tied)


def auroc(ranking: Ranking) -> Tensor:
    """Area under the ROC curve [P], ties counted half (Mann-Whitney U); NaN where a class is absent."""
    pairs = ranking.n_positive * ranking.n_negative
    return (pairs - ranking.fp.sum(1) + ranking.tied.sum(1).double() / 2) / (pairs or float("nan"))


def average_precision(ranking: Ranking) -> Tensor:
    """Mean precision at the positives [P], as in scikit-learn; NaN where a class is absent."""
    precision = ranking.tp / (ranking.tp + ranking.fp).double()
    return precision.sum(1) / (ranking.n_positive if ranking.n_negative and ranking.n_positive else float("nan"))


def f1_at(ranking: Ranking, threshold: Tensor | float) -> Tensor:
    """F1 [P] of scores >= threshold ([P] or a number); 0 without a hit, NaN without positives or threshold."""
    if not ranking.n_positive:
        return ranking.undefined
    cut = torch.as_tensor(threshold, device=ranking.positive.device).to(ranking.positive)
    cut = cut.expand(len(ranking.positive))[:, None].contiguous()
    hits = torch.searchsorted(-ranking.positive, -cut, right=True)[:, 0]
    said = hits + ranking.n_negative - torch.searchsorted(ranking.negative, cut)[:, 0]
    f1 = 2 * hits.double() / (said + ranking.n_positive)
    return f1.where(~cut[:, 0].isnan(), float("nan"))


def best_threshold(ranking: Ranking) -> Tensor:
    """The threshold [P] with the highest F1 (the highest such, among equals); NaN without positives."""
    if not ranking.n_positive:
        return ranking.undefined
    f1 = 2 * ranking.tp.double() / (ranking.tp + ranking.fp + ranking.n_positive)
    return ranking.positive.gather(1, f1.argmax(1, keepdim=True))[:, 0]


def tpr_at_fpr(ranking: Ranking, fpr: float = 0.05) -> Tensor:
    """The largest true positive rate [P] of a threshold whose false positive rate is at most `fpr`."""
    if not (ranking.n_positive and ranking.n_negative):
        return ranking.undefined
    allowed = ranking.fp <= fpr * ranking.n_negative
    return (ranking.tp * allowed).amax(1).double() / ranking.n_positive


def brier(ranking: Ranking) -> Tensor:
    """Mean squared error [P] of the probabilities: Brier (1950); NaN without tokens."""
    n = ranking.n_positive + ranking.n_negative
    errors = torch.cat([1 - ranking.positive.sigmoid().double(), ranking.negative.sigmoid().double()], 1)
    return errors.square().sum(1) / (n or float("nan"))


def point_metrics(ranking: Ranking, *, threshold: Tensor | None, half: Tensor) -> dict[str, Tensor]:
    """Every point metric of P probes: name -> float64 [P].  See `measure`; threshold [P], half []."""
    cut = best_threshold(ranking) if threshold is None else threshold
    found = {
        "auroc": auroc(ranking),
        "average_precision": average_precision(ranking),
        "f1": f1_at(ranking, cut),
        "threshold": cut,
        "f1_at_half": f1_at(ranking, half),
        "tpr_at_5fpr": tpr_at_fpr(ranking),
    }
    return {name: values.double() for name, values in found.items()}


def measure(scores: Tensor, targets: Tensor, valid: Tensor, *, half: Tensor | None = None) -> dict[str, Tensor]:
    """Every point metric of every probe: name -> float64 [L, K] on the CPU, NaN where a class is absent.

    scores [N, L, K] are logits, targets and valid [N, K] bool, all on one device.  `f1` cuts at the best threshold for
    these very tokens, which is returned too; `f1_at_half` at `half` [K], where a probability of one half lies: at 0,
    unless the logits have been shifted.
    """
    half = torch.zeros(targets.shape[1]) if half is None else half
    columns = [
        point_metrics(rank(scores[:, :, k], targets[:, k], valid[:, k]), threshold=None, half=cut)
        for k, cut in enumerate(half.to(scores.device))
    ]
    return {name: torch.stack([c[name] for c in columns], dim=1).cpu() for name in columns[0]}
