"""How far a score can be off by the chance of which chains were drawn: intervals that resample chains.

Shapes: N tokens, P probes that share their targets (the layers of one column), M positives, C chains, of which H hold
a positive, R resamples.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from streamprobe.evaluation.metrics import Ranking, rank_sorted
from streamprobe.evaluation.sorting import MOST_CARRIED, sort_carrying, sort_rising

BLOCK = 100  # resamples of texts at once: bounds the memory of the bootstrap
CELLS = 2**20  # of a table of chains at once: bounds the memory of a column
COUNTS = 2**19  # counts at once: what a CPU's cache holds


def draw_chains(n_chains: int, resamples: int, seed: int) -> Tensor:
    """How often each resample draws each chain, with replacement: [R, C] int64."""
    random = np.random.default_rng(seed)
    return torch.from_numpy(random.multinomial(n_chains, np.full(n_chains, 1 / n_chains), size=resamples))


def percentiles(resampled: Tensor, level: float = 0.95) -> Tensor:
    """The interval [..., 2] (low, high) that holds the middle `level` of resampled [R, ...]; NaNs are left out.

    Between two resamples it is interpolated, as `torch.nanquantile` does.
    """
    if not len(resampled):
        return resampled.new_full((*resampled.shape[1:], 2), float("nan"))
    rising = sort_rising(resampled.movedim(0, -1))  # [..., R]
    last = (~rising.isnan()).sum(-1, keepdim=True) - 1  # -1 where all are NaN, which reads one of them
    levels = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=rising.dtype, device=rising.device)
    place = (levels * last).clamp_min(0)
    low, high = rising.gather(-1, place.floor().long()), rising.gather(-1, place.ceil().long())
    return torch.lerp(low, high, place - place.floor())


def probes_at_once(n_chains: int, n_positive: int) -> int:
    """How many probes may have their `ChainTable` at a time."""
    return max(1, CELLS // (n_chains * (n_positive + 1)))


@dataclass
class ChainTable:
    """What every resample of P probes follows from: how many tokens of each chain each positive stands below.

    Row i counts at the positive of rank i, from the highest score on; row 0 of `positives` is empty.
    """

    negatives: Tensor  # [P, C, M + 1] of each chain that score at least as high, float32; the last row counts all
    positives: Tensor  # [P, H, M + 1] of each chain that holds some, the i highest, float32
    holders: Tensor  # [H] the chains that hold a positive
    pairs: Tensor  # [P, C, H] pairs of a negative and a positive in the right order, ties counted half, float64


def rank_chains(scores: Tensor, targets: Tensor, chain: Tensor, n_chains: int) -> tuple[Ranking, ChainTable]:
    """Ranks scores [N, P] (float32, finite) against targets [N] (bool) of tokens of chain [N], in 0 .. C - 1."""
    assert n_chains <= MOST_CARRIED
    places = (classed.nonzero()[:, 0] for classed in (targets, ~targets))
    (rising, own), (negative, others) = (sort_carrying(scores.T.index_select(1, at), chain[at]) for at in places)
    ranking = rank_sorted(rising, negative)
    holders, numbers = own.flip(1).unique(return_inverse=True)
    n_rows = ranking.n_positive + 1
    positives = _count(ranking.tp, numbers, n_chains=len(holders), n_rows=n_rows).cumsum(2)
    others = others.flip(1)
    seen = [_count(_first_row(upto, others), others, n_chains=n_chains, n_rows=n_rows) for upto in _levels(ranking)]
    pairs = sum(seen[1:], seen[0]) @ positives.transpose(1, 2)
    return ranking, ChainTable(seen[0].cumsum_(2), positives, holders, pairs.double() / len(seen))


def _levels(ranking: Ranking) -> list[Tensor]:
    """The negatives [P, M] that score at least as high as each positive and, if any ties, those that score higher."""
    return [ranking.fp, ranking.fp - ranking.tied] if ranking.tied.any() else [ranking.fp]


def _first_row(upto: Tensor, falling: Tensor) -> Tensor:
    """The first row [P, N] that counts each of `falling` [P, N]: row i counts the first upto[i] ([P, M], rising)."""
    ends = upto.new_zeros(len(falling), falling.shape[1] + 1)
    return ends.scatter_add_(1, upto, torch.ones_like(upto)).cumsum(1)[:, :-1]


def _count(row: Tensor, chain: Tensor, *, n_chains: int, n_rows: int) -> Tensor:
    """How many tokens of each chain have each row: [P, n_chains, n_rows] float32; row, chain [P, N]."""
    cells = chain * n_rows + row
    table = torch.zeros(len(cells), n_chains * n_rows, device=cells.device)
    return table.scatter_add_(1, cells, table.new_ones(()).expand_as(cells)).view(len(cells), n_chains, n_rows)


def chain_bootstrap(scores: Tensor, targets: Tensor, chain: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """AUROC and average precision over resampled chains: two tensors [R, P], float64.

    scores [N, P] (float32), targets [N] bool, chain [N] int64, weights [R, C]: how often resample r drew chain c.
    """
    _, table = rank_chains(scores, targets, chain, weights.shape[1])
    return resample(table, weights)


def resample(table: ChainTable, weights: Tensor) -> tuple[Tensor, Tensor]:
    """AUROC and average precision over resampled chains: two tensors [R, P], float64.

    weights [R, C]: how often resample r drew chain c.  Tokens of a chain are not independent, so chains are the unit
    that is drawn (cluster bootstrap: Davison & Hinkley 1997, section 3.8).  A pair of tokens is there as often as both
    of their chains, so AUROC is a quadratic form in the weights; average precision follows from the weights of what
    stands at or above each positive: both are exact.  Probes that share the weights are paired: their difference in a
    resample is one draw of their difference.  NaN in a resample without both classes.
    """
    areas = resample_areas(table, weights)
    precisions = areas.new_zeros(len(table.pairs), len(weights))
    for precision_ in _precisions(table, weights.T.float().contiguous()):
        precisions += precision_
    n_positive = weights.to(table.pairs)[:, table.holders] @ table.positives[0, :, -1].double()  # [R]
    return areas, (precisions / n_positive).T.where(~areas.isnan(), float("nan"))


def resample_areas(table: ChainTable, weights: Tensor) -> Tensor:
    """AUROC alone, as `resample` gives it: [R, P] float64."""
    drawn = weights.to(table.pairs)  # [R, C]
    holding = drawn[:, table.holders]
    n_negative = drawn @ table.negatives[0, :, -1].double()  # [R]
    n_positive = holding @ table.positives[0, :, -1].double()
    ordered = ((drawn @ table.pairs) * holding).sum(2)  # [P, R]
    usable = (n_negative > 0) & (n_positive > 0)
    return (ordered / (n_positive * n_negative)).where(usable, float("nan")).T


def _precisions(table: ChainTable, w: Tensor) -> Iterator[Tensor]:
    """The sum of precisions at the positives, each as often as its chain was drawn, in parts [P, R]; w [C, R]."""
    n_probes, _, n_rows = table.positives.shape
    holding, drawn = (each.expand(n_probes, -1, -1) for each in (w[table.holders], w))
    step = max(1, COUNTS // max(1, n_probes * w.shape[1]))
    for first in range(0, n_rows - 1, step):
        last = min(first + step, n_rows - 1)
        upto = torch.bmm(table.positives[:, :, first : last + 1].transpose(1, 2), holding)  # [P, rows + 1, R]
        tp = upto[:, 1:]
        said = torch.baddbmm(tp, table.negatives[:, :, first:last].transpose(1, 2), drawn)
        yield upto.diff(dim=1).mul_(tp).div_(said.clamp_min_(1)).sum(1)
