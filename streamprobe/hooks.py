"""What is done to a running model's residual stream, as context managers.

layer i: the output of decoder block i, counted from 0 (`hidden_states[i + 1]`; TransformerLens' `hook_resid_post`).
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn


@contextmanager
def tap(blocks: Mapping[int, nn.Module]) -> Iterator[dict[int, Tensor]]:
    """Yields a dict that holds, after each forward pass, every tapped block's output [B, T, D], keyed as `blocks`.

    The tensors are the model's own (detached, not copied) and are replaced by the next forward pass.  A block may
    return a tensor or a tuple that starts with one.  All hooks are gone on exit, also after an exception.
    """
    taken: dict[int, Tensor] = {}

    def keep(key: int):
        def hook(_module: nn.Module, _inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
            taken[key] = (output[0] if isinstance(output, tuple) else output).detach()

        return hook

    handles = []
    try:
        for key, block in blocks.items():
            handles.append(block.register_forward_hook(keep(key)))
        yield taken
    finally:
        for handle in handles:
            handle.remove()
        taken.clear()
