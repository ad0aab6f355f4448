"""Reading a long text in chunks: when that changes nothing, and the cache of keys and values that it takes."""

import inspect
import sys
from typing import Any

import torch

from streamprobe.errors import InputError
from streamprobe.model.blocks import text_config
from streamprobe.model.hooks import FOREIGN
from streamprobe.model.loading import build_empty, readable_errors


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
    with readable_errors(config.name_or_path or config.model_type):
        model = build_empty(config, torch.float32, **where)
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
