"""What is done to a running model's residual stream, as context managers, and the forward pass that they listen to.

layer i: the output of decoder block i, counted from 0 (`hidden_states[i + 1]`; TransformerLens' `hook_resid_post`).
Shapes: B chains in a batch, T tokens in this forward pass, D hidden size.
"""

import inspect
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from streamprobe.errors import InputError, first_line, out_of_memory
from streamprobe.model.places import put_back, waits_in_ram
from streamprobe.model.points import Place
from streamprobe.model.sharded import plain
from streamprobe.model.taps import Hook
from streamprobe.system.workers import worker

# What a model's code raises for a text, a config or weights that it was not made for.
FOREIGN = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)
Output = Tensor | Sequence[Any]  # a block may return a tensor, or a tuple or list that starts with one


class _Reached(Exception):
    """The deepest block that is asked for has run."""


def first_tensor(given: Any) -> Tensor | None:
    """The tensor in what a module was given or returned: it, or the first of a sequence; None where there is none."""
    first = given[0] if isinstance(given, Sequence) and len(given) else given
    return first if isinstance(first, Tensor) else None


def entering(given: Sequence[Any], named: Mapping[str, Any]) -> Tensor | None:
    """The first tensor that a module is given."""
    return next((x for x in (*given, *named.values()) if isinstance(x, Tensor)), None)


def residual(output: Output) -> Tensor:
    """The residual stream in what a block returned; raises InputError where there is none."""
    first = first_tensor(output)
    if first is None:
        raise InputError(
            f"a decoder block that returns {type(output).__name__}",
            "a tensor, or a tuple or list that starts with one",
            "choose another --model",
        )
    return plain(first)


def _replace(output: Output, x: Tensor) -> Output:
    """What a block returned, with x as its residual stream and the rest kept, in the same kind of container."""
    if isinstance(output, Tensor):
        return x
    make: Any = getattr(type(output), "_make", type(output))  # a named tuple takes its fields one by one
    return make([x, *output[1:]])


@contextmanager
def tap(places: Mapping[Any, nn.Module | Hook]) -> Iterator[dict[Any, Tensor]]:
    """Yields a dict that holds, after each forward pass, every tapped block's output [B, T, D], keyed as `places`.

    The tensors are the model's own (detached, not copied) and are replaced by the next forward pass.  Of a `Hook` it
    holds what that reads, [B, T, W] or [B T, W].  All hooks are gone on exit, also after an exception.
    """
    taken: dict[Any, Tensor] = {}
    handles = []
    try:
        for key, place in places.items():
            if isinstance(place, Hook) and not place.is_block:
                handles.append(_keep(taken, key, place))
            else:
                block = place.module if isinstance(place, Hook) else place
                handles.append(block.register_forward_hook(_keep_output(taken, key)))
        yield taken
    finally:
        for handle in handles:
            handle.remove()
        taken.clear()


def _keep_output(taken: dict[Any, Tensor], key: Any) -> Any:
    """The hook of a block that puts what it returns under a key."""

    def hook(_module: nn.Module, _inputs: object, output: Output) -> None:
        taken[key] = residual(output).detach()

    return hook


def _keep(taken: dict[Any, Tensor], key: Any, place: Hook) -> Any:
    """Lets a module put what it is given, or what it returns, under a key; a copy, which the model cannot change."""

    def keep(x: Tensor | None) -> None:
        if x is None:
            raise InputError(f"{key}, which is no tensor", "a module that returns one", "choose another place")
        x = plain(x).detach()
        taken[key] = x.clone() if place.factor == 1 else x * place.factor

    def before(_module: nn.Module, given: Sequence[Any], named: Mapping[str, Any]) -> None:
        keep(entering(given, named))

    def behind(_module: nn.Module, _given: object, output: Any) -> None:
        keep(first_tensor(output))

    if place.before:
        return place.module.register_forward_pre_hook(before, with_kwargs=True)
    return place.module.register_forward_hook(behind)


@contextmanager
def count_runs(blocks: Sequence[nn.Module]) -> Iterator[Counter[int]]:
    """Yields how often each block has run, by its number."""
    runs: Counter[int] = Counter()

    def count(i: int):
        return lambda *_: runs.update([i])

    handles = [block.register_forward_hook(count(i)) for i, block in enumerate(blocks)]
    try:
        yield runs
    finally:
        for handle in handles:
            handle.remove()


def check_taken(taken: Mapping[Any, Tensor], places: Iterable[int | Place], batch: int, tokens: int) -> list[Tensor]:
    """What was taken at each place in this forward pass, [B, T, W] each; an int stands for the output of that block.

    Raises InputError for a place that did not run, or has no row for each token.
    """
    found = []
    for key in places:
        place = Place(key) if isinstance(key, int) else key
        x, is_block = taken.get(key), place == Place(place.layer)
        if x is None:
            raise InputError(
                f"{place}, whose block does not run on text alone"
                if is_block
                else f"{place}, which text does not reach",
                "blocks that do" if is_block else "a place that every token runs through",
                "choose others with --layers" if is_block else "choose others with --sites or --hookpoints",
            )
        if x.dim() == 2 and len(x) == batch * tokens and not is_block:
            x = x.view(batch, tokens, -1)
        if x.dim() != 3 or x.shape[:2] != (batch, tokens):
            width, there_is = ("hidden size", "whose block returns") if is_block else ("width", "where there is")
            raise InputError(
                f"{place}, {there_is} {list(x.shape)} for {batch} chains of {tokens} tokens",
                f"[{batch}, {tokens}, {width}], a row for each token",
                "choose another --model" if is_block else "choose others with --sites or --hookpoints",
            )
        found.append(x)
    return found


@contextmanager
def _until(model: nn.Module, last: nn.Module | None) -> Iterator[None]:
    """Ends a forward pass, and with it this context, behind the block `last`: nothing after it is computed."""

    def stop(*_: object) -> None:
        raise _Reached

    handle = last.register_forward_hook(stop) if last is not None else None  # behind every tap and change there is
    try:
        yield
    except _Reached:
        put_back(model, last)
    finally:
        if handle is not None:
            handle.remove()


@torch.no_grad()
def read(model: nn.Module, ids: Tensor, *, last: nn.Module | None = None, cache: Any = None) -> None:
    """Runs the model over ids [B, T], up to the block `last` if it is given; taps hold what the blocks computed.

    It is given no mask: where a token sees no later one, padding on the right is invisible, and attention without a
    mask is computed by its fastest kernels.  `cache` holds the keys and values of the tokens before these, and
    afterwards those of these too.  Raises InputError for a model that cannot read this, and for one that leaves the
    cache empty.
    """
    length = ids.shape[1] + (cache.get_seq_length() if cache is not None else 0)
    options: dict[str, Any] = {"use_cache": cache is not None}
    if cache is not None:
        options["past_key_values"] = cache
    known = inspect.signature(type(model).forward).parameters
    anything = any(p.kind is p.VAR_KEYWORD for p in known.values())
    try:
        with _until(model, last):
            model(input_ids=ids, **{name: value for name, value in options.items() if anything or name in known})
    except InputError:
        raise
    except FOREIGN as error:
        if out_of_memory(error):
            raise
        waiting = waits_in_ram(model)
        raise InputError(
            f"a {type(model).__name__}, which cannot read a text of {length} tokens alone "
            f"({type(error).__name__}: {first_line(error)})",
            "a causal decoder" + " that can be sent to a device block by block, or all of it on devices" * waiting,
            "choose another --model"
            + ", lower layers, or a larger device" * waiting
            + ", or drop --tp_size" * (worker() is not None),
        ) from error
    if cache is not None and cache.get_seq_length() != length:
        raise InputError(
            f"a {type(model).__name__}, which keeps no keys and values of the tokens that it has read",
            "a model that can read a chain in chunks",
            "raise --max_batch_tokens to the length of the longest chain",
        )


@contextmanager
def steer(
    block: nn.Module, add: Tensor | None = None, ablate: Tensor | None = None, newest: bool = False
) -> Iterator[None]:
    """Changes the block's output, for the rest of the model and for every `tap`, also one that was there before.

    `ablate` is projected out: x - (x . u) u with u = ablate / |ablate|.  `add` is added, after that.  Both are [D], or
    [B, 1, D] for a vector for each chain.  With `newest` only the last token of each forward pass is changed: where a
    model generates with a cache, the last one of the prompt and every one that it writes.  The hook is gone on exit,
    also after an exception.  Of two nested ones the inner acts first.
    """

    def change(x: Tensor) -> Tensor:
        y = x.float()
        if ablate is not None:
            unit = nn.functional.normalize(ablate.to(y), dim=-1)
            y = y - (y * unit).sum(-1, keepdim=True) * unit
        return (y if add is None else y + add.to(y)).to(x.dtype)

    def hook(_module: nn.Module, _inputs: object, output: Output) -> Output:
        x = residual(output)
        return _replace(output, torch.cat([x[:, :-1], change(x[:, -1:])], 1) if newest else change(x))

    handle = block.register_forward_hook(hook, prepend=True)  # before every tap
    try:
        yield
    finally:
        handle.remove()
