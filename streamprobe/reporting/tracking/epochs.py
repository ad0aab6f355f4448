"""Curves of the probes that begin at the linear ones and are trained in epochs over a sample of tokens.

Shapes: L sites, K columns, P probes, E epochs with the start.
"""

import numpy as np
from torch import Tensor

from streamprobe.probes.base import Probes
from streamprobe.reporting.tracking.tags import place, tag

OVER_LINEAR = "loss_over_linear"
SPLITS = ("train", "validation")


def curves_over_linear(probes: Probes, losses: Tensor, every: bool) -> dict[str, list[float]]:
    """How far the loss of probes is above that of the linear ones at which they begin, by tag: E values each.

    losses [L, K, 2, E] on training and validation tokens; where they are NaN is no curve.  There is one of the median
    of all probes and one of the lowest at each epoch; `every`: of each probe, too.
    """
    curves: dict[str, list[float]] = {}
    for split, own in zip(SPLITS, (losses - losses[..., :1]).double().cpu().unbind(2), strict=True):
        known = own[~own.isnan().any(-1)].numpy()  # [P, E]
        if len(known):
            name = f"{OVER_LINEAR}/{split}/{probes.kind}"
            curves |= {f"{name}/median": np.median(known, 0).tolist(), f"{name}/lowest": known.min(0).tolist()}
        if every:
            curves |= _of_each(split, probes, own)
    return curves


def _of_each(split: str, probes: Probes, values: Tensor) -> dict[str, list[float]]:
    """The curve of each probe, of values [L, K, E]."""
    found = {}
    for site, row in zip(probes.sites, values, strict=True):
        for column, curve in zip(probes.columns, row, strict=True):
            family = f"{OVER_LINEAR}/{split}/{probes.kind}/{column.label}/{column.target}"
            if not curve.isnan().any():
                found[tag(family, column.lag, place(site, column))] = curve.tolist()
    return found
