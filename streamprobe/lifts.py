"""How far a probe is above what it must beat, and what may be claimed after looking at many probes.

Shapes: R resamples, Q differences that are looked at together.
"""

import torch
from torch import Tensor


def lower_bounds(points: Tensor, resampled: Tensor, level: float = 0.95) -> Tensor:
    """The low ends [Q] of intervals around points [Q] that all hold at once, with the probability of one of `level`.

    resampled [R, Q] are the same differences in paired resamples.  The largest of the Q studentised errors of a
    resample tells how far an error can be by chance (max statistic: Westfall & Young 1993; Romano & Wolf 2005), which
    takes into account how the differences hang together.  Resamples with a NaN are left out; NaN where all are.
    """
    resampled = resampled[~resampled.isnan().any(1)]
    if len(resampled) < 2:
        return torch.full_like(points, float("nan"))
    deviation = resampled.std(0)
    moving = deviation > 0
    errors = (resampled - points)[:, moving] / deviation[moving]
    reach = errors.amax(1).quantile((1 + level) / 2) if moving.any() else torch.zeros((), dtype=points.dtype)
    return points - reach * deviation
