"""No problem crosses from one split to another, however its twins are written, and no chain is lost on the way."""

import hashlib
import json
import unicodedata
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import fingerprint, load_chains, make_rows
from hypothesis import given
from hypothesis import strategies as st

from streamprobe.config.load import load_config
from streamprobe.data.dataset import Division
from streamprobe.data.files import read_rows
from streamprobe.data.splits import fold_chains, same_problem, split_chains
from streamprobe.model.blocks import context
from streamprobe.model.loading import read_config
from streamprobe.model.tokenizer import load_tokenizer

ROOT = Path(__file__).parents[2]
CHAINS = ROOT.parent / "shared" / "data" / "all_annotated_chains.json"
FIELDS = ("task_id", "problem", "reasoning_chain", "annotated_chain")
LABELS = ["backtracking", "deduction"]


def plainly(problem: str) -> str:
    """What the same problem looks like however it was typed: an independent reference."""
    lines = unicodedata.normalize("NFC", problem).replace("\r\n", "\n").replace("\r", "\n")
    return lines.strip()


def crossing(problems: list[Any], where: list[str]) -> set[str]:
    """The problems that are in more than one of training, validation and test."""
    found = defaultdict(set)
    for problem, split in zip(problems, where, strict=True):
        if isinstance(problem, str) and problem.strip() and split != "duplicate":
            found[plainly(problem)].add(split)
    return {problem for problem, splits in found.items() if len(splits) > 1}


TWINS = {
    "a trailing blank": lambda problem: problem + " ",
    "blank lines around it": lambda problem: f"\n {problem}\t\n\n",
    "CRLF": lambda problem: problem.replace("\n", "\r\n"),
    "CR": lambda problem: problem.replace("\n", "\r"),
    "decomposed letters": lambda problem: unicodedata.normalize("NFD", problem),
    "the same": lambda problem: problem,
}


@pytest.mark.parametrize("by", ["problem", "chain"])
@pytest.mark.parametrize("name", TWINS)
def test_twins_that_are_written_otherwise_do_not_cross(name, by):
    problems = [f"Où est la clé {i} ?\nRéponds en français." for i in range(100)]
    problems = [*problems, *map(TWINS[name], problems)]
    where = split_chains(problems, by=by)
    assert not crossing(problems, where)
    drawn = np.random.RandomState(42).permutation(200)[:40] % 100  # the problems of the test chains, where chains are
    assert where.count("duplicate") == (0 if by == "problem" else 2 * len(set(drawn)) - 40)
    if name != "the same":
        assert len(set(problems)) == 200


def test_twins_that_are_written_otherwise_fails_without_plain_problems():
    """The negative control: problems that are compared as they stand cross."""
    problems = [f"Où est la clé {i} ?" for i in range(100)]
    problems += [unicodedata.normalize("NFD", problem) for problem in problems]
    where = split_chains([f"{problem!a}" for problem in problems])
    assert len(crossing(problems, where)) > 20


@given(
    st.lists(st.sampled_from(["a", "a ", "a\r\nb", "a\nb", "é", "e\u0301", "", " ", None, 3, "c", "d", "e", "f", "g"])),
    st.sampled_from(["problem", "chain"]),
    st.integers(0, 99),
    st.booleans(),
)
def test_no_problem_crosses(problems, by, seed, by_category):
    chosen = [len(str(problem)) % 3 == 1 for problem in problems] if by_category else None
    where = split_chains(problems, seed=seed, by=by, test=chosen)
    assert not crossing(problems, where)
    assert set(where) <= {"train", "validation", "test", "duplicate"} and len(where) == len(problems)
    if chosen:
        assert [split == "test" for split in where] == chosen
    elif by == "problem":
        assert "duplicate" not in where


@pytest.mark.parametrize("responses", [1, 8, 16])
def test_several_responses_a_problem_lose_nothing_and_shares_are_of_problems(responses):
    n = 640 // responses
    problems = [f"problem {i % n}" for i in range(640)]
    where = split_chains(problems)
    n_test = int(0.2 * n)
    n_validation = round(0.1 * (n - n_test))
    of = {name: {p for p, w in zip(problems, where, strict=True) if w == name} for name in set(where)}
    assert {name: len(found) for name, found in of.items()} == {
        "test": n_test,
        "validation": n_validation,
        "train": n - n_test - n_validation,
    }
    assert Counter(where) == {name: len(found) * responses for name, found in of.items()}
    order = [f"problem {i}" for i in np.random.RandomState(42).permutation(n)]  # numpy's, over the problems
    assert of["test"] == set(order[:n_test]) and of["validation"] == set(order[n_test : n_test + n_validation])


def test_several_responses_a_problem_fails_without_drawing_problems():
    """The negative control: where chains are drawn, most of the 640 are thrown away, and validation outgrows training."""
    where = Counter(split_chains([f"problem {i % 80}" for i in range(640)], by="chain"))
    assert where["duplicate"] > 300 and where["validation"] > where["train"]
    assert "train" not in split_chains([f"problem {i % 40}" for i in range(640)], by="chain")


@pytest.mark.parametrize("missing", [None, "", " \n", 4])
def test_rows_without_a_problem_are_each_their_own(missing):
    where = Counter(split_chains([missing] * 640))
    assert where == split_counts(640)
    assert Counter(split_chains(["one problem"] * 640)) == {"train": 640}  # negative control


@pytest.mark.parametrize("missing", [None, "", " \n"])
def test_rows_without_a_problem_are_all_used_and_counted(tokenizer, missing):
    rows: list[dict[str, Any]] = [row | {"problem": missing} for row in make_rows(64, seed=5)]
    del rows[3]["problem"]
    splits, counts = load_chains(rows, tokenizer, LABELS, 512)
    assert {name: len(chains) for name, chains in splits.items()} == split_counts(64)
    assert counts.used == counts.without_problem == 64 and not counts.refused
    whole = load_chains(make_rows(64, seed=5), tokenizer, LABELS, 512)
    assert whole[1].without_problem == 0
    assert [c.id for c in splits["test"]] == [c.id for c in whole[0]["test"]]


def split_counts(n: int) -> dict[str, int]:
    """Chains of each split where every problem has one."""
    n_test = int(0.2 * n)
    n_validation = round(0.1 * (n - n_test))
    return {"test": n_test, "validation": n_validation, "train": n - n_test - n_validation}


def test_the_problem_is_fed_as_it_is_written(tokenizer):
    rows = [row | {"problem": row["problem"] + " \r\n"} for row in make_rows(20, seed=5)]
    splits, _ = load_chains(rows, tokenizer, LABELS, 512)
    chain = splits["train"][0]
    problem = next(row["problem"] for row in rows if row["task_id"] == chain.id)
    assert tokenizer.decode(chain.ids[: chain.start], skip_special_tokens=True) == problem + "\n\n"


@pytest.mark.parametrize("by", ["problem", "chain"])
def test_twins_of_held_out_categories_are_left_out_and_counted(tokenizer, by):
    rows = make_rows(40, seed=6)
    twin, other = rows[0], rows[1]  # of `alpha` and `beta`
    other["problem"] = " " + twin["problem"]
    division = Division(test_categories=["alpha"], by=by)
    splits, counts = load_chains(rows, tokenizer, LABELS, 512, division=division)
    assert {chain.category for chain in splits["test"]} == {"alpha"} and len(splits["test"]) == 10
    assert counts.refused == {"with a problem of the test split": [other["task_id"]]}


# The rows of the original experiment's data: ten categories in this order, 100 chains each, named by category and
# number; two problems occur twice.
CATEGORIES = "causal creative lateral math_logic pattern probability scientific spatial systems verbal".split()
IDS = [f"{category}_{i}" for category in CATEGORIES for i in range(100)]
SAME = [("lateral_9", "lateral_77"), ("math_logic_5", "math_logic_83")]
TEST_IDS = "3da184d0e15c416589210f0c05ed02d4dbb8a21d26716c7db65c2dc77ef21a5f"  # SHA-256 of the sorted ids, by lines


def digest(ids: list[str]) -> str:
    return hashlib.sha256("\n".join(sorted(ids)).encode()).hexdigest()


def original_problems() -> list[str]:
    second = {b: a for a, b in SAME}
    return [f"the problem of {second.get(id, id)}" for id in IDS]


@pytest.mark.parametrize("name", ["llama-3.1-8b", "llama-3.1-8b-as-published", "smollm2-135m"])
def test_the_original_experiments_test_chains_stay_what_they_are(name, monkeypatch):
    data = load_config([str(ROOT / "configs" / f"{name}.yaml")]).data
    where = split_chains(original_problems(), test_share=data.test_share, seed=data.split_seed, by=data.split_by)
    test = [id for id, split in zip(IDS, where, strict=True) if split == "test"]
    assert Counter(where) == {"test": 200, "train": 719, "validation": 81} and digest(test) == TEST_IDS
    order = np.random.RandomState(42).permutation(1000)[:200]  # as the original experiment draws them
    assert set(test) == {IDS[i] for i in order}


def test_the_original_experiments_test_chains_fails_without_drawing_chains():
    where = split_chains(original_problems())
    assert digest([id for id, split in zip(IDS, where, strict=True) if split == "test"]) != TEST_IDS


@pytest.mark.real
@pytest.mark.skipif(not CHAINS.exists(), reason=f"no annotated chains in {CHAINS}")
def test_the_original_experiments_rows_are_those_that_the_split_is_tested_on():
    rows = json.loads(CHAINS.read_text(encoding="utf-8"))
    assert [row["task_id"] for row in rows] == IDS
    twins = defaultdict(list)
    for number, row in enumerate(rows):
        twins[same_problem(row["problem"], number)].append(row["task_id"])
    assert [tuple(ids) for ids in twins.values() if len(ids) > 1] == SAME
    where = split_chains([row["problem"] for row in rows], by="chain")
    assert digest([id for id, split in zip(IDS, where, strict=True) if split == "test"]) == TEST_IDS


def test_the_demos_chains_and_split_stay_what_they_are(monkeypatch):
    """Its problems all differ, so that the order of problems is that of chains."""
    monkeypatch.chdir(ROOT)
    config = load_config(["configs/demo.yaml"])
    rows = read_rows(config.data.data, split="train")
    assert len({same_problem(row["problem"], i) for i, row in enumerate(rows)}) == len(rows) == 500
    splits, _ = load_chains(
        rows, load_tokenizer(config.model.model), config.probes.labels, context(read_config(config.model.model))
    )
    assert fingerprint(splits) == "dde4f329a92e3218bb7c7272eac8c05cd6c3e339bf7c538fb8de671fff571126"


# --- folds ---


@pytest.mark.parametrize("folds", [2, 5])
def test_every_problem_is_in_one_fold_with_all_of_its_chains(folds: int) -> None:
    problems = [f"problem {i % 83}" for i in range(400)]
    places = fold_chains(problems, folds=folds, validation_share=0.2)
    by_problem = {
        problem: {place for p, place in zip(problems, places, strict=True) if p == problem} for problem in problems
    }
    assert all(len(found) == 1 for found in by_problem.values())
    sizes = Counter(place.fold for (place,) in by_problem.values())
    assert sorted(sizes) == list(range(folds)) and max(sizes.values()) - min(sizes.values()) <= 1
    for fold, n in sizes.items():
        held = [place for (place,) in by_problem.values() if place == (fold, "validation")]
        assert abs(len(held) - n * 0.2) <= 1
    assert places == fold_chains(problems, folds=folds, validation_share=0.2)
    assert places != fold_chains(problems, folds=folds, validation_share=0.2, seed=1)  # negative control
