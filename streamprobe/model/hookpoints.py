"""The places that a user names: points of blocks, and modules by patterns over their names.

A pattern is one of fnmatch, in which `{8,12}` stands for 8 or 12, as in EleutherAI's sparsify.  Names of hooks are
understood as TransformerLens writes them: `blocks.12.hook_attn_out`, `blocks.*.hook_mlp_out`.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from torch import nn

from streamprobe.errors import InputError
from streamprobe.model.blocks import block_list
from streamprobe.model.points import POINTS, RESID_POST, Place

LENS = re.compile(r"(?:blocks\.([^.]+)\.)?hook_(\w+)")  # a hook of TransformerLens: its blocks, and its point
MOST = 10_000  # patterns that braces may stand for


class InBlock(NamedTuple):
    """A module of a decoder block."""

    layer: int
    point: str  # its path in the block
    path: str  # its path in the model


def resolve_places(
    points: Iterable[str],
    layers: Sequence[int],
    patterns: Iterable[str],
    n_blocks: int,
    *,
    build: Callable[[], nn.Module],
) -> list[Place]:
    """The places at these points of these layers, and those of each pattern behind them: point by point, once each.

    `build` makes the model, which need have no weights.  Raises InputError for a pattern that names no place.
    """
    places, modules = [Place(layer, point) for point in points for layer in layers], None
    for pattern in patterns:
        found = _of_lens(pattern, n_blocks)
        if found is None:
            modules = modules or _modules_in_blocks(build())
            found = _of_modules(pattern, modules)
        places += found
    order = {point: i for i, point in enumerate(dict.fromkeys(place.point for place in places))}
    return sorted(dict.fromkeys(places), key=lambda place: (order[place.point], place.layer))


def _of_lens(pattern: str, n_blocks: int) -> list[Place] | None:
    """The places of a hook's name; None for a pattern that is none."""
    match = re.fullmatch(LENS, pattern)
    if not match:
        if pattern.startswith("blocks.") and "hook_" in pattern:
            raise _no_point(pattern)
        return None
    blocks, point = match.groups()
    if point not in POINTS or blocks is None:
        raise _no_point(pattern)
    layers = [i for i in range(n_blocks) if any(fnmatchcase(str(i), one) for one in expand(blocks))]
    if not layers:
        raise InputError(
            f"hookpoints {pattern}", f"blocks from 0 to {n_blocks - 1}, as the model has", "correct --hookpoints"
        )
    return [Place(layer, point) for layer in layers]


def _no_point(pattern: str) -> InputError:
    known = ", ".join(f"hook_{point}" for point in POINTS)
    return InputError(
        f"hookpoints {pattern}",
        f"blocks.N. with one of {known}",
        "name a module of the model instead, as transformers does",
    )


class _Modules(NamedTuple):
    """The modules of a model."""

    inside: list[InBlock]
    others: list[str]  # paths of those in no block
    prefix: str  # with which its paths begin in the model with a head

    def names(self, path: str) -> Iterable[str]:
        """What a module may be called: in the model as it is probed, and in the one with a head."""
        return path, f"model.{path}", f"{self.prefix}.{path}"


def _modules_in_blocks(model: Any) -> _Modules:
    """The modules of a model, by whether they lie in a block of its text decoder."""
    blocks = block_list(model)
    root = next(path for path, module in model.named_modules() if module is blocks)
    inside, others = list[InBlock](), list[str]()
    for path, _ in model.named_modules():
        match = re.fullmatch(rf"{re.escape(root)}\.(\d+)(?:\.(.+))?", path)
        if match:
            inside.append(InBlock(int(match[1]), match[2] or RESID_POST, path))
        elif path:
            others.append(path)
    return _Modules(inside, others, getattr(model, "base_model_prefix", "") or "model")


def _of_modules(pattern: str, modules: _Modules) -> list[Place]:
    """The places of the modules whose names a pattern matches.  Raises InputError where it matches none in a block."""
    every = expand(pattern)

    def matches(path: str) -> bool:
        return any(fnmatchcase(name, one) for name in modules.names(path) for one in every)

    found = [each for each in modules.inside if matches(each.path)]
    if found:
        return [Place(each.layer, each.point, "" if each.point == RESID_POST else each.path) for each in found]
    if outside := [path for path in modules.others if matches(path)]:
        raise InputError(
            f"hookpoints {pattern}, which matches {outside[0]}, in no decoder block",
            "a module in a block of the text decoder",
            "for what enters the first block give resid_pre of layer 0, for the embeddings the control embed",
        )
    near = _near(pattern, modules.inside)
    raise InputError(
        f"hookpoints {pattern}, which matches no module of the model",
        f"such as {', '.join(near)}",
        "correct --hookpoints",
    )


def _near(pattern: str, inside: Sequence[InBlock]) -> list[str]:
    """Up to three names like a pattern, with a star for the number of the block."""
    by_name: Mapping[str, None] = dict.fromkeys(
        "*".join(each.path.rsplit(f".{each.layer}.", 1)).replace("*", ".*.", 1)
        for each in inside
        if each.point != RESID_POST
    )
    plain = re.sub(r"\{[^}]*\}|\d+", "*", pattern)
    return get_close_matches(plain, by_name, n=3, cutoff=0.0)


def expand(pattern: str) -> list[str]:
    """The patterns that one with `{a,b}` in it stands for.  Raises InputError for more than MOST."""
    done, todo = list[str](), [pattern]
    while todo:
        one = todo.pop()
        match = re.search(r"\{([^{}]*)\}", one)
        if match:
            todo += [one[: match.start()] + part + one[match.end() :] for part in reversed(match[1].split(","))]
        else:
            done.append(one)
        if len(done) + len(todo) > MOST:
            raise InputError(f"hookpoints {pattern}", f"braces for at most {MOST:,} names", "correct --hookpoints")
    return done
