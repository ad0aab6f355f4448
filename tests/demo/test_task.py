"""The search task and the chains that ship with the demo."""

import json
import re
from random import Random

from builders import parse_annotations
from hypothesis import given, settings
from hypothesis import strategies as st

from streamprobe.demo import behaviour, task
from streamprobe.demo.model import SPECIAL, VOCABULARY

RETURN = re.compile(r"wait , (drop|back|\d+ is wrong) ")
SEEDS = st.sampled_from([*task.SPLITS.values()]).flatmap(lambda seeds: st.integers(seeds.start, seeds.stop - 1))


def write(problem: task.Problem) -> str:
    """The true response."""
    return " ".join(text for _, text in task.solve(problem))


@settings(max_examples=25)
@given(SEEDS)
def test_the_annotated_text_without_its_tags_is_the_chain(seed):
    for row in task.make_rows(3, seed):
        plain, sections, unbalanced = parse_annotations(row["annotated_chain"])
        assert plain == row["reasoning_chain"] and unbalanced == 0
        assert re.sub(r'\["[\w-]+"\]', "", row["annotated_chain"]) == row["reasoning_chain"]
        for section in sections:
            text = plain[section.start : section.end]
            assert text.endswith(" .") and (section.label == "backtracking") == bool(RETURN.match(text))
        assert sections[0].label == "initializing" and sections[-1].label == "deduction"
        assert len(plain.split()) in task.WORDS and set(plain.split()) <= set(VOCABULARY[len(SPECIAL) :])


@settings(max_examples=25)
@given(SEEDS)
def test_a_problem_is_solvable_and_of_the_split_of_its_seed(seed):
    split = next(name for name, seeds in task.SPLITS.items() if seed in seeds)
    for problem in task.make_problems(3, seed):
        assert task.split_of(problem) == split
        assert len(problem.numbers) in task.SIZES and len(set(problem.numbers)) == len(problem.numbers)
        terms, total = re.fullmatch(r".* so ([\d +]+) = (\d+) \.", write(problem)).groups()
        terms = [int(word) for word in terms.split(" + ")]
        assert sum(terms) == int(total) == problem.target <= task.MAX_TARGET
        assert [n for n in problem.numbers if n in terms] == terms
        assert task.make_problems(3, seed) == task.make_problems(3, seed)


def test_the_splits_share_no_seed_and_no_problem():
    training, probing, held_out = task.SPLITS.values()
    assert training.stop <= probing.start and probing.stop <= held_out.start
    drawn = [set(task.make_problems(100, seeds.start)) for seeds in task.SPLITS.values()]
    assert not drawn[0] & drawn[1] and not drawn[0] & drawn[2] and not drawn[1] & drawn[2]
    rng = Random(task.TRAINING.start)
    assert {task.split_of(task.make_problem(rng)) for _ in range(100)} == {"training"}


@settings(max_examples=25)
@given(SEEDS)
def test_true_traces_are_valid_and_any_changed_word_is_noticed(seed):
    """What the checker must not take: a word replaced, dropped or doubled, a sentence dropped or moved."""
    (problem,), rng = task.make_problems(1, seed), Random(seed)
    words = write(problem).split()
    sentences = re.findall(r"\S[^.]*\.", write(problem))
    assert task.is_valid_trace(problem, " ".join(words))
    i, j = rng.randrange(len(words)), rng.randrange(len(sentences))
    changed = [
        " ".join([*words[:i], rng.choice(VOCABULARY), *words[i + 1 :]]),
        " ".join([*words[:i], str(rng.randrange(task.MAX_TARGET)), *words[i + 1 :]]),
        " ".join([*words[:i], *words[i + 1 :]]),
        " ".join([*words[:i], words[i], *words[i:]]),
        " ".join(words[:i]),
        " ".join([*sentences[:j], *sentences[j + 1 :]]),
        " ".join([*sentences[:j], sentences[j], *sentences[j:]]),
        " ".join([*sentences[:j], *sentences[j + 1 :], sentences[j]]),
    ]
    for text in changed:
        assert task.is_valid_trace(problem, text) == (text == " ".join(words)), text


def test_the_checker_refuses_what_is_wrong_for_one_reason_each():
    problem = task.Problem(27, (15, 13, 14))
    text = write(problem)
    assert text == (
        "i look for 27 . take 15 , 12 left . 13 is too big . wait , 14 is too big . wait , drop 15 , 27 left . "
        "13 fits , 14 left . so take 14 and 0 is left . so 13 + 14 = 27 ."
    )
    for old, new in (
        ("12 left", "11 left"),  # a wrong difference
        (" 13 is too big .", ""),  # a number passed over
        (" wait , 14 is too big .", ""),  # a return before the end of the list
        ("drop 15 , 27", "drop 12 , 24"),  # a number dropped that was not taken
        ("take 15 , 12 left", "not 15"),  # a wrong judgement
        ("13 is too big", "not 13"),  # another number's words
        ("so 13 + 14", "so 14 + 13"),
        (" so 13 + 14 = 27 .", ""),
    ):
        assert old in text and not task.is_valid_trace(problem, text.replace(old, new, 1)), (old, new)
    assert not task.is_valid_trace(task.Problem(28, (15, 13, 14)), text)
    assert not task.is_valid_trace(problem, "") and not task.is_valid_trace(problem, "so 13 + 14 = 27 .")


def test_the_shipped_chains_are_those_that_the_task_makes():
    assert task.CHAINS.read_text(encoding="utf-8") == task.dumps(task.make_rows(task.N_CHAINS, task.PROBING.start))
    assert task.CHAINS.stat().st_size < 1_000_000
    rows = json.loads(task.CHAINS.read_text(encoding="utf-8"))
    assert len({row["problem"] for row in rows}) == len({row["task_id"] for row in rows}) == task.N_CHAINS


def test_neither_the_first_word_of_a_return_nor_the_one_before_gives_it_away():
    words, returns = [], []
    for row in json.loads(task.CHAINS.read_text(encoding="utf-8")):
        plain, sections, _ = parse_annotations(row["annotated_chain"])
        starts = {section.start for section in sections if section.label == "backtracking"}
        for match in re.finditer(r"\S+", plain):
            words.append(match[0])
            returns.append(match.start() in starts)
    before = [word for word, after in zip(words, returns[1:], strict=False) if after]
    assert set(before) == {"."} and 0.1 < len(before) / words.count(".") < 0.3
    first = [word for word, begins in zip(words, returns, strict=True) if begins]
    assert set(first) == {"wait"} and 0.5 < len(first) / words.count("wait") < 0.9


def test_chains_of_problems_with_more_numbers_can_be_written(tmp_path, monkeypatch):
    """Of other problems than those of the package, since they have another size; the same command, the same bytes."""
    written = []
    for name in ("one.json", "two.json"):
        argv = ["task", "--sizes", "7", "--chains", "5", "--out", str(tmp_path / name)]
        monkeypatch.setattr("sys.argv", argv)
        task.main()
        written.append((tmp_path / name).read_bytes())
    assert written[0] == written[1]
    rows = json.loads(written[0])
    problems = [behaviour.read_problem(row["problem"]) for row in rows]
    assert len(set(problems)) == 5 and {len(problem.numbers) for problem in problems} == {7}
    assert all(map(task.is_valid_trace, problems, [row["reasoning_chain"] for row in rows]))
