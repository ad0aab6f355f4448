"""What a model's config says of its text blocks, and where the model holds them."""

import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from streamprobe.errors import InputError


def text_config(config: Any) -> Any:
    """The part of a model's config that describes its text blocks."""
    try:
        return config.get_text_config()
    except ValueError as error:  # it has several
        raise unfit(config, "which is no single decoder of text") from error


def unfit(config: Any, why: str) -> InputError:
    """The refusal of a model that can be no backbone."""
    return InputError(f"a {config.model_type} model, {why}", "a causal decoder", "choose another --model")


MOST_BLOCKS = 10_000  # a config that names more is broken, and building them would not end


def depth(config: Any) -> int:
    """How many decoder blocks the config says that the whole model has."""
    n = getattr(text_config(config), "num_hidden_layers", None)
    if not isinstance(n, int) or not 0 < n <= MOST_BLOCKS:
        raise unfit(config, f"whose config names {n!r} as the number of its decoder blocks")
    return n


def check_layers(config: Any, layers: Sequence[int]) -> None:
    """Raises InputError for a model that is no decoder, and for a layer that it does not have."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED

    sees_ahead = config.model_type in MASKED and not getattr(config, "is_decoder", False)
    if config.is_encoder_decoder or sees_ahead:
        raise unfit(config, "in which a token sees later ones")
    n = depth(config)
    wrong = [layer for layer in layers if not 0 <= layer < n]
    if wrong:
        raise InputError(
            f"layers {' '.join(map(str, wrong))}",
            f"numbers from 0 to {n - 1} (the model has {n} decoder blocks)",
            "choose others with --layers",
        )


def resolve_layers(spec: Sequence[int | str], n_blocks: int) -> list[int]:
    """The layers that a user names, as numbers, so that one config can serve models of any depth.

    An entry is the number of a layer, a range `8-16` (both ends are in it), a percentage `25%` of the depth, or `all`.
    p percent is layer p / 100 (n_blocks - 1), rounded, a half upwards: 0% is the first, 100% the last, and of 32 blocks
    25% is layer 8.  Sorted, each layer once.  Raises InputError for an entry that names no layer of the model.
    """
    named = {entry: _layers_of(str(entry), n_blocks) for entry in spec}
    wrong = [str(entry) for entry, layers in named.items() if not layers]
    if wrong:
        raise InputError(
            f"layers {' '.join(wrong)}",
            f"numbers from 0 to {n_blocks - 1} (the model has {n_blocks} decoder blocks), ranges a-b of them, "
            "percentages of the depth from 0% to 100%, or all",
            "correct --layers",
        )
    return sorted({layer for layers in named.values() for layer in layers})


def _layers_of(entry: str, n_blocks: int) -> range:
    """The layers that one entry of `resolve_layers` names; none where it is wrong."""
    if entry == "all":
        return range(n_blocks)
    if numbers := re.fullmatch(r"([0-9]{1,9})(?:-([0-9]{1,9}))?", entry):
        first, last = int(numbers[1]), int(numbers[2] or numbers[1])
        return range(first, last + 1) if last < n_blocks else range(0)
    percentage = re.fullmatch(r"([0-9]{1,3}(?:\.[0-9]{1,9})?)%", entry)
    if percentage and float(percentage[1]) <= 100:
        layer = int(float(percentage[1]) * (n_blocks - 1) / 100 + 0.5)
        return range(layer, layer + 1)
    return range(0)


CONTEXTS = (  # the names that models' configs give it
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "max_sequence_length",
    "seq_length",
    "context_length",
    "n_ctx",
)


def context(config: Any) -> int:
    """Most tokens that the model takes, under whichever name; without a limit where it names none."""
    named = [getattr(text_config(config), name, None) for name in CONTEXTS]
    return next((n for n in named if isinstance(n, int) and n > 0), sys.maxsize)


def vocabulary(config: Any) -> int:
    """How many tokens the model has an embedding for; without a limit where the config names none."""
    return getattr(text_config(config), "vocab_size", None) or sys.maxsize


def check_vocabulary(config: Any, highest: int) -> None:
    """Raises InputError if the model has no embedding for the token id `highest`."""
    size = vocabulary(config)
    if highest >= size:
        raise InputError(
            f"token {highest}, which the model's vocabulary of {size} has not",
            "the tokenizer of this model",
            "check the files of --model",
        )


class Kept(nn.ModuleList):
    """The first blocks of a model whose others were dropped."""


def block_list(model: nn.Module) -> nn.ModuleList:
    """The list of the text decoder's blocks (`layers`, `h`, ...): as long as the config says, or what was kept of it.

    It lies in a module that was built from the text's config; a vision tower has a config of its own.  Of several such
    lists the one with the most weights is it.
    """
    config: Any = model.config
    for module in model.modules():
        if isinstance(module, Kept):
            return module
    n, kind = depth(config), text_config(config).model_type
    get_decoder = getattr(model, "get_decoder", None)
    decoder: nn.Module = (get_decoder() if get_decoder else None) or model
    for root in (decoder, model):
        lists = [m for m, owner in _lists(root, config) if len(m) == n and owner.model_type == kind]
        if lists:
            return max(lists, key=weights)
    raise unfit(config, f"in which no list of its {n} decoder blocks is found")


def _lists(module: nn.Module, config: Any) -> Iterator[tuple[nn.ModuleList, Any]]:
    """The lists in a module that are in no other list, each with the config of the module around it."""
    config = getattr(module, "config", config)
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield child, config
        else:
            yield from _lists(child, config)


def weights(module: nn.Module) -> int:
    """How many there are, those that several modules share counted once."""
    return sum(p.numel() for p in module.parameters())


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The text decoder's blocks in order, those that were kept; `model` may have a head, and other towers."""
    return list(block_list(model))


def drop_blocks(model: Any, n: int) -> None:
    """Drops the blocks behind the first n, before they have memory."""
    blocks = block_list(model)
    del blocks[n:]
    blocks.__class__ = Kept
    for module in model.modules():
        if tied := getattr(module, "all_tied_weights_keys", None):
            there = {name for name, _ in module.named_parameters(remove_duplicate=False)}
            module.all_tied_weights_keys = {a: b for a, b in tied.items() if {a, b} <= there}
