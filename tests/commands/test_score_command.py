"""`streamprobe score` at the command line: what it writes and says, and that being killed costs one window."""

import csv
import json
import os
import signal
from pathlib import Path

import pytest
import torch
from builders import make_rows
from forked import FORK
from pyarrow.parquet import read_table

from streamprobe import cli, load_probes
from streamprobe.model import backbone
from streamprobe.system.csv_files import text_of
from streamprobe.system.growing import GrowingFile
from streamprobe.tools import score_windows

N = 40


@pytest.fixture
def texts(tmp_path, monkeypatch):
    """A file of 40 texts without labels, in the working directory; 7 of them make a window."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(score_windows, "TEXTS", 7)
    rows = [{"text": r["reasoning_chain"], "problem": r["problem"], "id": f"t{i}"} for i, r in enumerate(make_rows(N))]
    Path("texts.json").write_text(json.dumps(rows))
    return rows


@pytest.fixture
def ran(run_folder, texts, capsys):
    """What a command line prints, and on standard error where its status is another than 0."""

    def run(*argv, status=0):
        assert cli.main(["score", str(run_folder), "texts.json", *argv]) == status
        said = capsys.readouterr()
        return said.out if status == 0 else said.err

    return run


def test_every_token_of_every_text_is_written(ran, texts):
    said = ran("--out", "s.csv")
    assert (
        said.startswith("format    text: ") and "\n40 of 40 texts scored, " in said and said.endswith("wrote s.csv\n")
    )
    assert sorted(os.listdir()) == ["s.csv", "texts.json"]
    rows = list(csv.DictReader(open("s.csv", newline="", encoding="utf-8")))
    rows = [row | {"token": text_of(row["token"])} for row in rows]
    assert list(rows[0]) == ["row", "id", "token", "start", "end", "backtracking/token/layer01/lag+00", "alarm"]
    for number, text in enumerate(texts):
        own = [row for row in rows if row["row"] == str(number)]
        assert {row["id"] for row in own} == {f"t{number}"}
        assert [text["text"][int(row["start"]) : int(row["end"])] for row in own] == [row["token"] for row in own]
        assert "".join(row["token"] for row in own) == text["text"]
    assert {row["alarm"] for row in rows} == {"0", "1"}
    for row in rows:
        assert (float(row["backtracking/token/layer01/lag+00"]) >= 0.5) == (row["alarm"] == "1")


def test_the_chosen_probes_are_those_of_the_library(ran, texts, run_folder, model_dir, tokenizer):
    from transformers import AutoModelForCausalLM

    probes, model = load_probes(run_folder), AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    scored = probes.score(model, tokenizer, [(text["problem"], text["text"]) for text in texts])
    expected = torch.cat([each.probabilities for each in scored])
    ran("--out", "one.parquet", "--layer", "2", "--lag", "4", "--target", "onset")
    (i, k), name = probes.place(2, 4, target="onset"), "backtracking/onset/layer02/lag+04"
    one = read_table("one.parquet")
    torch.testing.assert_close(torch.tensor(one[name].to_pylist()), expected[:, i, k], atol=1e-6, rtol=0)
    assert (torch.tensor(one[name].to_pylist()) - expected[:, i - 1, k]).abs().max() > 1e-3  # negative control
    ran("--out", "some.parquet", "--probes", "all", "--target", "token", "--layer", "1")
    some = read_table("some.parquet")
    assert some.column_names[5:] == [f"backtracking/token/layer01/lag{lag}" for lag in ("-02", "+00", "+04")]
    for j, column in enumerate(some.columns[5:]):
        torch.testing.assert_close(torch.tensor(column.to_pylist()), expected[:, 1, j], atol=1e-6, rtol=0)


def test_the_model_is_cut_off_above_the_deepest_chosen_layer(ran, monkeypatch):
    seen, real = [], backbone._load_cut
    monkeypatch.setattr(
        backbone, "_load_cut", lambda m, c, n, *rest, **more: seen.append(n) or real(m, c, n, *rest, **more)
    )
    ran("--layer", "0", "--lag", "4")
    ran("--probes", "all", "--out", "s.csv")
    assert seen == [1, 3]


def test_without_a_file_there_is_a_summary(ran):
    form, *said = ran().splitlines()
    assert (
        form.startswith("format    text: text in 'text'")
        and said[0] == "backtracking/token/layer01/lag+00, newton; alarm from a probability of 0.500 on"
    )
    assert said[2].split()[:4] == ["text", "tokens", "highest", "alarms"]
    values = [float(line.split()[2]) for line in said[3:23]]
    assert values == sorted(values, reverse=True) and all("▲" in line for line in said[3:23])
    assert said[24].startswith("40 of 40 texts scored, ") and "an alarm in " in said[24] and len(said) == 26
    assert "--out scores.csv" in said[25]


def test_what_is_not_scored_is_named(ran, texts):
    odd = [*texts[:2], {"text": ""}, {"text": "wait " * 600, "id": "long"}, {"text": 5}, {"text": "\ud800"}]
    Path("texts.json").write_text(json.dumps(odd))
    for said in (ran(), ran("--out", "s.jsonl")):
        assert "2 of 6 texts scored" in said and "not scored: 1 text with an empty response: #3\n" in said
        assert "not scored: 1 text longer than the model's context of 512 tokens: long\n" in said
        assert "not scored: 1 text with text that is not Unicode: #6" in said and "missing or not text: #5" in said
    assert {json.loads(line)["row"] for line in open("s.jsonl")} == {0, 1}


# --- interrupted ---


def stopped_after(n, how):
    """`GrowingFile.add` that adds n pieces and then stops the command."""
    real, count = GrowingFile.add, 0

    def add(self, content, state):
        nonlocal count
        if count == n:
            how()
        count += 1
        real(self, content, state)

    return add


def interrupt():
    raise KeyboardInterrupt


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def start(argv):
    """In a process of its own: dies when the third window would be written."""
    GrowingFile.add = stopped_after(2, die)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    cli.main(argv)


@pytest.mark.parametrize("name", ["s.csv", "s.jsonl", "s.parquet", "s.csv.gz"])
def test_killed_and_resumed_it_writes_the_same_file(ran, run_folder, monkeypatch, name):
    said = ran("--out", f"straight.{name}")
    child = FORK.Process(target=start, args=(["score", str(run_folder), "texts.json", "--out", name],))
    child.start()
    child.join(120)
    assert child.exitcode == -signal.SIGKILL and not Path(name).exists()
    assert json.loads(Path(f"{name}.part.json").read_text())["state"]["read"] == 14
    assert "expected --resume, which goes on with it" in ran("--out", name, status=2)
    with monkeypatch.context() as patch:
        patch.setattr(GrowingFile, "add", stopped_after(1, interrupt))
        assert "the same command with --resume goes on" in ran("--out", name, "--resume", status=130)
    assert ran("--out", name, "--resume") == said.replace("straight.", "")
    assert Path(name).read_bytes() == Path(f"straight.{name}").read_bytes()
    assert sorted(os.listdir()) == sorted([name, f"straight.{name}", "texts.json"])
    assert "which is whole; expected a new file" in ran("--out", name, "--resume", status=2)


def test_a_resumed_file_fails_without_the_same_texts_or_probes(ran, texts, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(GrowingFile, "add", stopped_after(2, interrupt))
        ran("--out", "s.csv", status=130)
    assert "--resume with columns" in ran("--out", "s.csv", "--resume", "--layer", "0", status=2)
    assert "--resume with max_batch_tokens 64; expected 8192" in ran(
        "--out", "s.csv", "--resume", "--max_batch_tokens", "64", status=2
    )
    Path("texts.json").write_text(json.dumps(texts[::-1]))
    assert "--resume with texts" in ran("--out", "s.csv", "--resume", status=2)
    Path("texts.json").write_text(json.dumps(texts))
    assert "40 of 40" in ran("--out", "s.csv", "--resume")


def test_a_command_that_fails_before_its_first_window_leaves_nothing(ran):
    assert "model gone" in ran("--out", "s.csv", "--model", "gone", status=2)
    assert os.listdir() == ["texts.json"]


# --- what is wrong ---


@pytest.mark.parametrize(
    "argv, said",
    [
        (["--out", "s.txt"], "out s.txt; expected a file that ends in .csv"),
        (["--out", "gone/s.csv"], "its folder does not exist"),
        (["--out", "texts.json"], "expected a file that ends in"),
        (["--resume"], "--resume without --out"),
        (["--probes", "all"], "--probes all without --out"),
        (["--probes", "some"], "invalid choice"),
        (["--layer", "9"], "layer 9; expected one of 0 1 2"),
        (["--lag", "9", "--probes", "all", "--out", "s.csv"], "lag 9, which no probe has; expected layers 0 1 2 and"),
        (["--solver", "adam"], "solver 'adam'"),
        (["--max_batch_tokens", "0"], "max_batch_tokens 0"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_the_user_got_wrong_is_one_line_before_the_model_is_loaded(ran, monkeypatch, argv, said):
    monkeypatch.setattr(backbone, "_load_cut", interrupt)
    line = ran(*argv, status=2)
    assert said in line and line.count("\n") == 1 and os.listdir() == ["texts.json"]
