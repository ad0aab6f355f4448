"""What a response to one of the demo's problems does, read exactly."""

import re
from itertools import zip_longest

from streamprobe.demo.task import Problem, Step, is_valid_trace, read_step, search

PROBLEM = re.compile(r"reach (\d+) with ([\d ]+) \?")


def is_problem(text: str) -> bool:
    """Whether a prompt poses a problem of the demo."""
    return PROBLEM.search(text) is not None


def read_problem(text: str) -> Problem:
    """The problem that a prompt poses."""
    found = PROBLEM.search(text)
    assert found, f"no problem of the demo: {text!r}"
    return Problem(int(found[1]), tuple(map(int, found[2].split())))


def read_response(problem: Problem, text: str) -> dict[str, int]:
    """What the response does, as counts.

    `events`: how often it returns.  `early`, `missed`: 1 if the first step that is not the search's own is a return
    where none is due, or something else where one is.  `solved`: 1 if every step of it is right.  What comes after
    the first wrong step says little, so only the first one counts.
    """
    read = [read_step(sentence, strict=False) for sentence in re.findall(r"\S[^.]*\.", text)]
    found = read[1:] if read[:1] == [None] else read  # the first sentence names the target
    due = [*search(problem), None]  # after the last step comes the sum, which is no step
    kinds = [(a and a.kind, b and b.kind) for a, b in zip_longest(found[: len(due)], due) if not _same(a, b)]
    first, expected = kinds[0] if kinds else (None, None)
    return {
        "events": sum(step is not None and step.kind == "drop" for step in read),
        "early": int(first == "drop" != expected),
        "missed": int(expected == "drop" != first),
        "solved": int(is_valid_trace(problem, text)),
    }


def _same(found: Step | None, due: Step | None) -> bool:
    """Is the step the one that is due?  A sentence that skips a number does not say what is left."""
    if found is None or due is None:
        return found is due
    return (found.kind, found.number) == (due.kind, due.number) and (due.kind == "skip" or found.left == due.left)
