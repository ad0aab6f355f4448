"""Lets a model write answers to several prompts at once, as token ids.

Shapes: B prompts, T tokens of a prompt.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from streamprobe.errors import InputError, first_line, out_of_memory
from streamprobe.model.hooks import FOREIGN
from streamprobe.model.places import main_device


def write(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Tensor],
    *,
    max_new_tokens: int,
    options: Mapping[str, Any],
    stopped: Callable[[], bool] | None = None,
) -> list[list[int]]:
    """The ids that the model writes behind each of B prompts of token ids [T], up to one that ends a text.

    `options` are those of `Sampling`; `stopped` is asked at every token, and ends all answers where they are.  Raises
    InputError for a model that cannot write, as where its logits are not numbers.
    """
    ends = _ends(model, tokenizer)
    pad = next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)
    longest = max(map(len, prompts))
    ids = torch.stack([nn.functional.pad(p, (longest - len(p), 0), value=pad) for p in prompts])
    mask = torch.arange(longest) >= longest - torch.tensor([[len(p)] for p in prompts])
    device = main_device(model)
    asked: dict[str, Any] = {"input_ids": ids.to(device), "attention_mask": mask.long().to(device)}
    if stopped is not None:
        asked["stopping_criteria"] = [_criterion(stopped)]
    try:
        out = model.generate(
            **asked, max_new_tokens=max_new_tokens, pad_token_id=pad, eos_token_id=sorted(ends) or None, **options
        )
    except FOREIGN as error:
        if out_of_memory(error) or isinstance(error, InputError):
            raise
        raise InputError(
            f"a {type(model).__name__}, which cannot write ({type(error).__name__}: {first_line(error)})",
            "a model with an LM head, whose logits are numbers",
            "choose another --model, or try --dtype float32 or bfloat16",
        ) from error
    return [_up_to_end(row, ends) for row in out[:, longest:].tolist()]


def _ends(model: Any, tokenizer: Any) -> set[int]:
    """The tokens that end a text: those that come with the model, else the tokenizer's own."""
    known = getattr(model.generation_config, "eos_token_id", None)
    known = tokenizer.eos_token_id if known is None else known
    return set(known) if isinstance(known, list | tuple) else {known} - {None}


def _criterion(stopped: Callable[[], bool]) -> Callable[..., Tensor]:
    """What `generate` asks after each token: whether each of the B answers is to end."""

    def ended(ids: Tensor, _scores: Any, **_: Any) -> Tensor:
        return torch.full((len(ids),), stopped(), dtype=torch.bool, device=ids.device)

    return ended


def _up_to_end(row: Sequence[int], ends: set[int]) -> list[int]:
    """The ids before the first one that ends a text; what stands behind it is padding."""
    n = next((i for i, token in enumerate(row) if token in ends), len(row))
    return list(row[:n])


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """What is drawn at random in this context begins with `seed` on every device; what is drawn later is untouched."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield
