"""The keys `sites` and `hookpoints`: what of a decoder block is read."""

from collections.abc import Sequence
from difflib import get_close_matches
from typing import NamedTuple

from streamprobe.config.keys import require
from streamprobe.model.points import POINTS, RESID_POST

NONE = "none"


class Asked(NamedTuple):
    """What is to be read."""

    points: list[str]  # of every layer that is named, or none alone
    patterns: list[str]  # over the modules of the model and over TransformerLens' names of hooks, or none alone

    @property
    def of_layers(self) -> list[str]:
        """The points, without none."""
        return [point for point in self.points if point != NONE]

    @property
    def of_modules(self) -> list[str]:
        """The patterns, without none."""
        return [pattern for pattern in self.patterns if pattern != NONE]

    @property
    def is_usual(self) -> bool:
        """Whether the outputs of blocks alone are read."""
        return self == Asked([RESID_POST], [NONE])


def sort_sites(sites: Sequence[str], hookpoints: Sequence[str]) -> Asked:
    """What both keys ask for: hook_attn_out is attn_out, and what names its blocks is a hookpoint.

    Raises InputError for a point that is none, for a repetition, and where nothing is asked for.
    """
    points, patterns = list[str](), list[str]()
    for name, given in (("sites", sites), ("hookpoints", hookpoints)):
        require(bool(given), f"no {name}", "at least one, or none", f"give --{name}")
        if list(given) == [NONE]:
            continue
        require(NONE not in given, f"{name} {' '.join(given)}", "none alone, or none of it", f"correct --{name}")
        for each in given:
            point = each.removeprefix("hook_")
            if point in POINTS:
                points.append(point)
            else:
                _require_pattern(name, each)
                patterns.append(each)
    for name, found in (("sites", points), ("hookpoints", patterns)):
        repeated = len(set(found)) < len(found)
        require(not repeated, f"{name} {' '.join(found)} with a repetition", "each once", f"correct --{name}")
    require(bool(points or patterns), "sites none with hookpoints none", "one of them", "give --sites or --hookpoints")
    return Asked(points or [NONE], patterns or [NONE])


def check_shards(read: Asked, tp_size: int) -> None:
    """Raises InputError for places of which a process that holds a shard of the model may have but a part."""
    require(
        tp_size == 1 or read.is_usual,
        f"tp_size {tp_size} with {' '.join([*read.of_layers, *read.of_modules])}",
        "resid_post, which every process holds",
        "drop --tp_size, or other --sites",
    )


def _require_pattern(name: str, each: str) -> None:
    """Raises InputError for what can be no pattern of this key: of `sites` that is what names no block."""
    if name == "hookpoints":
        require(bool(each), "hookpoints with an empty pattern", "a pattern", "correct --hookpoints")
        return
    near = get_close_matches(each.removeprefix("hook_"), POINTS, n=1, cutoff=0.5)
    expected = f"{near[0]}, the nearest one" if near else f"one of {', '.join(POINTS)}, or {NONE}"
    require(each.startswith("blocks."), f"sites {each}", expected, "correct --sites, or name a module by --hookpoints")
