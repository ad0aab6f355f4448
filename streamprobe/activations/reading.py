"""Which places of a model the sites of probes are, and what was read at several of them side by side.

Shapes: N tokens, L sites, W width of a site, D width of the widest.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from streamprobe.model.points import POINTS, Place
from streamprobe.probes.sites import RESID_POST, Site


def site_of(place: Place) -> Site:
    """The site of what is read at a place."""
    name = "layer" if place.point == RESID_POST else place.point
    return Site(place.path or f"{name}{place.layer:02d}", place.layer, point=place.point)


def places_of(sites: Iterable[Site]) -> list[Place]:
    """The places of sites that are no controls."""
    return [
        Place(site.layer, site.point, "" if site.point in POINTS else site.name)
        for site in sites
        if site.layer is not None and not site.is_control
    ]


def side_by_side(acts: Sequence[Tensor], width: int = 0) -> Tensor:
    """What was read at each site, [N, W], as [N, L, D]: narrower ones, and what is below `width`, end in zeros."""
    widest = max(width, *(x.shape[-1] for x in acts))
    return torch.stack([pad(x, (0, widest - x.shape[-1])) for x in acts], 1)
