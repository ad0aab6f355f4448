"""How far a probe is above what it must beat, and what may be claimed after looking at many probes.

Shapes: R resamples, Q differences that are looked at together.
"""

import torch
from torch import Tensor

LEAST_CHAINS = 10  # that must hold a positive: with fewer, resampling them says too little of chance


def lower_bounds(points: Tensor, resampled: Tensor, n_chains: int, level: float = 0.95) -> Tensor:
    """Low ends [Q] of intervals around points [Q], all of which lie below the truth but for (1 - level) / 2 of cases.

    resampled [R, Q] are the same differences in paired resamples of chains, of which at least `n_chains` bear on each.
    The largest of the Q studentised errors of a resample shows how far an error can be by chance (max statistic:
    Westfall & Young 1993; Romano & Wolf 2005), which takes into account how the differences hang together.  A bootstrap
    of n draws makes errors too small by sqrt((n - 1) / n), and normal where they are Student's: both is made up for
    (Abramowitz & Stegun 1964, 26.7.5, first term).  Resamples with a NaN are left out; NaN where half of them are.
    """
    whole = resampled[~resampled.isnan().any(1)]
    if 2 * len(whole) <= len(resampled) or len(whole) < 2 or n_chains < 2:
        return torch.full_like(points, float("nan"))
    deviation = whole.std(0)
    moving = deviation > 0
    errors = (whole - points)[:, moving] / deviation[moving]
    reach = errors.amax(1).quantile((1 + level) / 2) if moving.any() else torch.zeros((), dtype=points.dtype)
    few = (n_chains / (n_chains - 1)) ** 0.5 * (1 + (reach**2 + 1) / (4 * (n_chains - 1)))
    return points - few * reach * deviation
