"""A short text that the model reads before anything is trained: what taps rely on, seen and not believed.

Shapes: B chains, T tokens, D hidden size.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from streamprobe.errors import InputError
from streamprobe.model.blocks import (
    Kept,
    block_list,
    check_vocabulary,
    context,
    decoder_layers,
    text_config,
    unfit,
    vocabulary,
)
from streamprobe.model.chunks import make_cache, unchunked
from streamprobe.model.hooks import check_taken, count_runs, read, tap
from streamprobe.model.loading import quiet
from streamprobe.model.places import main_device, place_of

# By how much of its length rounding may change an activation whose token is computed beside others: an expert takes the
# tokens that chose it, however many, and sums of another size may be added in another order (on a CPU they are not).
# One later token of ten that is seen by a random model changes the activation before it by 5% of its length or more.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 3e-2}
CHAINS, TOKENS = 5, 23  # of the text; 23 is no multiple of what attention may be cut into


def some_tokens(tokenizer: Any, config: Any) -> list[int]:
    """Ids that stand for text, evenly spaced in the vocabulary: special and added tokens may stand for pictures."""
    size = vocabulary(config)
    known = {i for i in tokenizer.get_vocab().values() if i < size}
    ids = sorted(known - set(tokenizer.added_tokens_decoder)) or sorted(known)
    return ids[:: max(1, len(ids) // (CHAINS + TOKENS))]


def check_reading(model: nn.Module, layers: Sequence[int], ids: Sequence[int], chunked: bool = False) -> int:
    """Reads a short text twice, with other tokens in its second half; returns the width D of the blocks' outputs.

    `ids` are two or more token ids that the model knows; `chunked` says that texts will be read in chunks.  Raises
    InputError where a layer's block does not run once and return [B, T, D], where that is not what a text can give,
    where what it returns for a token depends on later ones, and where chunks give something else than the whole.
    """
    config: Any = model.config
    text = _test_text(config, ids)
    half = (text.shape[1] + 3) // 2  # an odd place, so that blocks of tokens that see each other lie across it
    after, kinds = text.clone(), text.unique()
    assert len(kinds) > 1, "a text of one word cannot be changed"
    after[:, half:] = kinds[(torch.searchsorted(kinds, text)[:, half:] + 1) % len(kinds)]  # each another
    with _without_outliers(model):
        acts, changed = (_states(model, layers, [x]) for x in (text, after))
        _check_numbers(model, acts)
        for layer in layers:
            far = _distance(acts[layer], changed[layer], half - 1)
            if far > _tolerance(model, acts[layer]):
                raise unfit(config, f"in which a token sees later ones: they change it by {far:.1%} in layer {layer}")
        if chunked:
            try:
                chunks = _states(model, layers, [text[:, :half], text[:, half:]], make_cache(config))
            except InputError as error:
                raise unchunked(config) from error
            if any(_distance(acts[i], chunks[i], -1) > _tolerance(model, acts[i]) for i in layers):
                raise unchunked(config)
    return acts[layers[0]].shape[2]


def _test_text(config: Any, ids: Sequence[int]) -> Tensor:
    """Token ids [B, T] with B, T and D all different, each row begun at another of `ids`."""
    width = getattr(text_config(config), "hidden_size", None)
    long = min(TOKENS + (width == TOKENS), context(config))
    row = torch.tensor(list(ids)).repeat(1 + (CHAINS + long) // len(ids))
    check_vocabulary(config, int(row.max()))
    return torch.stack([row[b : b + long] for b in range(CHAINS)])


@torch.no_grad()
def _states(model: Any, layers: Sequence[int], chunks: Sequence[Tensor], cache: Any = None) -> dict[int, Tensor]:
    """What the layers' blocks return [B, T, D], on the host, for a text in one chunk, or in several with a cache.

    It takes the way of a run's activations, over the model's main device.
    """
    blocks, config, device = decoder_layers(model), model.config, main_device(model)
    last = blocks[max(layers)] if isinstance(block_list(model), Kept) else None
    by_chunk: list[dict[int, Tensor]] = []
    with tap({layer: blocks[layer] for layer in layers}) as taken, count_runs(blocks) as runs:
        for chunk in chunks:
            with quiet():
                read(model, chunk.to(device), last=last, cache=cache)
            check_taken(taken, layers, *chunk.shape)
            for layer in layers:
                if runs[layer] > len(by_chunk) + 1:
                    raise unfit(config, f"whose block of layer {layer} runs {runs[layer]} times in a forward pass")
            by_chunk.append({layer: acts.to(device).cpu() for layer, acts in taken.items()})
    return {layer: torch.cat([acts[layer] for acts in by_chunk], 1) for layer in layers}


def _check_numbers(model: nn.Module, acts: Mapping[int, Tensor]) -> None:
    """Raises InputError for a layer whose activations [B, T, D] of a text cannot be right.

    Where a copy between devices fails, what comes behind it may be all 0, or what was in memory before.
    """
    blocks = decoder_layers(model)
    for layer, x in acts.items():
        tokens = x.flatten(0, 1)
        if not tokens.isfinite().all():
            wrong = "infinite or not numbers"
        elif not tokens.any():
            wrong = "all 0"
        elif (tokens == tokens[0]).all():
            wrong = "the same at every token"
        else:
            continue
        place = place_of(blocks[layer])
        raise InputError(
            f"activations of a short text that are {wrong}: layer {layer}, whose block lies on {place}",
            "finite numbers that differ from token to token",
            "use another --device_map, such as a single device, or --dtype float32 or bfloat16",
        )


def _distance(a: Tensor, b: Tensor, t: int) -> float:
    """How far token t's activations [B, T, D] are apart in the middle one of the chains, in units of their length."""
    a, b = a[:, t].double(), b[:, t].double()
    return float(((a - b).norm(dim=1) / a.norm(dim=1)).nan_to_num(0).median())


def _tolerance(model: Any, acts: Tensor) -> float:
    """That of the coarser format: a model may add up in float32 what it computes in bfloat16."""
    return max(TOLERANCE.get(dtype, TOLERANCE[torch.bfloat16]) for dtype in (acts.dtype, model.dtype))


@contextmanager
def _without_outliers(model: nn.Module) -> Iterator[None]:
    """Rounds every token by itself: LLM.int8 spares the columns in which any token of the batch has an outlier."""
    states: list[Any] = [m.state for m in model.modules() if hasattr(getattr(m, "state", None), "threshold")]
    before = [state.threshold for state in states]
    try:
        for state in states:
            state.threshold = 0.0
        yield
    finally:
        for state, threshold in zip(states, before, strict=True):
            state.threshold = threshold
