"""Regular expressions that a user gives, bounded in time and size."""

import math
import re
from collections.abc import Iterator

import regex

from streamprobe.errors import InputError

PATIENCE = 1.0  # seconds in which a pattern must be through with one text
MOST_REPEATS = 10_000  # that a pattern may count: compiling more takes seconds and more


def compile_pattern(text: str, name: str, *, any_case: bool = False) -> regex.Pattern:
    """The pattern that --`name` gives.  Raises InputError for what is none, and for one that is long to compile."""
    counts = re.findall(r"\{,?(\d+)", text)
    if any(len(n) > 9 for n in counts) or math.prod(map(int, counts)) > MOST_REPEATS:
        raise InputError(f"{name} {text!r}", f"at most {MOST_REPEATS:,} repetitions in all", f"correct --{name}")
    try:
        return regex.compile(text, regex.IGNORECASE if any_case else 0)
    except (regex.error, RecursionError, ValueError, OverflowError) as error:
        raise InputError(f"{name} {text!r} ({error})", "a regular expression of Python", f"correct --{name}") from None


def find_matches(pattern: regex.Pattern, text: str, name: str, *, start: int = 0) -> Iterator[regex.Match]:
    """The matches, from `start` on, of a pattern that --`name` gave.

    Raises InputError where finding them takes longer than PATIENCE.
    """
    try:
        yield from pattern.finditer(text, start, timeout=PATIENCE)
    except (TimeoutError, MemoryError):
        raise InputError(
            f"{name} {pattern.pattern!r}, which takes more than {PATIENCE:g} s or all memory on a text of "
            f"{len(text):,} characters",
            "a regular expression without repetitions of repetitions, such as (a+)+",
            f"correct --{name}",
        ) from None
