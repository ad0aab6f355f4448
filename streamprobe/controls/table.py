"""What a probe must beat, made of the same chains and fed by the same passes.

    embed        the token's embedding, as one more layer: what the current word gives
    text         averages of the last 8, 32 and 128 tokens' embeddings, as one more layer: what recent words give
    position     the token's place in the response
    persistence  the label at t and the time since its last section, where the label asked for lies ahead: what is known
                 to someone who watches the sections go by
    permuted     the probed layers, for labels shifted within each chain: what the chain as a whole gives

None of them knows anything of the tokens after t.

Shapes: T tokens in a chain, C labels, N tokens, D hidden size, P features.
"""

from collections.abc import Sequence

from torch import Tensor

from streamprobe.controls.persistence import persistence_features
from streamprobe.controls.position import position_features

BESIDE = ("position", "persistence")  # those that are features on the side


def side_features(n_tokens: int, start: int, codes: Tensor, names: Sequence[str]) -> list[Tensor]:
    """Those of BESIDE that are in `names`, [T, P] each: see the functions of these names."""
    position = [position_features(n_tokens, start)] if "position" in names else []
    return position + ([persistence_features(codes)] if "persistence" in names else [])
