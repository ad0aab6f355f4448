"""The frozen model, cut off above the deepest probed layer."""

import sys
import warnings
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from streamprobe.errors import InputError, first_line
from streamprobe.system.network import look_for_hub


def _loader(kind: str, model: str, **where: Any) -> Any:
    """`transformers.<kind>.from_pretrained`, with what the user can mend told in one line."""
    import transformers
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    look_for_hub(model)
    try:
        return getattr(transformers, kind).from_pretrained(model, **where)
    except torch.OutOfMemoryError:  # told by whoever launched the run
        raise
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        causes = [error, error.__cause__, error.__context__]
        if any(isinstance(c, GatedRepoError) for c in causes) or "gated repo" in str(error):
            raise InputError(
                f"model {model}, which is gated, without a token that may read it",
                "access to the model",
                "ask for access on its hub page, then `hf auth login` or set HF_TOKEN",
            ) from error
        expected = "a folder with a model or the id of one on the hub that this transformers can load"
        fix = (
            "check --model, --revision and --gguf_file; for a private model set HF_TOKEN; without network give a folder"
        )
        if any(isinstance(c, RepositoryNotFoundError) for c in causes):
            raise InputError(f"model {model}, which is not on the hub", expected, fix) from error
        raise InputError(f"model {model}: {first_line(error)}", expected, fix) from error


def read_config(model: str, **where: Any) -> Any:
    """The model's config (a few kB; no weights).  `where`: revision, gguf_file, trust_remote_code."""
    return _loader("AutoConfig", model, **where)


def load_tokenizer(model: str, **where: Any) -> Any:
    """The model's tokenizer; raises InputError if it cannot tell which characters a token covers."""
    tokenizer = _loader("AutoTokenizer", model, **where)
    if not tokenizer.is_fast:
        raise InputError(
            f"model {model} with the tokenizer {type(tokenizer).__name__}, which has no offset mapping",
            "a fast tokenizer (it says which characters each token covers)",
            "use a model with a tokenizer.json",
        )
    return tokenizer


def check_layers(config: Any, layers: Sequence[int]) -> None:
    """Raises InputError for a model that is no decoder, one that cannot be cut, and a layer that it does not have."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED

    text = config.get_text_config()
    sees_ahead = config.model_type in MASKED and not getattr(config, "is_decoder", False)
    if config.is_encoder_decoder or sees_ahead:
        raise InputError(
            f"a {config.model_type} model, in which a token sees later ones",
            "a causal decoder",
            "choose another --model",
        )
    if getattr(text, "hidden_size_per_layer_input", 0) or getattr(text, "num_kv_shared_layers", 0):
        raise InputError(
            f"a {config.model_type} model, whose blocks share tables or keys across layers",
            "a model that can be cut off above a block",
            "choose another --model",
        )
    n = text.num_hidden_layers
    wrong = [layer for layer in layers if not 0 <= layer < n]
    if wrong:
        raise InputError(
            f"layers {' '.join(map(str, wrong))}",
            f"numbers from 0 to {n - 1} (the model has {n} decoder blocks)",
            "choose others with --layers",
        )


def context(config: Any) -> int:
    """Most tokens that the model takes; without a limit where it names none."""
    return getattr(config.get_text_config(), "max_position_embeddings", None) or sys.maxsize


def check_vocabulary(config: Any, highest: int) -> None:
    """Raises InputError if the model has no embedding for the token id `highest`."""
    size = config.get_text_config().vocab_size
    if highest >= size:
        raise InputError(
            f"token {highest}, which the model's vocabulary of {size} has not",
            "the tokenizer of this model",
            "check the files of --model",
        )


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


def truncate(config: Any, n_layers: int) -> Any:
    """Makes `config` (changed in place) describe the model's first `n_layers` decoder blocks.

    Lists with an entry per block (layer_types and its like) are cut with it.
    """
    text = config.get_text_config()
    full = text.num_hidden_layers
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == full:
            setattr(text, name, value[:n_layers])
    text.num_hidden_layers = n_layers
    return config


def check_device(device_map: str, attn_implementation: str | None = None) -> None:
    """Raises InputError for a device that this machine does not have, and for attention that takes minutes on it."""
    if attn_implementation == "flex_attention" and (device_map.startswith("cpu") or not torch.cuda.is_available()):
        raise InputError(
            "attn_implementation flex_attention on a CPU, for which it is compiled for minutes",
            "sdpa or eager",
            "drop --attn_implementation",
        )
    if device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
        return
    try:
        usable = torch.empty(0, device=device_map).device.type != "meta"
    except (RuntimeError, AssertionError):  # an assertion where torch is built without that kind
        usable = False
    if not usable:
        raise InputError(
            f"device_map {device_map}, which this machine cannot compute on", "auto, cpu, cuda, ...", "fix --device_map"
        )


def load_backbone(
    model: str,
    layers: Sequence[int] | None,
    dtype: str = "auto",
    attn_implementation: str | None = None,
    quantization: str = "none",
    device_map: str = "auto",
    **where: Any,
) -> nn.Module:
    """The model's blocks 0 .. max(layers), frozen, in eval mode, without an LM head; all with it if None.

    quantization: `none`, `8bit` or `4bit` (bitsandbytes: LLM.int8, or NF4 that computes in `dtype`).  The blocks'
    outputs are bit-equal to those of the full model.  Raises InputError where the model cannot be loaded or does not
    fit.
    """
    from transformers import BitsAndBytesConfig
    from transformers.utils import logging

    check_device(device_map, attn_implementation)
    config = read_config(model, **where)
    check_layers(config, layers or [])
    if layers is not None:
        truncate(config, max(layers) + 1)
    compute = pick_dtype(dtype)
    options: dict[str, Any] = {"config": config, "dtype": compute, "device_map": device_map, **where}
    if attn_implementation:
        options["attn_implementation"] = attn_implementation
    if quantization == "8bit":
        warnings.filterwarnings("ignore", message="MatMul8bitLt")  # said at every call
        options["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    elif quantization == "4bit":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute
        )
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # no table of the weights that were cut off; missing ones are looked at below
    try:
        kind = "AutoModel" if layers is not None else "AutoModelForCausalLM"
        backbone, info = _loader(kind, model, output_loading_info=True, **options)
    finally:
        logging.set_verbosity(verbosity)
    if info["missing_keys"]:
        raise InputError(
            f"model {model} without the weights {', '.join(sorted(info['missing_keys'])[:3])}",
            "a checkpoint with every weight of the probed blocks",
            "check --model and --gguf_file",
        )
    places = set((getattr(backbone, "hf_device_map", None) or {}).values())
    if "disk" in places or ("cpu" in places and len(places) > 1):
        raise InputError(
            f"model {model}, which does not fit into memory",
            "room for its blocks in device memory and RAM",
            "use --quantization 4bit, lower layers, or a larger device",
        )
    return backbone.eval().requires_grad_(False)


def weight_bytes(config: Any, layers: Sequence[int], trust_remote_code: bool = False) -> dict[str, int]:
    """Bytes of the model's blocks 0 .. max(layers) in float32, bf16, 8-bit and 4-bit, from its config alone.

    Quantized as `load_backbone` does: matrices in 8 bits with a float32 scale a row, or in 4 bits with one for each 64
    weights; embeddings, norms and biases stay in bf16.
    """
    from transformers import AutoModel
    from transformers.pytorch_utils import Conv1D

    def empty(dtype: torch.dtype) -> nn.Module:
        cut = truncate(deepcopy(config), max(layers) + 1)
        with torch.device("meta"):
            return AutoModel.from_config(cut, dtype=dtype, trust_remote_code=trust_remote_code)

    def size(model: nn.Module) -> int:
        return sum(t.nbytes for t in (*model.parameters(), *model.buffers()))

    model = empty(torch.bfloat16)
    modules: list[Any] = [m for m in model.modules() if type(m) in (nn.Linear, Conv1D)]
    matrices: list[Tensor] = [m.weight.T if type(m) is Conv1D else m.weight for m in modules]  # [out, in]
    rest = size(model) - sum(w.nbytes for w in matrices)
    return {
        "float32": size(empty(torch.float32)),
        "bf16": size(model),
        "8-bit": rest + sum(w.numel() + 4 * len(w) for w in matrices),
        "4-bit": rest + sum(-(-w.numel() // 2) + 4 * -(-w.numel() // 64) for w in matrices),
    }


def loaded_bytes(model: nn.Module) -> int:
    """Bytes of the model's parameters, buffers and scales of quantized weights, shared ones counted once."""
    tensors = [*model.state_dict().values(), *model.buffers()]
    return sum({t.data_ptr(): t.nbytes for t in tensors}.values())


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The model's decoder blocks in order: its one list of `num_hidden_layers` modules (`layers`, `h`, ...)."""
    n = model.config.get_text_config().num_hidden_layers  # type: ignore[union-attr, operator]
    lists = [
        m for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == n and "vision" not in name
    ]
    assert lists, f"{type(model).__name__} has no list of {n} blocks"
    return list(lists[0])


def make_cache(config: Any) -> Any:
    """An empty cache of keys and values, to read a text in chunks; blocks with a window hold no more than that.

    Raises InputError for a model whose later chunks could change what earlier ones held: one with a running state, or
    with rotary frequencies that depend on the length of the text.
    """
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    cache = DynamicCache(config=config)
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    kinds = {r.get("rope_type") for r in (rope, *rope.values()) if isinstance(r, dict)}
    plain = all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers)
    if not plain or kinds & {"dynamic", "longrope"}:
        raise InputError(
            f"chains longer than max_batch_tokens, and a {config.model_type} model, which cannot read them in chunks",
            "plain or sliding attention, and rotary frequencies that do not depend on the length of the text",
            "raise --max_batch_tokens to the length of the longest chain",
        )
    return cache
