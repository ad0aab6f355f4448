"""The frozen model, cut off above the deepest probed layer.

The model is built at its full depth, without memory, and the blocks behind the deepest probed one are dropped before
the weights are read: what a block computes may depend on the depth (MiniCPM3 scales by it, GPT-NeoX-Japanese has a bias
in its last block alone).  The config is left as it is, and a forward pass ends behind the last block that is there.
Shapes: B chains in a batch, T tokens, D hidden size.
"""

import logging
import sys
import warnings
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import nn

from streamprobe.errors import InputError
from streamprobe.model.blocks import block_list, check_layers, drop_blocks
from streamprobe.model.gguf_file import parsed_once
from streamprobe.model.loading import SPREADING, build_empty, check_device, read_config, readable_errors
from streamprobe.model.sharded import check_plan, on_mesh, sharding
from streamprobe.system.hardware import free_bytes
from streamprobe.system.shipped import shipped_path


def pick_dtype(dtype: str) -> torch.dtype:
    """`auto` is bfloat16 where the hardware multiplies it natively, else float32; other names are torch's."""
    if dtype != "auto":
        return getattr(torch, dtype)
    if torch.cuda.is_available():
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
        native = any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return torch.bfloat16 if native else torch.float32


def _cut_class(whole: Any, n: int) -> Any:
    """The class `whole`, but built without the blocks behind the first n."""

    def init(self: Any, *args: Any, **options: Any) -> None:
        whole.__init__(self, *args, **options)
        drop_blocks(self, n)

    return type(whole.__name__, (whole,), {"__init__": init, "__module__": whole.__module__})


def load_backbone(
    model: str,
    layers: Sequence[int] | None,
    dtype: str = "auto",
    *,
    attn_implementation: str | None = None,
    quantization: str = "none",
    device_map: str = "auto",
    mesh: Any = None,
    **where: Any,
) -> nn.Module:
    """The model to probe: its blocks 0 .. max(layers), frozen, in eval mode, without an LM head; all with it if None.

    The blocks' outputs are bit-equal to those of the full model.  dtype: see `pick_dtype`.  quantization: `none`,
    `8bit` or `4bit` (bitsandbytes: LLM.int8, or NF4 that computes in `dtype`).  device_map, attn_implementation and
    `where` (revision, gguf_file, trust_remote_code) are transformers'.  With a mesh (see `Worker`) this process loads
    its shard alone.  Raises InputError where the model cannot be loaded or does not fit.
    """
    check_device(device_map, attn_implementation)
    config, folder = read_config(model, **where), shipped_path(model)
    check_layers(config, layers or [])
    options = {"device_map": device_map, "ignore_mismatched_sizes": True, **_numbers(dtype, quantization), **where}
    if attn_implementation:
        options["attn_implementation"] = attn_implementation
    _hide_progress_in_files()
    blocks = None if layers is None else max(layers) + 1
    with readable_errors(model), parsed_once(where.get("gguf_file"), blocks):
        if blocks is None:
            loaded = _whole_kind(config).from_pretrained(folder, config=config, output_loading_info=True, **options)
        else:
            loaded = _load_cut(folder, config, blocks, options, mesh=mesh)
    backbone, info = loaded
    _check_loaded(model, backbone, info)
    _keep_packing(backbone)
    return backbone.eval().requires_grad_(False)


def _hide_progress_in_files() -> None:
    """Standard error that is no terminal gets no progress bar of the library."""
    from transformers.utils.logging import disable_progress_bar

    if not sys.stderr.isatty():
        disable_progress_bar()


def _numbers(dtype: str, quantization: str) -> dict[str, Any]:
    """Options of `from_pretrained` for the format of the numbers."""
    from transformers import BitsAndBytesConfig

    compute = pick_dtype(dtype)
    if quantization != "none":
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # which kernels there are, what is cast to what
    if quantization == "8bit":
        warnings.filterwarnings("ignore", message="MatMul8bitLt")  # said at every call, in one way or the other
        return {"dtype": compute, "quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    if quantization == "4bit":
        four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)
        return {"dtype": compute, "quantization_config": four}
    return {"dtype": compute}


def _keep_packing(backbone: nn.Module) -> None:
    """Leaves 4-bit weights on a CPU packed as they were read.

    bitsandbytes would pack them anew for a kernel of its own in the first forward pass, and unpack them wrongly where
    `state_dict` is asked for (0.50.2), so that later passes compute something else.  That kernel rounds to bfloat16
    whatever the dtype, and reads a text in several times the time.
    """
    packed: list[Any] = [m for m in backbone.modules() if hasattr(m, "support_avx512bf16_for_cpu")]
    for module in packed:
        module.support_avx512bf16_for_cpu = False


def _whole_kind(config: Any) -> Any:
    """What loads this model with its LM head."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto import modeling_auto as auto

    causal, seeing = auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    sees = config.model_type in seeing and config.model_type not in causal
    return AutoModelForImageTextToText if sees else AutoModelForCausalLM


def _load_cut(model: str, config: Any, n: int, options: dict[str, Any], *, mesh: Any = None) -> tuple[Any, Any]:
    """The model's first n blocks and what transformers says about its loading; dropped blocks' weights are not read."""
    config = deepcopy(config)
    where = {name: options[name] for name in ("trust_remote_code", "revision") if options.get(name)}
    empty = build_empty(config, options["dtype"], **where)
    whole, shards = type(empty), mesh["tp"].size() if mesh else 1
    if shards > 1:
        check_plan(empty, shards)
    _check_room(model, empty, n, options, shards=shards)
    if not isinstance(empty.config, type(config)):  # AutoModel takes the text part of this config
        quantized, config = getattr(config, "quantization_config", None), config.get_text_config()
        if quantized is not None:
            config.quantization_config = quantized
    cut = _cut_class(whole, n)
    if shards > 1:
        cut, options = on_mesh(cut, mesh), {**options, "device_map": None, **sharding(empty, shards)}
    backbone, info = cut.from_pretrained(model, config=config, output_loading_info=True, **options)
    backbone.__class__ = whole
    return backbone, info


def _check_room(model: str, empty: nn.Module, n: int, options: dict[str, Any], *, shards: int = 1) -> None:
    """Raises InputError where there is no room for the weights, before they are read; a container may be killed.

    Where accelerate spreads the model they may lie on every device and on the host.  What is kept of a GGUF file is
    turned into float32 first.  Of one device torch says what does not fit, and what quantized weights take is known
    when they are there.  Of `shards` this process reads one.
    """

    dropped = {id(p) for p in nn.ModuleList(list(block_list(empty))[n:]).parameters()}
    kept = [p for p in empty.parameters() if id(p) not in dropped]
    needed = sum(p.nbytes for p in kept) // shards
    if options.get("gguf_file"):
        needed += sum(4 * p.numel() for p in kept)
    on_host = options["device_map"] == "cpu" or not torch.cuda.is_available()
    spread = not on_host and options["device_map"] in SPREADING and shards == 1
    devices = [torch.device("cuda", i) for i in range(torch.cuda.device_count())] if spread else []
    free = sum(map(free_bytes, [torch.device("cpu"), *devices]))
    if (on_host or spread) and "quantization_config" not in options and needed > free:
        raise InputError(
            f"model {model}, whose first {n} blocks take {needed / 1e9:.2f} GB while they are read",
            f"at most the {free / 1e9:.2f} GB of memory that are free",
            "free memory, use --dtype bfloat16, or probe lower layers",
        )


def _check_loaded(model: str, backbone: nn.Module, info: dict[str, Any]) -> None:
    """Raises InputError for weights that are missing or of another size, and for a model that is not all in memory.

    What accelerate leaves in RAM is sent to a device in each forward pass, which memory is fast enough for.
    """
    if info["missing_keys"]:
        raise InputError(
            f"model {model} without the weights {', '.join(sorted(info['missing_keys'])[:3])}",
            "a checkpoint with every weight of the probed blocks",
            "check --model and --gguf_file",
        )
    if info["mismatched_keys"]:
        name, got, expected = min(info["mismatched_keys"])
        raise InputError(
            f"model {model}, whose file has {name} of size {list(got)}",
            f"{list(expected)}, as its config says",
            "check the files of --model",
        )
    if "disk" in (getattr(backbone, "hf_device_map", None) or {}).values():
        raise InputError(
            f"model {model}, part of which does not fit into memory: each forward pass would read it from the disk",
            "room for its blocks in device memory and RAM",
            "use --quantization 4bit, lower layers, or a larger device",
        )
