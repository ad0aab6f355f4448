"""Problems that a run has seen are found in other data, whatever their white space, and no others."""

import torch
from builders import make_record

from streamprobe.data.overlap import count_seen, problem_hashes
from streamprobe.data.tokenize import Chain

NO_TOKENS = torch.zeros(0, dtype=torch.int64)


def hashes_of(*texts):
    """Of records with these problems and responses."""
    records = [make_record(problem, response) for problem, response in texts]
    chains = [Chain("", NO_TOKENS, NO_TOKENS, NO_TOKENS, row=row) for row in range(len(records))]
    return problem_hashes(records, chains)


def test_twins_are_found():
    seen = hashes_of(("caf\u00e9 at 5?\n", "a"), ("two", "b"), ("", "a text of its own")).unique()
    others = hashes_of((" cafe\u0301 at 5?", "x"), ("two\r\n", "y"), ("", "a text of its own"), ("\ud83d", "half"))
    assert count_seen(others, seen) == 3


def test_no_twin_is_found_fails_without_an_equal_problem():
    seen = hashes_of(("one", "a"), ("two", "b")).unique()
    assert count_seen(hashes_of(("three", "a"), ("", "b"), ("One", "a")), seen) == 0
    assert count_seen(hashes_of(), seen) == count_seen(hashes_of(("one", "a")), hashes_of()) == 0


def test_the_hash_of_a_chain_is_that_of_its_own_row():
    records = [make_record("one", "a"), make_record("two", "b")]
    chains = [Chain("", NO_TOKENS, NO_TOKENS, NO_TOKENS, row=row) for row in (1, 0, 1)]
    a, b, c = problem_hashes(records, chains).tolist()
    assert a == c != b
