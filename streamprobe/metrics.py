"""Exact ranking metrics of many probes at once, and intervals that resample chains.

Shapes: N tokens, P probes that share their targets (the layers of one column), M positives, C chains, R resamples.

Everything follows from one small table.  For each positive i of a probe, count the positives and the negatives that
score at least as high (`tp`, `fp`) and the negatives that tie with it (`tied`).  With all positives sorted, a threshold
at positive i gives precision tp / (tp + fp); AUROC is the share of (positive, negative) pairs in the right order, ties
counted half; and no threshold between two positives can beat the one at the upper end, so F1 needs no other thresholds.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

BLOCK = 100  # resamples at once: bounds the memory of the bootstrap


class Scored(NamedTuple):
    """Tokens as L x K probes see them, on the CPU."""

    scores: Tensor  # [N, L, K] logits, float32
    targets: Tensor  # [N, K] bool
    valid: Tensor  # [N, K] bool
    chain: Tensor  # [N] int64
    token: Tensor  # [N] int64: the token's place in its chain


@dataclass
class Ranking:
    """Counts at each positive, sorted by falling score."""

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


def draw_chains(n_chains: int, resamples: int, seed: int) -> Tensor:
    """How often each resample draws each chain, with replacement: [R, C] int64."""
    random = np.random.default_rng(seed)
    return torch.from_numpy(random.multinomial(n_chains, np.full(n_chains, 1 / n_chains), size=resamples))


def percentiles(resampled: Tensor, level: float = 0.95) -> Tensor:
    """The interval [..., 2] (low, high) that holds the middle `level` of resampled [R, ...]; NaNs are left out."""
    levels = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=resampled.dtype)
    if not len(resampled):
        return torch.full((*resampled.shape[1:], 2), float("nan"), dtype=resampled.dtype)
    return resampled.nanquantile(levels, dim=0).movedim(0, -1)


def chain_bootstrap(scores: Tensor, targets: Tensor, chain: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """AUROC and average precision over resampled chains: two tensors [R, P], float64.

    scores [N, P], targets [N] bool, chain [N] int in 0 .. C - 1, weights [R, C]: how often resample r drew chain c.
    Tokens of a chain are not independent, so chains are the unit that is drawn (cluster bootstrap: Davison & Hinkley
    1997, section 3.8).  Both statistics of a resample follow from counts at the positives, so one table of how many
    negatives of each chain stand at or above each positive serves all R resamples exactly.  Probes that share the
    weights are paired: their difference in a resample is one draw of their difference.
    NaN in a resample without both classes.
    """
    n_chains = weights.shape[1]
    w = weights.to(torch.float32).T.contiguous()  # [C, R]
    n_negative = torch.bincount(chain[~targets], minlength=n_chains).float() @ w  # [R]
    n_positive = torch.bincount(chain[targets], minlength=n_chains).float() @ w
    usable = (n_negative > 0) & (n_positive > 0)
    both = torch.full((2, len(weights), scores.shape[1]), float("nan"), dtype=torch.float64)
    for p in range(scores.shape[1]) if usable.any() else ():
        order = scores[:, p].argsort(descending=True)
        s, y, c = scores[order, p], targets[order], chain[order]
        above, tied = _negatives_per_chain(s, y, c, n_chains)  # [M, C] each
        end = torch.searchsorted(-s[y], -s[y], right=True) - 1  # the last positive that ties with each
        blocks = [
            _resample(above, tied, w[:, r], n_negative[r], c[y], end) for r in torch.arange(len(weights)).split(BLOCK)
        ]
        areas, precisions = (torch.cat(parts) for parts in zip(*blocks, strict=True))
        both[0, :, p] = (areas / (n_positive.double() * n_negative)).where(usable, float("nan"))
        both[1, :, p] = (precisions / n_positive).where(usable, float("nan"))
    return both[0], both[1]


def _resample(
    above: Tensor, tied: Tensor, w: Tensor, n_negative: Tensor, chain: Tensor, end: Tensor
) -> tuple[Tensor, Tensor]:
    """Of each resample, the pairs in the right order and the sum of precisions at the positives: [R] each.

    above, tied [M, C]: negatives at or above each positive, and level with it; w [C, R] weights; n_negative [R];
    chain [M] of each positive; end [M]: the last positive that ties with it.
    """
    mine = w[chain]  # [M, R] the weight of each positive's own chain
    fp = above @ w  # [M, R] negatives that score at least as high
    beaten = (n_negative - fp + 0.5 * (tied @ w)).double()
    tp = mine.cumsum(0)[end]
    return (mine * beaten).sum(0), (mine * (tp / (tp + fp).clamp_min(1))).double().sum(0)


def _negatives_per_chain(s: Tensor, y: Tensor, c: Tensor, n_chains: int) -> tuple[Tensor, Tensor]:
    """Negatives of each chain that score >= each positive, and those that tie: [M, C] float32 each.

    s [N] falling scores, y [N] bool, c [N] chains.
    """
    falling = -s[~y]
    chains = c[~y]

    def counts(upto: Tensor) -> Tensor:
        """Row m: of the first upto[m] negatives, how many each chain holds (upto rises)."""
        step = torch.searchsorted(upto, torch.arange(len(falling)), right=True)  # the first row that sees negative j
        table = torch.zeros(len(upto) + 1, n_chains)
        table.index_put_((step, chains), torch.ones(()), accumulate=True)
        return table[:-1].cumsum(0)

    positives = -s[y]
    at_least = counts(torch.searchsorted(falling, positives, right=True))
    return at_least, at_least - counts(torch.searchsorted(falling, positives))


def measure(
    scores: Tensor,
    targets: Tensor,
    valid: Tensor,
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
