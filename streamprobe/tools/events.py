"""What a model did in its responses, as counts with 95% intervals over problems.

Counted are matches of a marker, a regular expression; for the embedded demo model, returns of the search, read exactly:
whether the first wrong step is a return that is not due (early) or something else where one is (missed), and whether
the problem is solved.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import regex

from streamprobe.demo import behaviour
from streamprobe.errors import InputError
from streamprobe.system.patterns import compile_pattern, find_matches

MARKER = r"\b(?:wait|hmm|actually|no(?=,))\b"  # `no` counts where a comma follows
RESAMPLES = 1000
Judge = Callable[[str, str], dict[str, int]]  # prompt and response -> counts, `events` among them


class Estimate(NamedTuple):
    """A number and its 95% interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} ({self.low:.2f} to {self.high:.2f})"


def wilson(hits: int, n: int) -> Estimate:
    """The proportion hits / n and its 95% interval (Wilson 1927)."""
    z, p = 1.959964, hits / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return Estimate(p, max(0.0, (middle - half) / (1 + z * z / n)), min(1.0, (middle + half) / (1 + z * z / n)))


def bootstrap_mean(values: Sequence[int], seed: int) -> Estimate:
    """A mean and its 95% interval over resampled problems."""
    x = np.asarray(values, dtype=np.float64)
    drawn = np.random.default_rng(seed).integers(len(x), size=(RESAMPLES, len(x)))
    low, high = np.percentile(x[drawn].mean(1), [2.5, 97.5])
    return Estimate(float(x.mean()), float(low), float(high))


def summarise(counts: Sequence[Mapping[str, int]], seed: int) -> dict[str, Estimate]:
    """Mean events a response, and the proportions of responses with any, an early or a missed one, and a solution."""
    result = {"events": bootstrap_mean([c["events"] for c in counts], seed)}
    proportions = {"any": "events", "early": "early", "missed": "missed", "solved": "solved"}
    for name, of in proportions.items():
        if of in counts[0]:
            result[name] = wilson(sum(c[of] > 0 for c in counts), len(counts))
    return result


def judge(marker: str | None, texts: Sequence[str]) -> Judge:
    """What is counted in the responses to prompts `texts`: matches of `marker`.

    Without one: the demo's returns, where all prompts are problems of the demo, else matches of MARKER.  Raises
    InputError for a marker that cannot be used.
    """
    if marker is None and all(map(behaviour.is_problem, texts)):
        return lambda prompt, text: behaviour.read_response(behaviour.read_problem(prompt), text)
    pattern = compile_pattern(MARKER if marker is None else marker, "marker", any_case=True)
    if _count(pattern, ""):
        raise InputError(
            f"marker {marker!r}, which matches no text at all", "a marker of some letters", "correct --marker"
        )
    return lambda _prompt, text: {"events": _count(pattern, text)}


def _count(pattern: regex.Pattern, text: str) -> int:
    return sum(1 for _ in find_matches(pattern, text, "marker"))
