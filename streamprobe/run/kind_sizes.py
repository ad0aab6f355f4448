"""What the samples take that kinds of probes are trained on, behind the passes over all tokens.

Shapes: U drawn tokens, L sites, K columns, D features.
"""

from collections.abc import Sequence

import torch

from streamprobe.activations.drawn import PER_CLASS
from streamprobe.activations.segments import HALO, MOST, OWN
from streamprobe.activations.store import Sizes
from streamprobe.probes.kinds import split_name
from streamprobe.solvers.pointwise import GROUP_BYTES, LAID_OUT_BYTES

SEGMENT_BYTES = 2**31  # that the segments of a split take at most
DRAWN = 8  # times PER_CLASS that tokens are drawn for some column, about
OF_TOKENS, OF_SEGMENTS = ("mlp", "quad", "top_k"), ("attn",)  # kinds by what they are trained on


def most_segments(n_sites: int, n_features: int, dtype: torch.dtype) -> int:
    """How many segments of a split there is room for."""
    return max(1, min(MOST, SEGMENT_BYTES // ((HALO + OWN) * n_sites * n_features * dtype.itemsize)))


def sample_bytes(kinds: Sequence[str], sizes: Sizes, *, n_sites: int, tokens: int, columns: int) -> int:
    """What the samples of these kinds take, of both splits: `tokens` of training, columns K of all folds.

    Of a class that is drawn for one column most is drawn for all, so that U is a few times PER_CLASS.
    """
    families, each = {split_name(kind).family for kind in kinds}, n_sites * sizes.hidden * sizes.dtype.itemsize
    found = 0
    if families & set(OF_TOKENS):
        drawn = min(tokens, DRAWN * PER_CLASS)
        logits = 4 * drawn * n_sites * columns
        found += (
            3 * drawn * each + min(2 * LAID_OUT_BYTES, 8 * drawn * n_sites * sizes.hidden) + logits + 4 * GROUP_BYTES
        )
    if families & set(OF_SEGMENTS):
        segments = most_segments(n_sites, sizes.hidden, sizes.dtype) * (HALO + OWN)
        found += 2 * segments * each + 2 * segments * 5 * columns
    return found
