"""The matrices of Newton's method: what they are made for, what is added to them, and what is wrong with some.

Shapes: L layers, K columns, k those of a place, E = D + 1: a weight for each feature, and the bias.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from streamprobe.errors import InputError
from streamprobe.probes.sites import Site
from streamprobe.solvers.curvature import Place
from streamprobe.solvers.newton_sums import EXACT
from streamprobe.system.hardware import send

MANY = 16  # in units of E: where the curvature of so many tokens shapes H, it is much like that of other columns
HAND_MADE_L2 = 1e-4  # penalty on the weights of features that are not scaled, unless `l2` is smaller


def share_places(expected: Tensor, effective: Tensor, size: int, *, every: bool) -> list[list[Place]]:
    """What every column's matrix [E, E] is made for, [L][K]: itself, or those of like size that many tokens shape, too.

    expected [L, K] is the sum of the curvature of its tokens, effective [L, K] of how many that is, `size` E; `every`:
    all columns of a layer share one.
    """
    many = ((effective > MANY * size) & (size > EXACT)).tolist()
    places = []
    for i, sizes in enumerate(expected.log2().floor().tolist()):
        first: dict[tuple[float, bool], Place] = {}
        groups = [(0, True) if every else (like, True) if many[i][k] else (k, False) for k, like in enumerate(sizes)]
        places.append([first.setdefault(group, Place(i, k)) for k, group in enumerate(groups)])
    return places


def columns_of_places(places: Sequence[Sequence[Place]], moving: Tensor) -> dict[Place, Tensor]:
    """The columns [k] of every place of which one moves on: those that do, by moving [L, K] bool."""
    found: dict[Place, list[int]] = {}
    for own, moves in zip(places, moving.tolist(), strict=True):
        for k, place in enumerate(own):
            if moves[k]:
                found.setdefault(place, []).append(k)
    numbers = send(torch.tensor([k for own in found.values() for k in own], dtype=torch.int64), moving.device)
    return dict(zip(found, numbers.split([len(own) for own in found.values()]), strict=True))


def penalty_of_weights(l2: float, size: int, n_hand_made: int) -> Tensor:
    """Of d J / d w for each of E weights, the bias last, float64; those of features made by hand before it."""
    by_hand = [min(l2, HAND_MADE_L2)] * n_hand_made
    return 2 * torch.tensor([l2] * (size - 1 - n_hand_made) + [*by_hand, 0], dtype=torch.float64)


def refusal(site: Site) -> InputError:
    """What is said of a place whose matrix cannot be factorised."""
    return InputError(
        f"activations of {site.title} whose Gram matrix cannot be factorised",
        "finite activations, and a penalty that outweighs rounding",
        "use another --dtype, raise --l2, or leave --standardize on",
    )
