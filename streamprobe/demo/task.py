"""Search in plain words: subset sums by depth-first search, dead ends and returns written out.

python -m streamprobe.demo.task                                          # writes chains.json anew: the same bytes
python -m streamprobe.demo.task --sizes 7 --chains 200 --out more.json   # problems with one number more

A problem asks which of the numbers add up to a target.  The response tries the numbers in the order in which they are
given, takes each one that is not too big, and where the list ends without a solution drops the last number taken and
goes on behind it.  Every word follows from the words before; each sentence is a section, labelled as it is written.
The idea is that of Stream of Search (Gandhi et al., 2024, arXiv 2404.03683).

A return is decided by numbers (what is left, and which are still to come) many words before it is written.  The wording
changes with the number, so that no word gives away where a sentence ends; a return begins with `wait`, as do
other sentences, and the word before it is the full stop that ends every sentence.
"""

import argparse
import json
import random
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from streamprobe.demo import CHAINS

SIZES = (3, 4, 5, 6)  # how many numbers a problem has, drawn evenly from these
NUMBERS = range(2, 21)
MAX_TARGET = 30
RETURNS = (1, 2, 3)  # how often a response goes back, drawn evenly from these
WORDS = range(40, 101)  # words of a response
N_CHAINS = 500

# A seed says what its problems are for, and no problem is for two things: see `split_of`.
TRAINING = range(0, 1_000_000)
PROBING = range(1_000_000, 2_000_000)  # chains.json
HELD_OUT = range(2_000_000, 3_000_000)
SPLITS = {"training": TRAINING, "probing": PROBING, "held out": HELD_OUT}


class Problem(NamedTuple):
    """Which of the numbers (all different, in any order) add up to the target?"""

    target: int
    numbers: tuple[int, ...]

    def __str__(self) -> str:
        return f"reach {self.target} with {' '.join(map(str, self.numbers))} ?"


class Step(NamedTuple):
    """One step of the search, and what is left after it."""

    kind: str  # take, skip or drop
    number: int
    left: int


# What a step sounds like: the label, and the sentence for a number that leaves 0, 1 or 2 when divided by 3.
SENTENCES = {
    "take": ("deduction", ("take {0} , {1} left .", "{0} fits , {1} left .", "so take {0} and {1} is left .")),
    "skip": ("example-testing", ("not {0} .", "{0} is too big .", "wait , {0} is too big .")),
    "drop": (
        "backtracking",
        ("wait , drop {0} , {1} left .", "wait , {0} is wrong , {1} left .", "wait , back to {1} without {0} ."),
    ),
}


def split_of(problem: Problem) -> str:
    """The split that a problem belongs to, by its CRC-32: 8 of 10 are for training, 1 for probing, 1 held out."""
    rest = zlib.crc32(str(problem).encode()) % 10
    return "probing" if rest == 8 else "held out" if rest == 9 else "training"


def make_problem(rng: random.Random, split: str = "training", sizes: Sequence[int] = SIZES) -> Problem:
    """A solvable problem of this split whose response has as many words as WORDS allows and goes back as in RETURNS."""
    returns = rng.choice(RETURNS)
    while True:
        numbers = tuple(rng.sample(NUMBERS, rng.choice(sizes)))
        problem = Problem(sum(rng.sample(numbers, rng.randint(2, len(numbers)))), numbers)
        if problem.target > MAX_TARGET or split_of(problem) != split:
            continue
        if sum(step.kind == "drop" for step in search(problem)) != returns:
            continue
        if sum(len(text.split()) for _, text in solve(problem)) in WORDS:
            return problem


def make_problems(n: int, seed: int, sizes: Sequence[int] = SIZES) -> list[Problem]:
    """`n` different problems of the split that the seed belongs to."""
    split = next(name for name, seeds in SPLITS.items() if seed in seeds)
    rng = random.Random(seed)
    problems: dict[Problem, None] = {}
    while len(problems) < n:
        problems[make_problem(rng, split, sizes)] = None
    return list(problems)


def search(problem: Problem) -> Iterator[Step]:
    """The depth-first search.  The problem must have a solution."""
    target, numbers = problem
    left, here, taken = target, 0, list[int]()  # places in `numbers`
    while left:
        if here == len(numbers):
            here = taken.pop() + 1
            left += numbers[here - 1]
            yield Step("drop", numbers[here - 1], left)
            continue
        number = numbers[here]
        if number <= left:
            left -= number
            taken.append(here)
        yield Step("take" if here in taken else "skip", number, left)
        here += 1


def solve(problem: Problem) -> list[tuple[str, str]]:
    """The response as (label, sentence)."""
    sections = [("initializing", f"i look for {problem.target} .")]
    taken: list[int] = []
    for kind, number, left in search(problem):
        label, sentences = SENTENCES[kind]
        sections.append((label, sentences[number % 3].format(number, left)))
        if kind == "take":
            taken.append(number)
        elif kind == "drop":
            taken.pop()
    return [*sections, ("deduction", f"so {' + '.join(map(str, taken))} = {problem.target} .")]


def make_row(problem: Problem, task_id: str) -> dict[str, str]:
    """One annotated chain, in the fields of the original experiment's data."""
    sections = solve(problem)
    return {
        "task_id": task_id,
        "problem": str(problem),
        "reasoning_chain": " ".join(text for _, text in sections),
        "annotated_chain": " ".join(f'["{label}"]{text}["end-section"]' for label, text in sections),
    }


def make_rows(n: int, seed: int, sizes: Sequence[int] = SIZES) -> list[dict[str, str]]:
    """`n` annotated chains of different problems; the same seed gives the same chains."""
    return [make_row(problem, f"subset-sum_{i}") for i, problem in enumerate(make_problems(n, seed, sizes))]


def dumps(rows: list[dict[str, str]]) -> str:
    """Rows as a JSON list, one row a line."""
    return "[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n"


def is_valid_trace(problem: Problem, text: str) -> bool:
    """Is the text a complete and correct search?  Read sentence by sentence; only the wording is shared with `solve`.

    Every number must be considered in its turn and judged rightly, every difference and sum be right, every return
    drop the number that was taken last, at the end of the list and nowhere else, and the last sentence give the sum.
    """
    target, numbers = problem
    opening, *steps = re.findall(r"\S[^.]*\.", text) or [""]
    taken: list[int] = []
    todo = list(numbers)
    if text != " ".join([opening, *steps]) or opening != f"i look for {target} .":
        return False
    for step in map(read_step, steps[:-1]):
        missing = target - sum(taken)
        if step is None or missing == 0:
            return False
        if step.kind == "drop":
            if todo or taken[-1:] != [step.number]:
                return False
            todo = list(numbers[numbers.index(taken.pop()) + 1 :])
        else:
            if todo[:1] != [step.number] or (step.kind == "take") != (step.number <= missing):
                return False
            taken += todo[:1] if step.kind == "take" else []
            todo = todo[1:]
        if step.kind != "skip" and step.left != target - sum(taken):
            return False
    return steps[-1:] == [f"so {' + '.join(map(str, taken))} = {target} ."] and sum(taken) == target


def read_step(sentence: str, strict: bool = True) -> Step | None:
    """The step that a sentence describes (left is 0 where it does not say), or None.

    If `strict`, its wording must be the one that belongs to its number.
    """
    for kind, (_, wordings) in SENTENCES.items():
        for rest, wording in enumerate(wordings):
            pattern = wording.replace(".", r"\.").format(r"(?P<number>\d+)", r"(?P<left>\d+)")
            found = re.fullmatch(pattern, sentence)
            if found and (not strict or int(found["number"]) % 3 == rest):
                return Step(kind, int(found["number"]), int(found.groupdict().get("left", 0)))
    return None


def main() -> None:
    """Writes annotated chains: chains.json, or those of other problems."""
    parser = argparse.ArgumentParser(description="Write annotated chains of the search task, as a JSON list.")
    parser.add_argument("--out", type=Path, default=CHAINS, help="file (default: chains.json of the package)")
    parser.add_argument("--chains", type=int, default=N_CHAINS, help="how many (%(default)s)")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="numbers of a problem, drawn from these")
    parser.add_argument("--seed", type=int, default=PROBING.start, help="of the problems (%(default)s)")
    given = parser.parse_args()
    given.out.write_text(dumps(make_rows(given.chains, given.seed, given.sizes)), encoding="utf-8")


if __name__ == "__main__":
    main()
