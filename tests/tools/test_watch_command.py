"""`streamprobe watch`: one prompt, many, or a conversation; what is printed, written and refused."""

import io
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from builders import make_tokenizer
from test_conversation import TEMPLATE
from test_marked_text import Text
from transformers import AutoModelForCausalLM

from streamprobe import cli
from streamprobe.commands import watch as command
from streamprobe.system.console import printable
from streamprobe.tools import conversation, generation
from streamprobe.tools import watch as monitor
from streamprobe.tools.watch import watch

GREEDY = {"do_sample": False}
HEAVY = ("datasets", "pandas", "pyarrow", "sklearn", "matplotlib", "tensorboard", "torch.utils.tensorboard", "IPython")


@pytest.fixture(scope="module")
def model(model_dir):
    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory, run_folder, model_dir):
    """A run whose prompt is the tokenizer's chat template."""
    folder = tmp_path_factory.mktemp("chat")
    own = shutil.copytree(model_dir, folder / "model")
    make_tokenizer(chat_template=TEMPLATE).save_pretrained(own)
    run = shutil.copytree(run_folder, folder / "run")
    keys = yaml.safe_load((run / "config.yaml").read_text()) | {"prompt": "chat", "model": str(own)}
    (run / "config.yaml").write_text(yaml.safe_dump(keys))
    return run


@pytest.fixture
def piped(monkeypatch):
    """Gives standard input the lines that are piped into it."""
    return lambda text: monkeypatch.setattr(sys, "stdin", io.StringIO(text))


def lines_of(text):
    return [json.loads(line) for line in text.splitlines()]


def test_the_command_line_shows_what_watch_gives(run_folder, model, bank, tokenizer, capsys, tmp_path):
    page = tmp_path / "watch.html"
    argv = [str(run_folder), "--prompt", "which box?", "--max_new_tokens", "20", "--lag", "4", "--target", "onset"]
    assert cli.main(["watch", *argv, "--html", str(page)]) == 0
    out = capsys.readouterr().out
    assert "layer 1, backtracking/onset/lag+04" in out  # the best of results.csv
    ids = generation.encode("which box?", "{problem}\n\n", tokenizer, True)
    assert ids.tolist() == tokenizer("which box?\n\n")["input_ids"] and ids[0] == tokenizer.bos_token_id
    place, pieces = bank.place(1, 4, target="onset"), generation.Pieces(tokenizer, ids.tolist())
    steps = monitor.read_steps(watch(model, bank, ids, 20, **GREEDY), bank, place, pieces)
    shown = list(monitor.marks(steps, 0.5, pieces))
    text = "".join(printable(m.text) for m in shown)
    assert text in out.replace("\u25b2", "").replace("\u25bc", "") and text in Text(page.read_text()).text
    assert any(m.alarm for m in shown) and not all(m.alarm for m in shown) and "\x1b" not in out
    assert cli.main(["watch", *argv, "--layer", "0"]) == 0 and "layer 0, backtracking/onset" in capsys.readouterr().out


def test_sampling_repeats_with_its_seed(run_folder, capsys):
    def once(seed):
        argv = [str(run_folder), "--prompt", "go", "--temperature", "2", "--top_p", "0.9", "--max_new_tokens", "15"]
        assert cli.main(["watch", *argv, "--seed", seed]) == 0
        return capsys.readouterr().out

    assert once("1") == once("1") != once("2")


# --- JSON ---


def test_json_is_all_that_is_printed_and_what_watch_gives(run_folder, model, bank, tokenizer, capsys, tmp_path):
    argv = [str(run_folder), "--prompt", "which box?", "--max_new_tokens", "9", "--lag", "4", "--target", "onset"]
    assert cli.main(["watch", *argv, "--json", "--html", str(tmp_path / "x.html")]) == 0
    out, err = capsys.readouterr()
    ids = generation.encode("which box?", "{problem}\n\n", tokenizer, True)
    given = list(watch(model, bank, ids, 9, **GREEDY))
    found = lines_of(out)
    assert [line["token"] for line in found] == [token for token, _ in given]
    assert [line["position"] for line in found] == list(range(len(given)))
    place = bank.place(1, 4, target="onset")
    for line, (_, probabilities) in zip(found, given, strict=True):
        assert set(line) == {"prompt", "position", "token", "text", "probability", "alarm", "lags"}
        assert line["probability"] == pytest.approx(float(probabilities[place]), rel=1e-5) == line["lags"]["4"]
        others = [bank.place(1, lag, target="onset") for lag in (-2, 0, 4)]
        expected = [float(probabilities[other]) for other in others]
        assert list(line["lags"].values()) == pytest.approx(expected, rel=1e-5)
        assert line["alarm"] == (line["probability"] >= 0.5)
    assert len({line["alarm"] for line in found}) == 2
    assert "layer 1, backtracking/onset/lag+04" in err and "x.html" in err
    assert cli.main(["watch", *argv]) == 0  # negative control: what is printed otherwise is no JSON
    with pytest.raises(json.JSONDecodeError):
        lines_of(capsys.readouterr().out)


# --- many prompts ---


def rows_file(tmp_path, rows, name="prompts.jsonl"):
    path = tmp_path / name
    path.write_text("\n".join(map(json.dumps, rows)) if name.endswith("l") else json.dumps(rows))
    return str(path)


@pytest.mark.parametrize("name", ["prompts.jsonl", "prompts.json"])
def test_many_prompts_are_what_each_is_alone(run_folder, capsys, tmp_path, name):
    rows = [
        {"problem": "which box?", "task_id": "a_1"},
        {"prompt": "a stone"},
        {"messages": [{"role": "user", "content": "go"}]},
    ]
    more = ["--max_new_tokens", "8"]
    page = tmp_path / "x.html"
    asked = ["--input", rows_file(tmp_path, rows, name), "--html", str(page)]
    assert cli.main(["watch", str(run_folder), *asked, "--json", *more]) == 0
    found = lines_of(capsys.readouterr().out)
    for number, text in enumerate(("which box?", "a stone", "go"), 1):
        assert cli.main(["watch", str(run_folder), "--prompt", text, "--json", *more]) == 0
        alone = [
            line | {"prompt": number} | ({"id": "a_1"} if number == 1 else {})
            for line in lines_of(capsys.readouterr().out)
        ]
        assert [line for line in found if line["prompt"] == number] == alone and alone
    shown = Text(page.read_text()).text
    assert shown.index("row 1 (a_1)") < shown.index("which box?") < shown.index("row 2") < shown.index("a stone")


def test_a_file_of_one_line_is_json_lines(run_folder, capsys, tmp_path):
    path = rows_file(tmp_path, [{"problem": "which box?"}])
    assert cli.main(["watch", str(run_folder), "--input", path, "--max_new_tokens", "3"]) == 0
    assert "\nrow 1\nwhich box?\n" in capsys.readouterr().out


def test_nothing_finished_is_lost_where_many_prompts_are_interrupted(run_folder, capsys, tmp_path, monkeypatch):
    page, answer = tmp_path / "x.html", conversation.Monitor.answer

    def stopped(self, question):
        return answer(self, question)._replace(stopped=question.number == 2)

    monkeypatch.setattr(conversation.Monitor, "answer", stopped)
    rows = [{"problem": f"box {n}"} for n in (1, 2, 3)]
    argv = ["watch", str(run_folder), "--input", rows_file(tmp_path, rows), "--max_new_tokens", "4"]
    assert cli.main([*argv, "--html", str(page)]) == 130
    shown = Text(page.read_text()).text
    assert "box 1" in shown and "box 2" in shown and "box 3" not in shown
    assert "interrupted" in capsys.readouterr().err


def test_rows_that_nobody_reads_are_not_written(run_folder, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "has_reader", lambda: False)
    path = rows_file(tmp_path, [{"problem": "one"}, {"problem": "two"}])
    argv = ["watch", str(run_folder), "--input", path, "--max_new_tokens", "3", "--json"]
    assert cli.main(argv) == 0 and {line["prompt"] for line in lines_of(capsys.readouterr().out)} == {1}
    assert cli.main([*argv, "--html", str(tmp_path / "x.html")]) == 0  # negative control: the page is wanted
    assert {line["prompt"] for line in lines_of(capsys.readouterr().out)} == {1, 2}


# --- a conversation ---


def test_a_conversation_goes_on_where_the_run_has_turns(chat_folder, capsys, tmp_path, piped):
    page, more = tmp_path / "x.html", ["--max_new_tokens", "6", "--json"]
    piped("which box?\nwhy?\n")
    assert cli.main(["watch", str(chat_folder), *more, "--html", str(page)]) == 0
    out, err = capsys.readouterr()
    first = "".join(line["text"] for line in lines_of(out) if line["prompt"] == 1)
    assert command.NO_TURNS not in err
    said = [
        {"role": "user", "content": "which box?"},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "why?"},
    ]
    assert cli.main(["watch", str(chat_folder), *more, "--input", rows_file(tmp_path, [{"messages": said}])]) == 0
    whole = lines_of(capsys.readouterr().out)
    second = [line | {"prompt": 1} for line in lines_of(out) if line["prompt"] == 2]
    assert second == whole and second
    assert cli.main(["watch", str(chat_folder), *more, "--prompt", "why?"]) == 0
    assert lines_of(capsys.readouterr().out) != whole  # negative control: without what was said before
    assert "turn 1" in Text(page.read_text()).text and "turn 2" in Text(page.read_text()).text


def test_a_conversation_in_a_format_string_says_that_it_has_no_history(run_folder, capsys, piped):
    piped("why?\nwhy?\n\nnever read\n")
    assert cli.main(["watch", str(run_folder), "--max_new_tokens", "6"]) == 0
    out = capsys.readouterr().out
    assert out.count(command.NO_TURNS) == 1 and "never read" not in out
    first, second = out.split("\nturn ")[1:]
    assert first[1:] == second[1:] and first[1:].startswith("\nwhy?\n")


def test_a_turn_that_does_not_fit_is_one_line_and_the_conversation_goes_on(chat_folder, capsys, piped):
    piped("box " * 600 + "\nwhy?\n")
    assert cli.main(["watch", str(chat_folder), "--max_new_tokens", "3", "--json"]) == 0
    out, err = capsys.readouterr()
    assert [line["prompt"] for line in lines_of(out)] == [2, 2, 2]
    (told,) = [line for line in err.splitlines() if line.startswith("streamprobe: ")]
    assert "fewer than the model's 512" in told


# --- what it imports ---

IMPORTS = """
import sys
from streamprobe import cli
{work}
print(*[name for name in {heavy!r} if name in sys.modules], file=sys.stderr)
"""


def imported(work):
    """Which of HEAVY are imported by a process that does this work."""
    script = IMPORTS.format(work=work, heavy=HEAVY)
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return ran.stderr.splitlines()[-1].split()


def test_what_watching_does_not_need_is_not_imported(run_folder, tmp_path):
    path = rows_file(tmp_path, [{"problem": "which box?"}])
    argv = ["watch", str(run_folder), "--input", path, "--max_new_tokens", "3", "--html", str(tmp_path / "x.html")]
    assert imported(f"assert cli.main({argv!r}) == 0") == []
    assert (tmp_path / "x.html").exists()


def test_the_check_of_imports_fails_without_lazy_ones():
    assert "matplotlib" in imported("import streamprobe.reporting.html.page")


# --- what is wrong ---


INPUTS = {
    "torn.jsonl": '{"problem": "a"}\n{"prob',
    "none.json": "[]",
    "odd.jsonl": '{"problem": "a"}\n{"task": "b"}',
    "long.jsonl": json.dumps({"problem": "box " * 600}),
}


def broken_run(kind, run_folder, tmp_path):
    """A copy of the run that lacks something, or a path that is none; some inputs lie in it, too."""
    folder = tmp_path / "run"
    folder.mkdir()
    for name, content in INPUTS.items():
        (folder / name).write_text(content)
    for path in run_folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    if kind == "gone":
        return tmp_path / "gone"
    if kind == "file":
        return folder / "config.yaml"
    if kind.startswith("no "):
        (folder / kind[3:]).unlink()
    if kind == "torn":
        (folder / "probes.safetensors").write_bytes(b"\x00" * 100)
    if kind == "empty":
        (folder / "probes.safetensors").write_bytes(b"")
    if kind == "odd results":
        (folder / "results.csv").write_text("a,b\n1,2\n")
    if kind == "odd config":
        (folder / "config.yaml").write_text("layer: [1\n")
    return folder


OK = ["--prompt", "go"]
CASES = {
    "no folder": ("gone", OK, "gone"),
    "a file": ("file", OK, "no folder"),
    "no probes": ("no probes.safetensors", OK, "without probes.safetensors"),
    "no config": ("no config.yaml", OK, "without config.yaml"),
    "no results": ("no results.csv", OK, "--layer"),
    "torn probes": ("torn", OK, "holds no probes"),
    "empty probes": ("empty", OK, "holds no probes"),
    "results of another kind": ("odd results", OK, "results.csv"),
    "config that is no YAML": ("odd config", OK, "config"),
    "layer": ("", [*OK, "--layer", "3"], "layer 3; expected one of 0 1 2"),
    "lag": ("", [*OK, "--lag", "5"], "lag 5; expected one of -2 0 4"),
    "lag and layer": ("", [*OK, "--lag", "5", "--layer", "7"], "layer 7"),
    "label": ("", [*OK, "--label", "joy"], "label joy; expected one of backtracking"),
    "target": ("", [*OK, "--target", "within"], "target within; expected one of token onset"),
    "solver": ("", [*OK, "--solver", "adam"], "'adam'"),
    "lag that is no number": ("", [*OK, "--lag", "soon"], "'soon'"),
    "empty prompt": ("", ["--prompt", " \n"], "an empty prompt"),
    "no turn": ("", [], "standard input without a turn"),
    "prompt and input": ("", [*OK, "--input", "x.jsonl"], "--input: not allowed with argument --prompt"),
    "input that is gone": ("", ["--input", "x.jsonl"], "x.jsonl, which does not exist"),
    "input of another kind": ("", ["--input", "x.txt"], "data x.txt, which does not exist"),
    "input without a name": ("", ["--input", ""], "streamprobe: data"),
    "input that is a folder": ("", ["--input", "run"], "data run with files of several types"),
    "input that is no JSON": ("", ["--input", "run/torn.jsonl"], "run/torn.jsonl, which cannot be read"),
    "input without rows": ("", ["--input", "run/none.json"], "with no rows"),
    "row without a prompt": ("", ["--input", "run/odd.jsonl"], "row 2 with no prompt"),
    "row that is too long": ("", ["--input", "run/long.jsonl"], "row 1 with a prompt of"),
    "page that is the input": ("", ["--input", "run/odd.jsonl", "--html", "run/../run/odd.jsonl"], "is the input"),
    "long prompt": ("", ["--prompt", "box " * 600], "tokens"),
    "unknown option": ("", [*OK, "--colour", "red"], "--colour"),
    "no tokens": ("", [*OK, "--max_new_tokens", "0"], "max_new_tokens 0"),
    "cold": ("", [*OK, "--temperature", "-1"], "temperature -1"),
    "all but cold": ("", [*OK, "--temperature", "1e-320"], "temperature 1e-320"),
    "temperature that is no number": ("", [*OK, "--temperature", "nan"], "temperature nan"),
    "mass": ("", [*OK, "--top_p", "0"], "top_p 0"),
    "seed": ("", [*OK, "--seed", "-1"], "seed -1"),
    "page in no folder": ("", [*OK, "--html", "gone/x.html"], "gone/x.html"),
    "page that is a folder": ("", [*OK, "--html", "."], "html ."),
    "model that is gone": ("", [*OK, "--model", "./gone"], "./gone"),
    "CUDA where there is none": ("", [*OK, "--device_map", "cuda:7"], "cuda:7"),
}


@pytest.mark.parametrize("kind, argv, told", CASES.values(), ids=CASES.keys())
def test_what_the_user_got_wrong_is_told_in_one_line(run_folder, tmp_path, capsys, monkeypatch, kind, argv, told):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert cli.main(["watch", str(broken_run(kind, run_folder, tmp_path)), *argv]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("streamprobe: ") and "\n" not in error and "; expected " in error and "; fix: " in error
    assert told in error
    assert os.listdir(tmp_path) == ["run"]


def test_probes_of_another_width_are_refused(run_folder, tmp_path, capsys):
    from transformers import LlamaConfig, LlamaForCausalLM

    LlamaForCausalLM(
        LlamaConfig(vocab_size=400, hidden_size=16, intermediate_size=16, num_hidden_layers=4, num_attention_heads=2)
    ).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    assert cli.main(["watch", str(run_folder), *OK, "--model", str(tmp_path)]) == 2
    assert "32 features and a model of hidden size 16" in capsys.readouterr().err
