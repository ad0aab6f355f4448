"""A short text that the model reads before anything is trained: what taps rely on, seen and not believed.

Shapes: B chains, T tokens, D hidden size, W width of a place.
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
    text_config,
    unfit,
    vocabulary,
)
from streamprobe.model.chunks import make_cache, unchunked
from streamprobe.model.finding import find_taps
from streamprobe.model.hooks import check_taken, count_runs, read, tap
from streamprobe.model.loading import quiet
from streamprobe.model.places import main_device, place_of
from streamprobe.model.points import Place
from streamprobe.model.taps import Taps, taps_of_layers

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
    """As `check_places` of the blocks' outputs; returns their width D."""
    return check_places(model, taps_of_layers(model, layers), ids, chunked)[0]


def find_places(model: nn.Module, places: Sequence[Place], ids: Sequence[int]) -> Taps:
    """How these places are read in a model, which reads a short text for that where it must.

    `ids` are two or more token ids that the model knows.  Raises InputError for a place that it has not.
    """

    def read_text() -> None:
        with quiet():
            read(model, _test_text(model.config, ids)[:1].to(main_device(model)), last=_last(model, taps))

    taps = taps_of_layers(model, [place.layer for place in places])
    return find_taps(model, places, read_text)


def check_places(model: nn.Module, taps: Taps, ids: Sequence[int], chunked: bool = False) -> list[int]:
    """Reads a short text twice, with other tokens in its second half; returns the width W of each place.

    `ids` as in `find_places`; `chunked` says that texts will be read in chunks.  Raises InputError where a place is not
    run through once and has [B, T, W], where that is not what a text can give, where what a token has there depends on
    later ones, and where chunks give something else than the whole.
    """
    config: Any = model.config
    text = _test_text(config, ids)
    half = (text.shape[1] + 3) // 2  # an odd place, so that blocks of tokens that see each other lie across it
    after, kinds = text.clone(), text.unique()
    assert len(kinds) > 1, "a text of one word cannot be changed"
    after[:, half:] = kinds[(torch.searchsorted(kinds, text)[:, half:] + 1) % len(kinds)]  # each another
    with _without_outliers(model):
        acts, changed = (_states(model, taps, [x]) for x in (text, after))
        _check_numbers(taps, acts)
        for place in taps.hooks:
            far = _distance(acts[place], changed[place], half - 1)
            if far > _tolerance(model, acts[place]):
                raise unfit(config, f"in which a token sees later ones: they change it by {far:.1%} in {place}")
        if chunked:
            try:
                chunks = _states(model, taps, [text[:, :half], text[:, half:]], make_cache(config))
            except InputError as error:
                raise unchunked(config) from error
            if any(_distance(acts[i], chunks[i], -1) > _tolerance(model, acts[i]) for i in taps.hooks):
                raise unchunked(config)
    return [acts[place].shape[2] for place in taps.hooks]


def _test_text(config: Any, ids: Sequence[int]) -> Tensor:
    """Token ids [B, T] with B, T and D all different, each row begun at another of `ids`."""
    width = getattr(text_config(config), "hidden_size", None)
    long = min(TOKENS + (width == TOKENS), context(config))
    row = torch.tensor(list(ids)).repeat(1 + (CHAINS + long) // len(ids))
    check_vocabulary(config, int(row.max()))
    return torch.stack([row[b : b + long] for b in range(CHAINS)])


def _last(model: nn.Module, taps: Taps) -> nn.Module | None:
    """The block behind which nothing need be computed; None in a whole model, which is read to its end."""
    return taps.last if isinstance(block_list(model), Kept) else None


@torch.no_grad()
def _states(model: Any, taps: Taps, chunks: Sequence[Tensor], cache: Any = None) -> dict[Place, Tensor]:
    """What there is at each place [B, T, W], on the host, for a text in one chunk, or in several with a cache.

    It takes the way of a run's activations, over the model's main device.
    """
    config, device, places = model.config, main_device(model), list(taps.hooks)
    by_chunk: list[dict[Place, Tensor]] = []
    with tap(taps.hooks) as taken, count_runs([hook.module for hook in taps.hooks.values()]) as runs:
        for chunk in chunks:
            with quiet():
                read(model, chunk.to(device), last=_last(model, taps), cache=cache)
            found = dict(zip(places, check_taken(taken, places, *chunk.shape), strict=True))
            for number, place in enumerate(places):
                if runs[number] > len(by_chunk) + 1:
                    raise unfit(config, f"whose {_named(place)} runs {runs[number]} times in a forward pass")
            by_chunk.append({place: acts.to(device).cpu() for place, acts in found.items()})
    return {place: torch.cat([acts[place] for acts in by_chunk], 1) for place in places}


def _named(place: Place) -> str:
    """What it is that is read."""
    return f"block of {place}" if place == Place(place.layer) else str(place)


def _check_numbers(taps: Taps, acts: Mapping[Place, Tensor]) -> None:
    """Raises InputError for a place whose activations [B, T, W] of a text cannot be right.

    Where a copy between devices fails, what comes behind it may be all 0, or what was in memory before.
    """
    for place, x in acts.items():
        tokens = x.flatten(0, 1)
        if not tokens.isfinite().all():
            wrong = "infinite or not numbers"
        elif not tokens.any():
            wrong = "all 0"
        elif (tokens == tokens[0]).all():
            wrong = "the same at every token"
        else:
            continue
        where = place_of(taps.hooks[place].module)
        raise InputError(
            f"activations of a short text that are {wrong}: {place}, whose block lies on {where}",
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
