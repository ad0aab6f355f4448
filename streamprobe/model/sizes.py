"""What the model takes in memory."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from streamprobe.model.blocks import drop_blocks
from streamprobe.model.loading import build_empty, readable_errors
from streamprobe.model.places import every_tensor
from streamprobe.model.sharded import own_part


def weight_bytes(config: Any, layers: Sequence[int], **where: Any) -> dict[str, int]:
    """Bytes of the model's blocks 0 .. max(layers) in float32, bf16, 8-bit and 4-bit, from its config alone.

    Quantized as `load_backbone` does: matrices in 8 bits with a float32 scale a row, or in 4 bits with one for each 64
    weights; embeddings, norms and biases stay in bf16.  `where`: revision, trust_remote_code.
    """
    from transformers.pytorch_utils import Conv1D

    def cut(dtype: torch.dtype) -> nn.Module:
        with readable_errors(config.name_or_path or config.model_type):
            model = build_empty(config, dtype, **where)
            drop_blocks(model, max(layers) + 1)
        return model

    def size(model: nn.Module) -> int:
        return sum(t.nbytes for t in (*model.parameters(), *model.buffers()))

    model = cut(torch.bfloat16)
    modules: list[Any] = [m for m in model.modules() if type(m) in (nn.Linear, Conv1D)]
    matrices: list[Tensor] = [m.weight.T if type(m) is Conv1D else m.weight for m in modules]  # [out, in]
    rest = size(model) - sum(w.nbytes for w in matrices)
    return {
        "float32": size(cut(torch.float32)),
        "bf16": size(model),
        "8-bit": rest + sum(w.numel() + 4 * len(w) for w in matrices),
        "4-bit": rest + sum(-(-w.numel() // 2) + 4 * -(-w.numel() // 64) for w in matrices),
    }


def loaded_bytes(model: nn.Module) -> int:
    """Bytes of the model's parameters, buffers and scales of quantized weights, shared ones counted once.

    Of a model that several processes share, this one's.
    """
    tensors = [own_part(t) for t in (*every_tensor(model).values(), *model.buffers())]
    return sum({t.data_ptr(): t.nbytes for t in tensors}.values())
