"""The frozen model, cut off above the deepest probed layer.

The model is built at its full depth, without memory, and the blocks behind the deepest probed one are dropped before
the weights are read: what a block computes may depend on the depth (MiniCPM3 scales by it, GPT-NeoX-Japanese has a bias
in its last block alone).  The config is left as it is, and a forward pass ends behind the last block that is there.
Shapes: B chains in a batch, T tokens, D hidden size.
"""

import inspect
import json
import logging
import pickle
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from streamprobe.blocks import block_list, check_layers, drop_blocks, text_config
from streamprobe.errors import InputError, first_line, out_of_memory
from streamprobe.hooks import FOREIGN
from streamprobe.system.hardware import free_bytes
from streamprobe.system.network import look_for_hub

# What a model's files make a loader raise, beside what its code does.
LOADING = (*FOREIGN, EOFError, OSError, SafetensorError, pickle.UnpicklingError)


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps the library's warnings and tables off the terminal: what matters of them is said in one line."""
    from transformers.utils import logging as library

    verbosity = library.get_verbosity()
    library.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        library.set_verbosity(verbosity)


def _reason(error: BaseException) -> str:
    """What the library says, in one line and without its advice."""
    text = str(error)
    if "Weights only load failed" in text:  # torch would go on with how to run what the pickle holds
        name = re.search(r"GLOBAL (\S+)", text)
        return f"its pickled weights ask for {name[1] if name else 'more than tensors'}, which is not unpickled"
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    if len(lines) > 1 and lines[0].endswith(":") and "alidation error" in lines[0]:
        return f"{lines[0]} {lines[1]}".rstrip(".")
    said = first_line(error).rstrip(".")
    speaks = bool(lines) and isinstance(error, OSError | ValueError | ImportError)
    return said if speaks else f"{type(error).__name__}: {said}"


@contextmanager
def _one_line(model: str) -> Iterator[None]:
    """Turns what loading raises for a model that the user can change or fix into an InputError."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, StrictDataclassError

    look_for_hub(model)
    try:
        with quiet():
            yield
    except InputError:
        raise
    except (*LOADING, StrictDataclassError) as error:
        if out_of_memory(error):
            raise
        causes = [error, error.__cause__, error.__context__]
        if any(isinstance(c, GatedRepoError) for c in causes) or "gated repo" in str(error):
            raise InputError(
                f"model {model}, which is gated, without a token that may read it",
                "access to the model",
                "ask for access on its hub page, then `hf auth login` or set HF_TOKEN",
            ) from error
        expected = "a folder with a model or the id of one on the hub that this transformers can load"
        fix = (
            "check --model, --revision, --gguf_file and --device_map; for a private model set HF_TOKEN; without network"
            " give a folder"
        )
        if any(isinstance(c, RepositoryNotFoundError) for c in causes):
            raise InputError(f"model {model}, which is not on the hub", expected, fix) from error
        raise InputError(f"model {model}: {_reason(error)}", expected, fix) from error


def read_config(model: str, **where: Any) -> Any:
    """The model's config (a few kB; no weights).  `where`: revision, gguf_file, trust_remote_code."""
    from transformers import AutoConfig

    with _one_line(model):
        return AutoConfig.from_pretrained(model, **where)


def load_tokenizer(model: str, **where: Any) -> Any:
    """The model's tokenizer, which says of every token which characters it covers, white space included.

    Raises InputError if it cannot, and for files that are no tokenizer's.
    """
    from transformers import AutoTokenizer

    with _one_line(model):
        try:
            tokenizer = AutoTokenizer.from_pretrained(model, **where)
        except Exception as error:
            if type(error) not in (Exception, TypeError, AttributeError):  # bare ones are those of `tokenizers`
                raise
            raise InputError(
                f"model {model} with a tokenizer that cannot be read ({first_line(error)})",
                "the tokenizer's files as they were saved",
                "check tokenizer.json and tokenizer_config.json",
            ) from error
    if not tokenizer.is_fast:
        raise InputError(
            f"model {model} with the tokenizer {type(tokenizer).__name__}, which has no offset mapping",
            "a fast tokenizer (it says which characters each token covers)",
            "use a model with a tokenizer.json",
        )
    keep_white_space(tokenizer.backend_tokenizer)
    return tokenizer


def keep_white_space(backend: Any) -> None:
    """Lets a `tokenizers.Tokenizer` (changed in place) count white space to the characters of a token.

    A byte-level post-processor with `trim_offsets` leaves it out, so that a token of white space alone covers nothing.
    The token ids stay as they are.
    """
    from tokenizers import Tokenizer, models

    def untrimmed(entry: dict[str, Any]) -> dict[str, Any]:
        return entry | {"trim_offsets": False} if "trim_offsets" in entry else entry

    now = json.loads(backend.to_str())["post_processor"]
    then = json.loads(json.dumps(now), object_hook=untrimmed)
    if then != now:
        empty = json.loads(Tokenizer(models.BPE()).to_str())
        backend.post_processor = Tokenizer.from_str(json.dumps(empty | {"post_processor": then})).post_processor


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


def _empty(config: Any, dtype: torch.dtype, trust_remote_code: bool = False, revision: str | None = None) -> Any:
    """The whole model without its head, as `AutoModel` would load it, on no device, so that it takes no memory."""
    from transformers import AutoModel
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    own = (getattr(config, "auto_map", None) or {}).get("AutoModel")
    with torch.device("meta"):
        if own and trust_remote_code:
            kind: Any = get_class_from_dynamic_module(own, config.name_or_path, revision=revision)
            return kind._from_config(deepcopy(config), dtype=dtype)
        return AutoModel.from_config(deepcopy(config), dtype=dtype, trust_remote_code=trust_remote_code)


def _cut_class(whole: type, n: int) -> Any:
    """The class `whole`, but built without the blocks behind the first n."""

    def init(self: Any, *args: Any, **options: Any) -> None:
        whole.__init__(self, *args, **options)  # type: ignore[misc]
        drop_blocks(self, n)

    return type(whole.__name__, (whole,), {"__init__": init, "__module__": whole.__module__})


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
    from transformers.utils.logging import disable_progress_bar

    check_device(device_map, attn_implementation)
    config = read_config(model, **where)
    check_layers(config, layers or [])
    options = {"device_map": device_map, "ignore_mismatched_sizes": True, **_numbers(dtype, quantization), **where}
    if attn_implementation:
        options["attn_implementation"] = attn_implementation
    if not sys.stderr.isatty():
        disable_progress_bar()
    with _one_line(model):
        if layers is None:
            loaded = _whole_kind(config).from_pretrained(model, config=config, output_loading_info=True, **options)
        else:
            loaded = _load_cut(model, config, max(layers) + 1, options)
    backbone, info = loaded
    _check_loaded(model, backbone, info)
    return backbone.eval().requires_grad_(False)


def _numbers(dtype: str, quantization: str) -> dict[str, Any]:
    """Options of `from_pretrained` for the format of the numbers."""
    from transformers import BitsAndBytesConfig

    compute = pick_dtype(dtype)
    if quantization == "8bit":
        warnings.filterwarnings("ignore", message="MatMul8bitLt")  # said at every call, in one way or the other
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        return {"dtype": compute, "quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    if quantization == "4bit":
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # which kernels a CPU has not
        four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)
        return {"dtype": compute, "quantization_config": four}
    return {"dtype": compute}


def _whole_kind(config: Any) -> Any:
    """What loads this model with its LM head."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto import modeling_auto as auto

    causal, seeing = auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    sees = config.model_type in seeing and config.model_type not in causal
    return AutoModelForImageTextToText if sees else AutoModelForCausalLM


def _load_cut(model: str, config: Any, n: int, options: dict[str, Any]) -> tuple[Any, Any]:
    """The model's first n blocks and what transformers says about its loading; dropped blocks' weights are not read."""
    config = deepcopy(config)
    where = {name: options[name] for name in ("trust_remote_code", "revision") if options.get(name)}
    empty = _empty(config, options["dtype"], **where)
    whole = type(empty)
    _check_room(model, empty, n, options)
    if not isinstance(empty.config, type(config)):  # AutoModel takes the text part of this config
        quantized, config = getattr(config, "quantization_config", None), config.get_text_config()
        if quantized is not None:
            config.quantization_config = quantized
    backbone, info = _cut_class(whole, n).from_pretrained(model, config=config, output_loading_info=True, **options)
    backbone.__class__ = whole
    return backbone, info


def _check_room(model: str, empty: nn.Module, n: int, options: dict[str, Any]) -> None:
    """Raises InputError where the host has no room for the weights, before they are read; a container may be killed.

    A GGUF file is turned into float32 as a whole.  Of a device accelerate says what does not fit, and what quantized
    weights take is known when they are there.
    """

    def size(module: nn.Module) -> int:
        return sum(p.nbytes for p in module.parameters())

    needed = size(empty) - size(nn.ModuleList(list(block_list(empty))[n:]))
    if options.get("gguf_file"):
        needed += sum(4 * p.numel() for p in empty.parameters())
    on_host = options["device_map"] == "cpu" or not torch.cuda.is_available()
    free = free_bytes(torch.device("cpu"))
    if on_host and "quantization_config" not in options and needed > free:
        raise InputError(
            f"model {model}, whose first {n} blocks take {needed / 1e9:.2f} GB while they are read",
            f"at most the {free / 1e9:.2f} GB of memory that are free",
            "free memory, use --dtype bfloat16, or probe lower layers",
        )


def _check_loaded(model: str, backbone: nn.Module, info: dict[str, Any]) -> None:
    """Raises InputError for weights that are missing or of another size, and for a model that is not all in memory."""
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
    places = set((getattr(backbone, "hf_device_map", None) or {}).values())
    if "disk" in places or ("cpu" in places and len(places) > 1):
        raise InputError(
            f"model {model}, which does not fit into memory",
            "room for its blocks in device memory and RAM",
            "use --quantization 4bit, lower layers, or a larger device",
        )


def weight_bytes(config: Any, layers: Sequence[int], **where: Any) -> dict[str, int]:
    """Bytes of the model's blocks 0 .. max(layers) in float32, bf16, 8-bit and 4-bit, from its config alone.

    Quantized as `load_backbone` does: matrices in 8 bits with a float32 scale a row, or in 4 bits with one for each 64
    weights; embeddings, norms and biases stay in bf16.  `where`: revision, trust_remote_code.
    """
    from transformers.pytorch_utils import Conv1D

    def cut(dtype: torch.dtype) -> nn.Module:
        with _one_line(config.name_or_path or config.model_type):
            model = _empty(config, dtype, **where)
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
    """Bytes of the model's parameters, buffers and scales of quantized weights, shared ones counted once."""
    tensors = [*model.state_dict().values(), *model.buffers()]
    return sum({t.data_ptr(): t.nbytes for t in tensors}.values())


def make_cache(config: Any) -> Any:
    """An empty cache of keys and values, to read a text in chunks; blocks with a window hold no more than that.

    Raises InputError for a model whose later chunks could change what earlier ones held: one with a running state, or
    with rotary frequencies that depend on the length of the text.
    """
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    try:
        cache = DynamicCache(config=config)
    except FOREIGN as error:
        raise unchunked(config) from error
    rope = getattr(text_config(config), "rope_parameters", None) or {}
    kinds = {r.get("rope_type") for r in (rope, *rope.values()) if isinstance(r, dict)}
    plain = all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers)
    if not plain or kinds & {"dynamic", "longrope"}:
        raise unchunked(config)
    return cache


def check_chunks(config: Any, **where: Any) -> None:
    """Raises InputError, before any weight is read, for a model that cannot read chains in chunks.

    `where`: revision, trust_remote_code.
    """
    make_cache(config)
    with _one_line(config.name_or_path or config.model_type):
        model = _empty(config, torch.float32, **where)
    if "past_key_values" not in inspect.signature(type(model).forward).parameters:
        raise unchunked(config)


def frequencies_change(config: Any) -> int:
    """Tokens of a text above which its rotary frequencies are others (longrope); texts on both sides share no batch."""
    text = text_config(config)
    rope = getattr(text, "rope_parameters", None) or {}
    before = rope.get("original_max_position_embeddings") or getattr(text, "original_max_position_embeddings", None)
    return before if before and rope.get("rope_type") == "longrope" else sys.maxsize


def unchunked(config: Any) -> InputError:
    """The refusal of a model that cannot read a chain in chunks."""
    return InputError(
        f"chains longer than max_batch_tokens, and a {config.model_type} model, which cannot read them in chunks",
        "plain or sliding attention, and rotary frequencies that do not depend on the length of the text",
        "raise --max_batch_tokens to the length of the longest chain",
    )
