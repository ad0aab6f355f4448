"""The embedded demo: the search task, the chains that ship with it, the trained model and its training."""

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from builders import inputs_of
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from streamprobe.cli import main
from streamprobe.data.annotations import parse_annotations
from streamprobe.demo import task
from streamprobe.demo.model import (
    PROMPT,
    SPECIAL,
    VOCABULARY,
    answer,
    make_batch,
    make_model,
    make_tokenizer,
    share_solved,
)
from streamprobe.demo.muon import Muon, orthogonalise
from streamprobe.demo.train import HERE, batches, learning_rate, save, train
from streamprobe.lags import LagBuffer
from streamprobe.run.inputs import Inputs

ROOT = Path(__file__).parents[2]
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
    """The negative control of the checker: a word replaced, dropped or doubled, a sentence dropped or moved."""
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


def test_a_token_is_a_word_and_knows_its_characters():
    tokenizer = make_tokenizer()
    row = task.make_rows(1, task.PROBING.start)[0]
    text = PROMPT.format(problem=row["problem"]) + row["reasoning_chain"]
    encoded = tokenizer(text, return_offsets_mapping=True)
    assert tokenizer.decode(encoded["input_ids"]).split() == ["<s>", *text.split()]
    assert [text[start:end] for start, end in encoded["offset_mapping"][1:]] == text.split()
    ids, labels = make_batch(
        [(PROMPT.format(problem=row["problem"]), row["reasoning_chain"]), ("reach 5 ?\n\n", "so 5")], tokenizer
    )
    assert tokenizer.decode(ids[0][labels[0] >= 0]) == row["reasoning_chain"] + " </s>"
    assert tokenizer.decode(ids[1][labels[1] >= 0]) == "so 5 </s>"
    assert torch.equal(ids[labels >= 0], labels[labels >= 0])


def test_the_embedded_model_is_small_and_solves_held_out_problems():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert sum(path.stat().st_size for path in HERE.iterdir()) < 4_000_000
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(HERE, dtype=torch.float32),
        AutoTokenizer.from_pretrained(HERE),
    )
    assert model.num_parameters() <= 1_500_000
    assert tokenizer.get_vocab() == make_tokenizer().get_vocab()
    assert share_solved(model, tokenizer, task.make_problems(60, task.HELD_OUT[2])) >= 0.9


def test_an_untrained_model_solves_nothing():
    assert share_solved(make_model(0, 2, 32).eval(), make_tokenizer(), task.make_problems(10, task.HELD_OUT[3])) == 0


def test_training_lowers_the_loss_and_repeats_bit_for_bit(tmp_path):
    def once() -> tuple[list[float], dict[str, torch.Tensor]]:
        model = make_model(1, 2, 32)
        return train(model, make_tokenizer(), 60, 8, 1e-2, seed=1), model.state_dict()

    (losses, weights), (again, same) = once(), once()
    assert sum(losses[-5:]) / 5 < 0.7 * losses[0] and losses == again
    assert all(torch.equal(weights[name], same[name]) for name in weights)
    first, other = (next(batches(make_tokenizer(), 4, seed))[0] for seed in (1, 2))
    assert first.shape != other.shape or not torch.equal(first, other)


def test_muon_steps_along_orthogonal_matrices_and_lowers_a_loss():
    torch.manual_seed(0)
    matrices = torch.randn(3, 32, 16, dtype=torch.float64)
    got = orthogonalise(matrices)
    u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
    values = torch.linalg.svdvals(got)
    assert 0.6 < values.min() and values.max() < 1.3
    assert torch.nn.functional.cosine_similarity(got.flatten(1), (u @ vh).flatten(1)).min() > 0.95
    torch.testing.assert_close(orthogonalise(matrices.mT), got.mT)
    weight = torch.nn.Parameter(torch.zeros(8, 8))
    goal, optimizer = torch.randn(8, 8), Muon([weight], lr=0.1, decay=0.0)
    before = (weight - goal).square().sum().item()
    for _ in range(50):
        loss = (weight - goal).square().sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.3 * before


def test_what_is_saved_is_what_is_measured(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, problems = make_tokenizer(), task.make_problems(3, task.HELD_OUT[4])
    model = save(make_model(2, 2, 32).eval(), tokenizer, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
    assert answer(model, tokenizer, problems) == answer(loaded, AutoTokenizer.from_pretrained(tmp_path), problems)
    alone = [answer(model, tokenizer, [problem])[0] for problem in problems]  # padding changes nothing
    assert alone == answer(model, tokenizer, problems)


def test_the_learning_rate_rises_and_falls():
    rates = [learning_rate(step, 300, 1.0) for step in range(300)]
    assert rates[:50] == pytest.approx([step / 50 for step in range(1, 51)]) and rates[50:200] == [1.0] * 150
    assert rates[200:] == sorted(rates[200:], reverse=True) and 0 < rates[-1] <= 0.01


SMALL = ["--layers", "3", "--lags", "0", "4", "--bootstrap", "0", "--max_passes", "3", "--max_chains", "200"]
NO_NETWORK = """
import os, socket, sys
def refuse(*args, **kwargs):  # an exception could be caught, or get lost in a thread
    os.write(2, b"a socket was opened")
    os._exit(3)
socket.getaddrinfo = socket.create_connection = socket.socket.connect = socket.socket.connect_ex = refuse
from streamprobe.cli import main
sys.exit(main(sys.argv[1:]))
"""


def without_network(*argv: str) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own, in which any connection ends it, and nothing says `offline`."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", NO_NETWORK, "configs/demo.yaml", *SMALL, *argv]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_the_demo_needs_no_network(tmp_path):
    done = without_network("--output_dir", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    assert "test AUROC" in done.stdout and str(tmp_path / "run") in done.stdout
    rows = list(csv.DictReader((tmp_path / "run" / "results.csv").open()))
    found = {(row["target"], int(row["lag"])): float(row["auroc"]) for row in rows if not row["control"]}
    assert found["token", 0] > 0.85 and found["onset", 0] > 0.95


@pytest.mark.parametrize("key", ["--model", "--data"])
def test_the_same_with_something_from_the_network_is_noticed(tmp_path, key):
    """Negative control: what comes from elsewhere needs a connection."""
    where = {"--model": "some/model", "--data": "https://example.com/chains.json"}[key]
    done = without_network("--output_dir", str(tmp_path / "run"), key, where)
    assert done.returncode == 3 and "a socket was opened" in done.stderr


def surface(inputs: Inputs, split: str) -> dict[str, np.ndarray]:
    """What the text shows without a model, for every token that counts, and targets and validity [N, K] beside it."""
    found, buffer = [], LagBuffer(inputs.columns, inputs.dataset.labels)
    for chain in inputs.dataset.splits[split]:
        index = torch.arange(len(chain.ids)) - chain.start
        found.append(buffer.push(torch.stack([chain.ids, index], 1), chain.codes, chain.support, last=True))
    acts, targets, valid, _ = (torch.cat(part).numpy() for part in zip(*found, strict=True))
    bumps = np.exp(-(((acts[:, 1:] - np.arange(0, 105, 5)) / 5) ** 2) / 2)
    return {"token": np.eye(len(VOCABULARY))[acts[:, 0]], "position": bumps, "targets": targets, "valid": valid}


def test_returns_are_foreseen_better_than_from_position_or_the_current_token(tmp_path, monkeypatch):
    """The demo's story, against scikit-learn on what the text shows: README tells the numbers of the full grid."""
    monkeypatch.chdir(ROOT)
    argv = ["configs/demo.yaml", "--layers", "2", "--lags", "0", "4", "8", "--bootstrap", "0", "--max_passes", "15"]
    argv += ["--controls", "none"]
    assert main([*argv, "--output_dir", str(tmp_path / "run")]) == 0
    rows = csv.DictReader((tmp_path / "run" / "results.csv").open())
    probe = {(row["target"], int(row["lag"])): float(row["auroc"]) for row in rows if not row["control"]}
    inputs = inputs_of(argv)
    train_split, test_split = surface(inputs, "train"), surface(inputs, "test")
    plain = {}
    for k, column in enumerate(inputs.columns):
        seen, new = train_split["valid"][:, k], test_split["valid"][:, k]
        for kind in ("token", "position"):
            fit = LogisticRegression(class_weight="balanced", max_iter=500)
            fit.fit(train_split[kind][seen], train_split["targets"][seen, k])
            scores = fit.decision_function(test_split[kind][new])
            plain[column.target, column.lag, kind] = roc_auc_score(test_split["targets"][new, k], scores)
    assert probe["token", 0] > 0.96 and probe["onset", 0] > 0.98
    for lag, lead in ((4, 0.05), (8, 0.05)):
        assert probe["onset", lag] > lead + max(plain["onset", lag, kind] for kind in ("token", "position")), plain
    assert plain["onset", 0, "position"] < 0.85  # the control is one that can lose


def test_probabilities_mean_what_they_say(tmp_path, monkeypatch):
    """Class weighting is undone: what the probes say adds up to what is there.  Negative control: with it, it does not."""
    monkeypatch.chdir(ROOT)
    argv = ["configs/demo.yaml", "--layers", "2", "--lags", "0", "8", "--bootstrap", "0", "--max_passes", "15"]
    assert main([*argv, "--controls", "none", "--output_dir", str(tmp_path / "run")]) == 0
    bins = list(csv.DictReader((tmp_path / "run" / "reliability.csv").open()))
    for row in csv.DictReader((tmp_path / "run" / "results.csv").open()):
        mine = [b for b in bins if (b["target"], b["lag"]) == (row["target"], row["lag"])]
        weight = (1 - float(row["base_rate"])) / float(row["base_rate"])
        n, said, true, weighted = 0, 0.0, 0.0, 0.0
        for size, p, share in (
            (int(b["n_tokens"]), float(b["mean_probability"]), float(b["share_positive"])) for b in mine
        ):
            n, said, true = n + size, said + size * p, true + size * share
            weighted += size * p * weight / (p * weight + 1 - p)
        assert n == int(row["n_tokens"]) and true == pytest.approx(int(row["n_positive"]), rel=1e-4)
        assert said / true == pytest.approx(1, abs=0.12) and weighted / true > 1.15
        assert (
            float(row["brier"]) < 0.9 * float(row["base_rate"]) * (1 - float(row["base_rate"]))
            or row["target"] == "onset"
        )


def peak_gb(folder: Path, n_chains: int, memory_gb: str) -> float:
    """Peak memory of a run over so many chains, in a process of its own."""
    argv = ["--targets", "token", "--lags", "0", "8", "--max_passes", "2", "--bootstrap", "0"]
    argv += [
        "--controls",
        "none",
        "--max_batch_tokens",
        "1024",
        "--max_chains",
        str(n_chains),
        "--memory_gb",
        memory_gb,
    ]
    command = [sys.executable, "run.py", "configs/demo.yaml", *argv, "--output_dir", str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    return json.loads((folder / "summary.json").read_text())["run"]["peak_memory_gb"]


def test_memory_does_not_grow_with_the_chains_unless_they_are_kept(tmp_path):
    few, many = (peak_gb(tmp_path / str(n), n, "0.004") for n in (200, 500))
    assert many < 1.05 * few
    assert peak_gb(tmp_path / "kept", 500, "auto") > 1.05 * many  # negative control: 58 MB of activations show
