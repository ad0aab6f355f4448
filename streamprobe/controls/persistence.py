"""Control `persistence`: the label so far.

Shapes: T tokens in a chain, N tokens of any chains, C labels, P features.
"""

import torch
from torch import Tensor

from streamprobe.controls.piecewise_linear import KNOTS, nearest_knots
from streamprobe.data.tokenize import Chain
from streamprobe.lags import INSIDE, ONSET


def persistence_features(chain: Chain, n_labels: int) -> Tensor:
    """[T, C] from a chain's first C label codes up to each token: see `section_ages`."""
    return section_ages(chain.codes[:, :n_labels])


def section_ages(codes: Tensor) -> Tensor:
    """Label codes [T, C] -> the time in a section or since the last one, in tokens, [T, C] float32.

    In a section, how many of its tokens there were up to this one; behind it minus the tokens since its last one; 0
    where there was none yet.
    """
    place = torch.arange(len(codes))[:, None]
    inside = codes >= INSIDE  # [T, C]
    began = torch.where(codes == ONSET, place, -1).cummax(0).values
    ended = torch.where(inside, place, -1).cummax(0).values
    since_end = torch.where(ended >= 0, ended - place, 0)
    return torch.where(inside, place - began.clamp_min(0) + 1, since_end).float()


def expand_ages(stored: Tensor) -> Tensor:
    """[N, C] of `section_ages` -> [N, P].

    For each label: is t inside; was there a section before; the tokens since this one began or since the last ended.
    """
    inside, after = stored > 0, stored < 0  # [N, C]
    near = nearest_knots(stored.abs() - inside.float())
    features = torch.zeros(*stored.shape, 2 + 2 * len(KNOTS), device=stored.device)
    features[..., 0], features[..., 1] = inside, after
    places = 2 + near.knots + len(KNOTS) * after[..., None]
    return features.scatter_(2, places, near.shares * (inside | after)[..., None]).flatten(1)
