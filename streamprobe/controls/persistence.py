"""Control `persistence`: the label so far.

Shapes: T tokens in a chain, C labels, P features.
"""

import torch
from torch import Tensor

from streamprobe.controls.piecewise_linear import piecewise_linear
from streamprobe.data.tokenize import Chain
from streamprobe.lags import INSIDE, ONSET


def persistence_features(chain: Chain, n_labels: int) -> Tensor:
    """[T, P] from a chain's first C label codes up to each token: the time in a section or since the last one.

    For each label: is t inside; was there a section before; the tokens since this one began or since the last ended.
    """
    codes = chain.codes[:, :n_labels]  # [T, C]
    place = torch.arange(len(codes))[:, None]
    inside = codes >= INSIDE  # [T, C]
    began = torch.where(codes == ONSET, place, -1).cummax(0).values
    ended = torch.where(inside, place, -1).cummax(0).values
    before = ended >= 0
    features = []
    for c in range(codes.shape[1]):
        since = torch.where(inside[:, c], place[:, 0] - began[:, c].clamp_min(0), place[:, 0] - ended[:, c])
        flags = torch.stack([inside[:, c], before[:, c] & ~inside[:, c]], dim=1).float()
        features.append(torch.cat([flags, (piecewise_linear(since)[:, None] * flags[:, :, None]).flatten(1)], dim=1))
    return torch.cat(features, dim=1)
