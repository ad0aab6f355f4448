"""Where the parts of a model lie, and on which device they compute.

accelerate (`device_map: auto`) may spread a model over several devices.  Blocks for which they have no room wait in
RAM: their weights are sent to a device in each forward pass, by a hook, and are on the device `meta` in between.
"""

from collections.abc import Iterator
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from streamprobe.model.blocks import decoder_layers


def _sender(module: nn.Module) -> Any:
    """accelerate's hook that sends the module's own weights to a device, or None where they stay on theirs."""
    hook = getattr(module, "_hf_hook", None)
    return next((each for each in getattr(hook, "hooks", [hook]) if getattr(each, "offload", False)), None)


def main_device(module: nn.Module) -> torch.device:
    """The device on which the first weights of a module compute.

    That of a model takes its token ids, and the activations of all its layers are gathered there.
    """
    for part in module.modules():
        for weight in part.parameters(recurse=False):
            sender = _sender(part)
            return torch.device(sender.execution_device) if sender else weight.device
    raise AssertionError("a module without weights lies nowhere")


def place_of(module: nn.Module) -> str:
    """Where a module's weights lie, in words: `cuda:0`, or `cpu (sent to cuda:0 for each batch)`."""
    return " and ".join(dict.fromkeys(_places(module)))


def _places(module: nn.Module) -> Iterator[str]:
    """Where each weight of a module lies."""
    for part in module.modules():
        for weight in part.parameters(recurse=False):
            sender = _sender(part)
            to = torch.device(sender.execution_device) if sender else None
            yield f"cpu (sent to {to} for each batch)" if to else str(weight.device)


def waits_in_ram(model: nn.Module) -> bool:
    """Whether some weights of the model wait in RAM and are sent to a device in each forward pass."""
    return hasattr(model, "_hf_hook") and any(map(_sender, model.modules()))


def put_back(model: nn.Module, last: nn.Module | None) -> None:
    """Lets weights that were sent to a device wait in RAM again, after a forward pass that ended behind a block `last`.

    accelerate does so itself behind every module that has ended; those around the block have not.
    """
    if last is not None and hasattr(model, "_hf_hook"):
        for part in model.modules():
            sender = _sender(part)
            if sender and part is not last and last in part.modules():
                sender.post_forward(part, None)


def describe_places(model: nn.Module) -> str:
    """Which decoder blocks lie where, such as `blocks 0-9 on cuda:0, 10-16 on cuda:1`; empty for a single device."""
    if len(set(_places(model))) < 2:
        return ""
    runs, first = [], 0
    for place, blocks in groupby(map(place_of, decoder_layers(model))):
        last = first + len(list(blocks)) - 1
        runs.append(f"{first}-{last} on {place}" if last > first else f"{first} on {place}")
        first = last + 1
    return "blocks " + ", ".join(runs)


def every_tensor(model: nn.Module) -> dict[str, Tensor]:
    """The model's state dict, in which weights that are sent to a device are those that wait in RAM."""
    tensors: dict[str, Tensor] = dict(model.state_dict())
    for name in tensors:
        owner, _, own_name = name.rpartition(".")
        sender = _sender(model.get_submodule(owner)) if tensors[name].is_meta else None
        if sender:
            tensors[name] = sender.weights_map[own_name]
    return tensors
