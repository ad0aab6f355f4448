"""What a model's files make transformers do and say, in one line where the user can fix it."""

import pickle
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from safetensors import SafetensorError

from streamprobe.errors import InputError, first_line, out_of_memory
from streamprobe.model.gguf_file import parsed_once
from streamprobe.model.hooks import FOREIGN
from streamprobe.system.network import look_for_hub
from streamprobe.system.shipped import shipped_path

SPREADING = ("auto", "balanced", "balanced_low_0", "sequential")  # device maps that accelerate makes itself

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
def readable_errors(model: str) -> Iterator[None]:
    """Lets the user read in one line why a model cannot be loaded: what loading raises becomes an InputError.

    Memory that runs out, and what a library has never been seen to raise for a broken model, stay as they are.
    """
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
        if "dispatched on the CPU or the disk" in str(error):
            raise InputError(
                f"model {model}, whose quantized blocks do not all fit into device memory",
                "room for every one there: quantized blocks cannot wait in RAM",
                "probe lower layers, use a larger device or more of them, or --quantization none",
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

    with readable_errors(model), parsed_once(where.get("gguf_file")):
        return AutoConfig.from_pretrained(shipped_path(model), **where)


def build_empty(config: Any, dtype: torch.dtype, trust_remote_code: bool = False, revision: str | None = None) -> Any:
    """The whole model without its head, to look at its shape before any weight is read: it takes no memory.

    It is what `AutoModel` would load, on the device `meta`.
    """
    from transformers import AutoModel
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    own = (getattr(config, "auto_map", None) or {}).get("AutoModel")
    with torch.device("meta"):
        if own and trust_remote_code:
            kind: Any = get_class_from_dynamic_module(own, config.name_or_path, revision=revision)
            return kind._from_config(deepcopy(config), dtype=dtype)
        return AutoModel.from_config(deepcopy(config), dtype=dtype, trust_remote_code=trust_remote_code)


def check_device(device_map: str, attn_implementation: str | None = None) -> None:
    """Raises InputError for a device that this machine does not have, and for attention that takes minutes on it."""
    if attn_implementation == "flex_attention" and (device_map.startswith("cpu") or not torch.cuda.is_available()):
        raise InputError(
            "attn_implementation flex_attention on a CPU, for which it is compiled for minutes",
            "sdpa or eager",
            "drop --attn_implementation",
        )
    if device_map in SPREADING:
        return
    try:
        usable = torch.empty(0, device=device_map).device.type != "meta"
    except (RuntimeError, AssertionError):  # an assertion where torch is built without that kind
        usable = False
    if not usable:
        raise InputError(
            f"device_map {device_map}, which this machine cannot compute on", "auto, cpu, cuda, ...", "fix --device_map"
        )
