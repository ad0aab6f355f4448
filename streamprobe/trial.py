"""A short text that the model reads before anything is trained: what taps rely on, seen and not believed.

Shapes: B chains, T tokens, D hidden size.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from streamprobe.backbone import make_cache, quiet, unchunked
from streamprobe.blocks import Kept, block_list, check_vocabulary, context, decoder_layers, text_config, unfit
from streamprobe.errors import InputError
from streamprobe.hooks import check_taken, count_runs, read, tap

# By how much of its length rounding may change an activation whose token is computed beside others: an expert takes the
# tokens that chose it, however many, and sums of another size are added in another order; 8-bit matrices round what is
# no outlier in any token of the batch.  A later token that is seen changes an activation by a good part of its length.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 3e-2}
TOLERANCE_8BIT = 1e-1
CHAINS, TOKENS, CHANGED = 5, 23, 13  # of the test text; tokens from CHANGED on are changed


def some_tokens(tokenizer: Any, config: Any) -> list[int]:
    """Ids that stand for text, evenly spaced in the vocabulary: special and added tokens may stand for pictures."""
    known = {i for i in tokenizer.get_vocab().values() if i < text_config(config).vocab_size}
    ids = sorted(known - set(tokenizer.added_tokens_decoder)) or sorted(known)
    return ids[:: max(1, len(ids) // (CHAINS + TOKENS))]


def check_reading(model: nn.Module, layers: Sequence[int], ids: Sequence[int], chunked: bool = False) -> int:
    """Reads a short text twice, with other tokens in its second half; returns the width D of the blocks' outputs.

    `ids` are two or more token ids that the model knows; `chunked` says that texts will be read in chunks.  Raises
    InputError where a layer's block does not run once and return [B, T, D], where what it returns for a token hangs on
    later ones, and where chunks give something else than the whole.
    """
    config: Any = model.config
    text = _test_text(config, ids)
    after, kinds = text.clone(), text.unique()
    assert len(kinds) > 1, "a text of one word cannot be changed"
    after[:, CHANGED:] = kinds[(torch.searchsorted(kinds, text)[:, CHANGED:] + 1) % len(kinds)]  # each another
    acts, changed = _states(model, layers, text), _states(model, layers, after)
    for layer in layers:
        far = _distance(acts[layer], changed[layer], CHANGED - 1)
        if far > _tolerance(model, acts[layer].dtype):
            raise unfit(config, f"in which a token sees later ones: they change it by {far:.1%} in layer {layer}")
    if chunked:
        try:
            chunks = _states(model, layers, text, make_cache(config))
        except InputError as error:
            raise unchunked(config) from error
        if any(_distance(acts[i], chunks[i], -1) > _tolerance(model, acts[i].dtype) for i in layers):
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
def _states(model: Any, layers: Sequence[int], text: Tensor, cache: Any = None) -> dict[int, Tensor]:
    """What the layers' blocks return [B, T, D] for a text [B, T], on the host; in two chunks if there is a cache."""
    blocks, config = decoder_layers(model), model.config
    last = blocks[max(layers)] if isinstance(block_list(model), Kept) else None
    parts: list[dict[int, Tensor]] = []
    seen = 0
    with tap({layer: blocks[layer] for layer in layers}) as taken, count_runs(blocks) as runs:
        for chunk in text.split(text.shape[1] if cache is None else CHANGED, dim=1):
            seen += chunk.shape[1]
            mask = torch.ones(len(text), seen, dtype=torch.int64, device=model.device)
            with quiet():
                read(model, chunk.to(model.device), mask, last, cache)
            check_taken(taken, layers, *chunk.shape)
            for layer in layers:
                if runs[layer] > len(parts) + 1:
                    raise unfit(config, f"whose block of layer {layer} runs {runs[layer]} times in a forward pass")
            parts.append({layer: acts.cpu() for layer, acts in taken.items()})
    return {layer: torch.cat([p[layer] for p in parts], 1) for layer in layers}


def _distance(a: Tensor, b: Tensor, t: int) -> float:
    """How far token t's activations [B, T, D] are apart in the middle one of the chains, in units of their length."""
    a, b = a[:, t].double(), b[:, t].double()
    return float(((a - b).norm(dim=1) / a.norm(dim=1)).nan_to_num(0).median())


def _tolerance(model: nn.Module, dtype: torch.dtype) -> float:
    return (
        TOLERANCE_8BIT
        if getattr(model, "is_loaded_in_8bit", False)
        else TOLERANCE.get(dtype, TOLERANCE[torch.bfloat16])
    )
