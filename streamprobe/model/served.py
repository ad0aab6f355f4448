"""One copy of a model in several processes: the first one uses it as if it were its own, and the others follow.

In a process with the whole model these functions do what their names say, without a word to anyone.
Shapes: B chains in a batch, T tokens.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from streamprobe.model.backbone import load_backbone
from streamprobe.model.blocks import decoder_layers
from streamprobe.model.chunks import make_cache
from streamprobe.model.hooks import read
from streamprobe.model.places import every_tensor, main_device
from streamprobe.model.sharded import whole
from streamprobe.system.hardware import exact_float32
from streamprobe.system.workers import DONE, Worker, worker

LOAD, READ, TENSORS = range(DONE + 1, DONE + 4)  # what followers are told to do
NO_CACHE = -1


def load_shared(model: str, layers: Sequence[int], loading: Mapping[str, Any]) -> nn.Module:
    """As `load_backbone`, by all processes that share a copy of the model."""
    among = worker()
    if not among:
        return load_backbone(model, layers, **loading)
    order = json.dumps({"model": model, "layers": list(layers), **loading}).encode()
    among.order(LOAD, len(order))
    among.order_bytes(order, len(order))
    loaded = load_backbone(model, layers, mesh=among.mesh, **loading)

    def announce(_module: nn.Module, _inputs: object, inputs: Mapping[str, Any]) -> None:
        ids, cache = inputs["input_ids"], inputs.get("past_key_values")
        among.order(READ, *ids.shape, NO_CACHE if cache is None else cache.get_seq_length())
        among.pass_on(ids.contiguous())

    loaded.register_forward_pre_hook(announce, with_kwargs=True)
    return loaded


def whole_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The model's tensors by name, one after the other, put together where processes hold shards of them."""
    among = worker()
    if among and among.leads:
        among.order(TENSORS)
    for name, tensor in sorted(every_tensor(model).items()):
        yield name, whole(tensor)


@exact_float32()
def follow() -> None:
    """Does what the first process of this worker says, until that is done."""
    among = worker()
    assert among and not among.leads
    model: Any = None
    cache: Any = None
    while (order := among.order())[0] != DONE:
        what, *numbers = order
        if what == LOAD:
            how = json.loads(among.order_bytes(b"", numbers[0]))
            model = load_backbone(**how, mesh=among.mesh)
        elif what == TENSORS:
            for _ in whole_tensors(model):
                pass
        else:
            cache = _read_along(among, model, numbers, cache)


def _read_along(among: Worker, model: Any, numbers: Sequence[int], cache: Any) -> Any:
    """Takes part in a forward pass; returns the cache that the next one may go on with."""
    batch, tokens, before = numbers
    ids = among.pass_on(torch.empty(batch, tokens, dtype=torch.int64, device=main_device(model)))
    if before <= 0:
        cache = None if before == NO_CACHE else make_cache(model.config)
    read(model, ids, last=decoder_layers(model)[-1], cache=cache)
    return cache
