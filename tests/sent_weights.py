"""Blocks that wait in RAM and are sent to a device in each forward pass, where the only device is the CPU.

    plan = {"embed_tokens": "cpu:0", "layers.0": "cpu:0", "layers.1": "cpu", "norm": "cpu", "rotary_emb": "cpu:0"}
    with accelerate_plans(plan) as sent:        # what `device_map: auto` finds; `cpu:0` stands for a GPU, `cpu` for RAM
        model = load_backbone(folder, [1])
    sent.alive()                                # how many of the copies that were sent are still there

accelerate's own hooks do the work, as in its `dispatch_model`, which takes no CPU for the device that blocks are sent to.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from unittest.mock import patch

from accelerate.hooks import attach_align_device_hook_on_blocks
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

DEVICE = "cpu:0"


class Sent(Mapping[str, Tensor]):
    """Weights in RAM, of which a copy is sent whenever one is asked for."""

    def __init__(self) -> None:
        self.weights: dict[str, Tensor] = {}
        self.copies: list[StorageWeakRef] = []

    def __getitem__(self, name: str) -> Tensor:
        copy = self.weights[name].clone()
        self.copies.append(StorageWeakRef(copy.untyped_storage()))
        return copy

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)

    def alive(self) -> int:
        """How many of the copies are still in memory."""
        return sum(not copy.expired() for copy in self.copies)

    def dispatch(self, model: nn.Module, device_map: dict[str, str], **_: object) -> None:
        """Lets the modules that the plan has in RAM be sent, each for as long as it computes."""
        self.weights = {name: tensor.detach() for name, tensor in model.state_dict().items()}
        attach_align_device_hook_on_blocks(
            model,
            execution_device=dict.fromkeys([*device_map, ""], "cpu"),
            offload={name: place != DEVICE for name, place in device_map.items()},
            weights_map=self,
        )
        model.hf_device_map = device_map


@contextmanager
def accelerate_plans(plan: Mapping[str, str]) -> Iterator[Sent]:
    """Models that are loaded in this context lie as the plan says."""
    sent = Sent()
    inferred = patch("transformers.modeling_utils._get_device_map", lambda *_: dict(plan))
    with inferred, patch("transformers.integrations.accelerate.dispatch_model", sent.dispatch):
        yield sent
