"""What a user can get wrong: one line that says got, expected, fix; exit status 2; no traceback."""

import json
import os
import shutil
import subprocess
import sys
import threading
from datetime import date
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch
import transformers
import yaml

from streamprobe.cli import train as main
from streamprobe.config.data_keys import DataConfig
from streamprobe.config.load import load_config
from streamprobe.errors import InputError
from streamprobe.run import pipeline
from streamprobe.system.shipped import shipped_configs

ROOT = Path(__file__).parents[2]


@pytest.fixture
def base(tmp_path, model_dir, chains_file, monkeypatch):
    """Keys of a run that would work, and an empty folder to work in."""
    monkeypatch.chdir(tmp_path)
    return {
        "model": str(model_dir),
        "data": str(chains_file),
        "dtype": "float32",
        "layers": [0, 2],
        "lags": [-2, 0, 4],
        "max_passes": 1,
        "bootstrap": 0,
    }


def refused(capsys, *argv):
    """Runs the command line, checks that it refuses in one line with status 2 and writes no run; returns that line."""
    status = main([str(a) for a in argv])
    error = capsys.readouterr().err.strip()
    assert status == 2, error
    assert error.startswith("streamprobe: ") and "\n" not in error and "Traceback" not in error
    assert "; expected " in error and "; fix: " in error
    assert not Path("runs").exists()
    return error


def write(path, keys):
    Path(path).write_text(yaml.safe_dump(keys))
    return path


CASES = {
    "unknown key, near": ({}, ["--layer", "1"], "unknown key 'layer'", "--layers"),
    "unknown key, far": ({}, ["--zzzz", "1"], "unknown key 'zzzz'", "--help"),
    "unknown key in the file": ({"lag": [1]}, [], "unknown key 'lag'", "--lags"),
    "unknown solver": ({}, ["--solvers", "lbfgs"], "lbfgs", "--solvers"),
    "a solver twice": ({"solvers": ["adam", "adam"]}, [], "adam", "each once"),
    "too many resamples": ({}, ["--bootstrap", "1000000000000"], "bootstrap", "at most"),
    "too much patience": ({}, ["--patience", "10000000000000000000000000"], "patience", "less than"),
    "no tolerance": ({}, ["--tolerance", "0"], "tolerance", "more than 0"),
    "word for a number": ({}, ["--lags", "two"], "--lags", "'two'"),
    "word for a layer": ({}, ["--layers", "two"], "layers two", "percentages of the depth"),
    "word for a number in the file": ({"learning_rate": "fast"}, [], "--learning_rate", "'fast'"),
    "keys inside a key": ({"layers": {"a": 1}}, [], "layers", "one value or a list"),
    "unknown choice": ({}, ["--quantization", "2bit"], "2bit", "4bit"),
    "no model": ({"model": None}, [], "no model", "--model"),
    "no data": ({"data": None}, [], "no data", "--data"),
    "layer out of range": ({}, ["--layers", "1", "9"], "layers 9", "0 to 3"),
    "negative layer": ({}, ["--layers", "-1"], "layers -1", "0 to 3"),
    "layer twice": ({}, ["--layers", "1", "1"], "layers [1, 1]", "each once"),
    "no layers": ({"layers": None}, [], "no layers", "--layers"),
    "lag longer than every chain": ({}, ["--lags", "0", "5000"], "lag 5000", "longer than every chain"),
    "lag back before every chain": ({}, ["--lags", "0", "-5000"], "lag -5000", "longer than every chain"),
    "label that never occurs": ({}, ["--labels", "daydreaming"], "'daydreaming'", "backtracking"),
    "unknown target": ({}, ["--targets", "soon"], "soon", "onset"),
    "within that looks back": ({}, ["--targets", "within", "--lags", "-4", "0"], "within", "positive lag"),
    "prompt without the problem": ({}, ["--prompt", "hello"], "'hello'", "{problem}"),
    "chat without a template": ({}, ["--prompt", "chat"], "chat template", "{problem}"),
    "data that does not exist": ({}, ["--data", "gone.json"], "gone.json", "existing file"),
    "data with another digest": ({}, ["--data_sha256", "0" * 64], "SHA-256", "0" * 64),
    "column that does not exist": ({}, ["--problem_column", "question"], "'question'", "'problem'"),
    "model that does not exist": ({}, ["--model", "./gone"], "./gone", "folder"),
    "gguf file that does not exist": ({}, ["--gguf_file", "gone.gguf"], "gone.gguf", "--gguf_file"),
    "too little memory": ({}, ["--memory_gb", "0.000001"], "0.00 MB", "--memory_gb"),
    "memory that is no number": ({}, ["--memory_gb", "much"], "memory_gb much", "auto"),
    "no batch": ({}, ["--batch_size", "0"], "batch_size 0", "more than 0"),
    "no tokens in a batch": ({}, ["--max_batch_tokens", "0"], "max_batch_tokens 0", "at least 1"),
    "share above one": ({}, ["--test_share", "1.5"], "test_share 1.5", "between 0 and 1"),
    "negative seed": ({}, ["--seed", "-1"], "seed -1", "0 .."),
    "huge split seed": ({}, ["--split_seed", str(2**32)], "split_seed", "0 .."),
    "rate that is no number": ({}, ["--learning_rate", "inf"], "learning_rate inf", "finite"),
    "lag beyond all text": ({}, ["--lags", "0", str(10**30)], "lags", "1,000,000"),
    "CUDA where there is none": ({}, ["--device_map", "cuda:7"], "cuda:7", "--device_map"),
    "config file in the middle": ({}, ["--max_passes", "1", "more.yaml"], "more.yaml", "config file first"),
    "data of another kind": ({}, ["--data", "config.yaml"], "config.yaml", ".jsonl"),
    "output_dir that cannot be made": ({}, ["--output_dir", "config.yaml/x"], "cannot be made", "a folder"),
    "too few chains": ({}, ["--max_chains", "2"], "chains", "every split"),
    "unknown control": ({}, ["--controls", "length"], "controls length", "persistence"),
    "a control beside none": ({}, ["--controls", "none", "embed"], "none embed", "none alone"),
    "a control twice": ({}, ["--controls", "embed", "embed"], "embed", "each once"),
    "an empty list": ({"controls": []}, [], "--controls", "at least one"),
    "no seeds": ({}, ["--seeds", "0"], "seeds 0", "more than 0"),
    "too many seeds": ({}, ["--seeds", "100000"], "seeds", "at most"),
    "categories without their split": ({}, ["--test_categories", "alpha"], "split random", "--split category"),
    "split by no category": ({}, ["--split", "category"], "test_categories none", "--test_categories"),
    "category that no chain has": (
        {},
        ["--split", "category", "--test_categories", "omega"],
        "omega",
        "alpha, beta, delta, gamma",
    ),
    "all categories": (
        {},
        ["--split", "category", "--test_categories", "alpha", "beta", "gamma", "delta"],
        "no train chains",
        "split",
    ),
    "category column that does not exist": ({}, ["--category_column", "kind"], "'kind'", "'problem'"),
    "unknown response": ({}, ["--response", "translated"], "translated", "rejoined"),
    "unknown validation": ({}, ["--validation", "train"], "train", "own"),
    "output_dir that is a file": ({}, ["--output_dir", "config.yaml"], "which is a file", "a folder"),
}


@pytest.mark.parametrize("keys, argv, got, told", CASES.values(), ids=CASES.keys())
def test_what_the_user_got_wrong_is_told_in_one_line(base, capsys, keys, argv, got, told):
    merged = {name: value for name, value in (base | keys).items() if value is not None}
    error = refused(capsys, write("config.yaml", merged), *argv)
    assert got in error and told in error


def test_without_a_config_the_demo_runs_in_any_folder(monkeypatch, tmp_path):
    ran = []
    monkeypatch.setattr(pipeline, "run", ran.append)
    for folder in (ROOT, tmp_path):
        monkeypatch.chdir(folder)
        assert main([]) == 0 and ran[-1].name == "demo" and ran[-1].model.model == "streamprobe/demo/model"


def test_a_config_is_a_path_or_else_the_name_of_a_shipped_one(base, capsys):
    shipped = load_config(["demo"])
    assert shipped.name == "demo" and shipped == load_config([str(ROOT / "configs/demo.yaml")])
    assert load_config(["llama-3.1-8b", "--lags", "0"]).probes.layers == [8, 10, 12, 14, 16]
    Path("demo").mkdir()
    assert load_config(["demo"]) == shipped  # a folder is no config
    Path("smollm2-135m").write_text(yaml.safe_dump(base))
    assert load_config(["smollm2-135m"]).model.model == base["model"]  # a file of that name comes first
    for name, near in (("llama-3.1", "llama-3.1-8b"), ("configs/smollm2.yaml", "smollm2-135m"), ("dem", "demo")):
        assert f"give {near}, the nearest name" in refused(capsys, name)
    assert "check the path or the name" in refused(capsys, "zzzz")


def test_config_file_that_does_not_exist_or_is_no_mapping(base, capsys):
    assert "gone.yaml" in refused(capsys, "gone.yaml")
    Path("list.yaml").write_text("- layers\n- lags\n")
    assert "key: value" in refused(capsys, "list.yaml")
    Path("twice.yaml").write_text("model: a\nlayers: [1]\nlayers: [2]\n")
    assert "layers given twice" in refused(capsys, "twice.yaml")
    Path("broken.yaml").write_text("layers: [1, 2\nlags: 3")
    assert "broken.yaml" in refused(capsys, "broken.yaml")


@pytest.mark.parametrize("content", ["[{", "", "[]", "[1, 2]", '{"problem": 1}', "\x00\x01", '{"a": 1}\n{"a":'])
def test_data_that_is_not_a_list_of_chains(base, capsys, content):
    Path("bad.json").write_text(content)
    assert "bad.json" in refused(capsys, write("config.yaml", base), "--data", "bad.json")


def test_annotations_without_a_tag_are_refused_and_counted(base, capsys, chains_file):
    rows = [row | {"annotated_chain": row["reasoning_chain"]} for row in json.loads(chains_file.read_text())]
    Path("plain.json").write_text(json.dumps(rows))
    error = refused(capsys, write("config.yaml", base), "--data", "plain.json")
    assert "no train chains (60 chains refused" in error


def test_data_in_which_every_field_is_wrong_is_refused_and_counted(base, capsys):
    rows = [{"task_id": i, "problem": "p", "reasoning_chain": None, "annotated_chain": "x"} for i in range(20)]
    Path("bad.json").write_text(json.dumps(rows))
    error = refused(capsys, write("config.yaml", base), "--data", "bad.json")
    assert "20 chains refused" in error and "not text" in error


@pytest.mark.parametrize("kind", ["BertConfig", "T5Config"])
def test_a_model_whose_tokens_see_later_ones(base, capsys, kind):
    getattr(transformers, kind)().save_pretrained("other")
    assert "causal decoder" in refused(capsys, write("config.yaml", base), "--model", "./other")


def test_a_model_with_a_smaller_vocabulary_than_its_tokenizer(base, capsys, model_dir):
    shutil.copytree(model_dir, "small")
    config = json.loads(Path("small/config.json").read_text())
    Path("small/config.json").write_text(json.dumps(config | {"vocab_size": 40}))
    assert "vocabulary of 40" in refused(capsys, write("config.yaml", base), "--model", "./small")


def test_a_model_that_cannot_read_long_chains_in_chunks(base, capsys, model_dir):
    """Told before the weights load."""
    shutil.copytree(model_dir, "dynamic", ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads(Path("dynamic/config.json").read_text())
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}
    Path("dynamic/config.json").write_text(json.dumps(config | {"rope_parameters": rope}))
    write("config.yaml", base | {"model": "./dynamic"})
    assert "cannot read them in chunks" in refused(capsys, "config.yaml", "--max_batch_tokens", "64")
    assert "safetensors" in refused(capsys, "config.yaml")  # negative control: no chain is longer than 8192


def test_output_dir_that_holds_a_run_is_not_written_over(base, capsys):
    write("config.yaml", base)
    Path("out").mkdir()
    Path("out/config.yaml").write_text("precious")
    assert "holds a run" in refused(capsys, "config.yaml", "--output_dir", "out")
    assert Path("out/config.yaml").read_text() == "precious"


def test_scores_that_are_no_numbers(base, capsys):
    assert main([str(write("config.yaml", base)), "--solvers", "adam", "--learning_rate", "1e38"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "not numbers" in error and "--learning_rate" in error


def test_memory_that_runs_out_in_the_model(base, capsys, monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("transformers.LlamaModel.forward", full)
    status = main([str(write("config.yaml", base))])
    error = capsys.readouterr().err
    assert status == 2 and error.count("\n") == 1 and "--max_batch_tokens" in error


def test_a_bug_shows_its_traceback(base, monkeypatch):
    """The negative control: what is not the user's mistake is not dressed up as one."""

    def bug(*args, **kwargs):
        raise ValueError("a bug")

    monkeypatch.setattr("streamprobe.run.setup.read_texts", bug)
    with pytest.raises(ValueError, match="a bug"):
        main([str(write("config.yaml", base))])


class Hub(BaseHTTPRequestHandler):
    """A hub that knows one gated model and nothing else."""

    def do_HEAD(self):
        gated = self.path.startswith("/some/gated")
        self.send_response(403 if gated else 404)
        self.send_header("X-Error-Code", "GatedRepo" if gated else "RepoNotFound")
        self.send_header("X-Error-Message", "Access to model some/gated is restricted.")
        self.end_headers()

    do_GET = do_HEAD

    def log_message(self, *args):
        pass


@pytest.mark.parametrize("model, told", [("some/gated", "HF_TOKEN"), ("some/typo", "not on the hub")])
def test_a_gated_or_unknown_model_on_the_hub(base, model, told):
    server = HTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    write("config.yaml", base | {"model": model})
    hub = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(Path.cwd() / "hf")}
    done = subprocess.run(
        [sys.executable, ROOT / "run.py", "config.yaml"],
        env={k: v for k, v in os.environ.items() if k not in ("HF_TOKEN", "HF_HUB_OFFLINE")} | hub,
        capture_output=True,
        text=True,
        timeout=120,
    )
    server.shutdown()
    assert done.returncode == 2, done.stderr
    assert told in done.stderr and model in done.stderr and done.stderr.count("\n") == 1


def test_a_value_in_a_list_of_a_file_never_becomes_a_key(base, capsys):
    for number, labels in enumerate((["backtracking", "--dry_run"], ["backtracking", "-x"])):
        write(f"list{number}.yaml", base | {"labels": labels})
        assert "values that do not begin with -" in refused(capsys, f"list{number}.yaml")
    write("one.yaml", base | {"labels": ["-back"]})
    assert load_config(["one.yaml"]).probes.labels == ["-back"]
    write("lags.yaml", base | {"lags": [-4, 0]})
    assert load_config(["lags.yaml"]).probes.lags == [-4, 0]


def test_a_shipped_config_behind_the_keys_and_an_endless_number_are_refused_in_a_line(capsys):
    assert "demo after the keys; expected the config first" in refused(capsys, "--max_passes", "2", "demo")
    assert load_config(["demo", "--layers", "9" * 5000]).probes.layers == ["9" * 5000]


def test_a_day_that_is_no_text_is_refused():
    with pytest.raises(InputError, match="a day of the form YYYY-MM-DD"):
        DataConfig(chat_date=date(2026, 1, 31))


OF_DATA = {
    "data_sha256": "0" * 64,
    "data_split": "test",
    "data_config": "main",
    "format": "annotated",
    "problem_column": "question",
    "id_column": "name",
    "category_column": "kind",
    "label_names": {"5. back": "backtracking"},
}


@pytest.mark.parametrize("words", [["--data", "mine.jsonl"], ["--data=mine.jsonl"], ["--data", "a", "--data", "b"]])
def test_keys_of_a_configs_data_are_left_out_with_other_data(base, capsys, words):
    write("own.yaml", base | OF_DATA | {"split_seed": 7})
    plain = load_config([write("plain.yaml", base | {"split_seed": 7}), *words])
    assert load_config(["own.yaml", *words]).data == plain.data
    said = "data_sha256, data_split, data_config, problem_column, id_column, category_column, label_names"
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and all(name in out for name in said.split(", ")) and "own.yaml names: " in out
    given = load_config(["own.yaml", *words, "--id_column", "key", "--data_sha256", "1" * 64]).data
    assert (
        given.id_column == "key" and given.data_sha256 == "1" * 64 and given.problem_column == plain.data.problem_column
    )


def test_keys_of_a_configs_data_stay_without_other_data(base, capsys):
    """The negative control: none is given, the same, the same URL with its query, or the file names none."""
    write("own.yaml", base | OF_DATA)
    url = "https://h/x.json"
    write("url.yaml", base | OF_DATA | {"data": url})
    write("none.yaml", {name: value for name, value in (base | OF_DATA).items() if name != "data"})
    for argv in (
        ["own.yaml"],
        ["own.yaml", "--data", base["data"]],
        ["url.yaml", "--data", f"{url}?token=x"],
        ["none.yaml", "--data", "mine.jsonl"],
    ):
        data = load_config(argv).data
        assert (data.id_column, data.data_split, data.names) == ("name", "test", {"5. back": "backtracking"})
    assert load_config(["own.yaml", "--data", "b.json"], same_data=True).data.id_column == "name"
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", [name for name in shipped_configs() if name != "demo"])
def test_shipped_configs_take_own_data(name, capsys):
    assert load_config([name]).data.data_sha256  # negative control
    capsys.readouterr()
    assert load_config([name, "--data", "mine.jsonl"]).data.data_sha256 is None
    assert capsys.readouterr().out == f"data      left out, since of the data that {name}.yaml names: data_sha256\n"


def test_help_says_nothing_of_other_data(base, capsys):
    write("own.yaml", base | OF_DATA)
    with pytest.raises(SystemExit):
        load_config(["own.yaml", "--data", "b.json", "--help"])
    assert "left out" not in capsys.readouterr().out.split("usage")[0]
    assert "left out" not in refused(capsys, "own.yaml", "--data", "gone.json", "--sead", "1")
