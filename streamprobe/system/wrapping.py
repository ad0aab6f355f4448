"""Lines that fit a terminal: broken between words, the rest below where the text began."""

import re
import shutil
import sys
import textwrap
from collections.abc import Iterable
from typing import TextIO

LEAST = 30  # columns: in a narrower terminal lines are left to it
HEAD = re.compile(r"( *)(\S+(?: \S+)* {2,})?")  # what stands before a line's text: white space, a name in a column


def columns_of(stream: TextIO | None) -> int | None:
    """How many columns the terminal has that a stream leads to; None for a file or a pipe, whose lines stay whole."""
    if stream is None or not stream.isatty():
        return None
    columns = shutil.get_terminal_size().columns
    return columns if columns >= LEAST else None


def columns() -> int | None:
    """How many columns standard output has; None where it is no terminal."""
    return columns_of(sys.stdout)


def wrapped(text: str, width: int | None) -> str:
    """The text with no line longer than `width`, but for words that are; as it stands where that is None.

    A line is broken between words, and what follows stands below where its text began: behind the spaces at its
    beginning and, where it begins with a name and two spaces or more, behind these.
    """
    if width is None:
        return text
    return "\n".join(broken for line in text.split("\n") for broken in _broken(line, width))


def _broken(line: str, width: int) -> Iterable[str]:
    if len(line) <= width:
        return [line]
    match = HEAD.match(line)
    assert match, "which matches nothing, too"
    deep = match.end() if match[2] and match.end() <= width // 2 else len(match[1]) + 4
    wrapper = textwrap.TextWrapper(
        width,
        subsequent_indent=" " * min(deep, width // 2),
        expand_tabs=False,
        replace_whitespace=False,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return wrapper.wrap(line) or [line]
