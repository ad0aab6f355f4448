"""Places in a decoder block where activations can be read.

`resid_pre` is what enters a block, `attn_out` what its attention adds to the residual stream, `resid_mid` the stream
between attention and MLP, `mlp_out` what its MLP adds, `resid_post` what the block returns: the names and the meaning
are TransformerLens'.  Any other point is the path of a module in the block, such as `mlp.down_proj`: what it returns.
"""

from typing import NamedTuple

RESID_PRE, RESID_POST = "resid_pre", "resid_post"
ADDED = ("attn_out", "resid_mid", "mlp_out")  # at which module they are is seen in what a block computes
POINTS = (RESID_PRE, *ADDED, RESID_POST)


class Place(NamedTuple):
    """Where to read: a point of a decoder block."""

    layer: int
    point: str = RESID_POST
    path: str = ""  # of the module in the model, where the point is one in the block

    def __str__(self) -> str:
        return f"layer {self.layer}" if self.point == RESID_POST else f"{self.point} of layer {self.layer}"
