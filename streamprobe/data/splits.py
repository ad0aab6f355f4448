"""Which chains are for training, validation and test, so that no problem is in two of them.

Or all are for all three, in turn (cross-fitting): the chains are divided into folds, and for each fold there are probes
of their own, trained on the chains of the others and tested on its own.
"""

import unicodedata
from collections.abc import Hashable, Sequence
from hashlib import blake2b
from typing import NamedTuple

import numpy as np


def same_problem(problem: object, row: int) -> Hashable:
    """What twins have in common: the problem with plain line ends, no white space around it, and composed letters.

    A row without a problem is nobody's twin: what is given back is the number of the row.
    """
    if not isinstance(problem, str) or not problem.strip():
        return row
    plain = problem.replace("\r\n", "\n").replace("\r", "\n").strip()
    return unicodedata.normalize("NFC", plain)


def split_chains(
    problems: Sequence[object],
    *,
    test_share: float = 0.2,
    validation_share: float = 0.1,
    seed: int = 42,
    by: str = "problem",
    test: Sequence[bool] | None = None,
) -> list[str]:
    """`train`, `validation`, `test` or `duplicate` for each chain, given the problem of each; twins never cross.

    by `problem`: the different problems, in the order of their first chains, are drawn by numpy's
    `RandomState(seed).permutation`; the first `test_share` of them are test, the next ones validation, until
    `validation_share` of the rest is reached.  All chains of a problem go together.  by `chain`: the chains are drawn,
    as in the original experiment, and a twin of a test chain that is not test itself is left out (`duplicate`), since
    the test chains are the original's.  With `test`, the test chains are those where it is True, and their twins are
    left out, too.
    """
    names = [same_problem(problem, row) for row, problem in enumerate(problems)]
    number = {name: i for i, name in enumerate(dict.fromkeys(names))}
    units = names if by == "chain" else list(number)  # what is drawn
    unit_of = range(len(names)) if by == "chain" else [number[name] for name in names]
    order = np.random.RandomState(seed).permutation(len(units)).tolist()
    if test is None:
        first = set(order[: int(len(units) * test_share)])
        test = [unit in first for unit in unit_of]
    held_out = {name for name, chosen in zip(names, test, strict=True) if chosen}
    rest = [units[i] for i in order if units[i] not in held_out]
    validation = set(rest[: round(len(rest) * validation_share)])

    def place(name: Hashable, chosen: bool) -> str:
        if chosen:
            return "test"
        if name in held_out:
            return "duplicate"
        return "validation" if name in validation else "train"

    return [place(name, chosen) for name, chosen in zip(names, test, strict=True)]


class FoldPlace(NamedTuple):
    """Where a chain stands in a run of several folds."""

    fold: int  # whose probes are tested on it
    split: str  # what it is for the probes of the other folds: `train` or `validation`


def fold_chains(
    problems: Sequence[object], *, folds: int, validation_share: float = 0.1, seed: int = 42
) -> list[FoldPlace]:
    """The place of each chain, given the problem of each; all chains of a problem go together.

    The different problems, in the order of their first chains, are drawn by numpy's `RandomState(seed).permutation` and
    dealt out to the folds in turn; about the first `validation_share` of each fold validates the probes of the others.
    """
    names = [same_problem(problem, row) for row, problem in enumerate(problems)]
    units = list(dict.fromkeys(names))
    places: dict[Hashable, FoldPlace] = {}
    order = np.random.RandomState(seed).permutation(len(units)).tolist()
    n_dealt = n_held = 0  # units of this fold and those before, and how many of them validate
    for fold in range(folds):
        dealt = order[fold::folds]
        n_dealt += len(dealt)
        n_validation = round(n_dealt * validation_share) - n_held
        n_held += n_validation
        for number, unit in enumerate(dealt):
            places[units[unit]] = FoldPlace(fold, "validation" if number < n_validation else "train")
    return [places[name] for name in names]


def number_of(name: str, *, seed: int, purpose: str) -> int:
    """A number from 0 to 2**63 - 1 that looks random and depends on these alone: BLAKE2b."""
    digest = blake2b(f"{seed}/{purpose}/{name}".encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def split_of(name: str, *, test_share: float, validation_share: float, seed: int) -> str:
    """`train`, `validation` or `test` for a chain of a stream, by a hash of what it has in common with its twins."""
    if number_of(name, seed=seed, purpose="test") < test_share * 2**63:
        return "test"
    return "validation" if number_of(name, seed=seed, purpose="validation") < validation_share * 2**63 else "train"
