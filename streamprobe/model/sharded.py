"""A model of which several processes hold a shard each: what transformers is told and asked for that.

Every matrix that transformers' own plan of tensor parallelism names is cut along one side; a block's output is whole,
and the same, in every process.
"""

from typing import Any

from torch import Tensor

from streamprobe.errors import InputError
from streamprobe.model.blocks import text_config


def check_plan(empty: Any, size: int) -> None:
    """Raises InputError for a model that transformers cannot cut into so many shards.  `empty`: see `build_empty`."""
    import transformers

    try:
        from transformers.distributed.tensor_parallel import get_kv_heads_per_rank
        from transformers.distributed.utils import TransformersDeviceMesh  # noqa: F401
    except ImportError as error:
        got = f"tp_size {size} with transformers {transformers.__version__}"
        raise InputError(got, "5.23 or later", "pip install -U transformers, or drop --tp_size") from error
    plan, config = getattr(empty, "tp_plan", None), text_config(empty.config)
    if not plan:
        raise InputError(
            f"tp_size {size} with a {config.model_type} model, which transformers has no plan to shard",
            "a model with a plan of tensor parallelism, such as Llama, Qwen or Gemma",
            "drop --tp_size, or choose another --model",
        )
    heads: Any = getattr(config, "num_key_value_heads", None) or getattr(config, "num_attention_heads", size)
    if get_kv_heads_per_rank(plan, heads, size) is None:
        raise InputError(
            f"tp_size {size} with a model of {heads} key and value heads",
            "a number of processes that divides that of the heads",
            "correct --tp_size",
        )


def sharding(empty: Any, size: int) -> dict[str, Any]:
    """Options of `from_pretrained` that shard the model `empty`; its embedding stays whole in every process.

    Controls look tokens up in the embedding while no forward pass runs.
    """
    from transformers.distributed import DistributedConfig

    embedding = empty.get_input_embeddings()
    names = [name for name, module in empty.named_modules() if module is embedding]
    rules = {name: "replicate" for name in names if name in empty.tp_plan}
    return {"distributed_config": DistributedConfig(tp_size=size, tp_plan=rules or "auto")}


def on_mesh(kind: Any, mesh: Any) -> Any:
    """The class of a model `kind`, but loaded by the processes of one worker of the mesh, where it would take all."""
    from transformers.distributed.utils import TransformersDeviceMesh

    def prepare(_: Any, distributed_config: Any, device_map: Any = None) -> Any:
        return distributed_config, device_of(mesh), TransformersDeviceMesh(mesh, mesh)

    return type(
        kind.__name__, (kind,), {"prepare_distribute_model": classmethod(prepare), "__module__": kind.__module__}
    )


def device_of(mesh: Any) -> Any:
    """The device on which this process holds its shards."""
    import torch

    return (
        torch.device(mesh.device_type, torch.cuda.current_device())
        if mesh.device_type == "cuda"
        else torch.device("cpu")
    )


def whole(tensor: Any) -> Tensor:
    """A tensor of which this process may hold a shard, put together; all processes of a worker have to ask for it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def own_part(tensor: Any) -> Tensor:
    """What this process holds of a tensor."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def plain(output: Any) -> Tensor:
    """What a block returned, as a tensor without a mesh.  Raises InputError where this process has but a part of it."""
    if not hasattr(output, "placements"):
        return output
    if not all(placement.is_replicate() for placement in output.placements):
        raise InputError(
            f"a block whose output is cut over processes ({output.placements})",
            "a plan of tensor parallelism in which blocks return the whole residual stream",
            "drop --tp_size, or choose another --model",
        )
    return output.to_local()
