"""What is done to a running model's residual stream, as context managers.

layer i: the output of decoder block i, counted from 0 (`hidden_states[i + 1]`; TransformerLens' `hook_resid_post`).
Shapes: B chains in a batch, T tokens in this forward pass, D hidden size.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

Output = Tensor | tuple[Tensor, ...]  # a block may return a tensor or a tuple that starts with one


@contextmanager
def tap(blocks: Mapping[int, nn.Module]) -> Iterator[dict[int, Tensor]]:
    """Yields a dict that holds, after each forward pass, every tapped block's output [B, T, D], keyed as `blocks`.

    The tensors are the model's own (detached, not copied) and are replaced by the next forward pass.  All hooks are
    gone on exit, also after an exception.
    """
    taken: dict[int, Tensor] = {}

    def keep(key: int):
        def hook(_module: nn.Module, _inputs: object, output: Output) -> None:
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


@contextmanager
def steer(
    block: nn.Module, add: Tensor | None = None, ablate: Tensor | None = None, newest: bool = False
) -> Iterator[None]:
    """Changes the block's output, for the rest of the model and for every `tap`, also one that was there before.

    `ablate` is projected out: x - (x . u) u with u = ablate / |ablate|.  `add` is added, after that.  Both are [D], or
    [B, 1, D] for a vector for each chain.  With `newest` only the last token of each forward pass is changed: where a
    model generates with a cache, the last one of the prompt and every one that it writes.  The hook is gone on exit,
    also after an exception.  Of two nested ones the inner acts first.
    """

    def change(x: Tensor) -> Tensor:
        y = x.float()
        if ablate is not None:
            unit = nn.functional.normalize(ablate.to(y), dim=-1)
            y = y - (y * unit).sum(-1, keepdim=True) * unit
        return (y if add is None else y + add.to(y)).to(x.dtype)

    def hook(_module: nn.Module, _inputs: object, output: Output) -> Output:
        x = output[0] if isinstance(output, tuple) else output
        changed = torch.cat([x[:, :-1], change(x[:, -1:])], 1) if newest else change(x)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    handle = block.register_forward_hook(hook, prepend=True)  # before every tap
    try:
        yield
    finally:
        handle.remove()
