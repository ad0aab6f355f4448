"""How far a score can be off by the chance of which chains were drawn: intervals that resample chains.

Shapes: N tokens, P probes that share their targets (the layers of one column), M positives, C chains, R resamples.
"""

import numpy as np
import torch
from torch import Tensor

BLOCK = 100  # resamples at once: bounds the memory of the bootstrap


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
            _resample(above, tied, w=w[:, r], n_negative=n_negative[r], chain=c[y], end=end)
            for r in torch.arange(len(weights)).split(BLOCK)
        ]
        areas, precisions = (torch.cat(resampled) for resampled in zip(*blocks, strict=True))
        both[0, :, p] = (areas / (n_positive.double() * n_negative)).where(usable, float("nan"))
        both[1, :, p] = (precisions / n_positive).where(usable, float("nan"))
    return both[0], both[1]


def _resample(
    above: Tensor, tied: Tensor, *, w: Tensor, n_negative: Tensor, chain: Tensor, end: Tensor
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
