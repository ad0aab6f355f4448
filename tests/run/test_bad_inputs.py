"""What the field gave that ended in a traceback, in many lines, or in silence: one line, status 2.  Or it runs."""

import copy
import csv
import io
import json
import logging
import os
import random
import shutil
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from builders import make_rows, make_tokenizer
from safetensors import safe_open
from safetensors.torch import save_file

from streamprobe import cli
from streamprobe.cli import train as main
from streamprobe.config.load import load_config
from streamprobe.data import files
from streamprobe.errors import InputError
from streamprobe.lags import Column
from streamprobe.model.loading import check_device
from streamprobe.probes.storage import load_probes
from streamprobe.reporting import files as report
from streamprobe.run import pipeline
from streamprobe.solvers.newton import NewtonSolver
from streamprobe.system import csv_files as csvfiles
from streamprobe.system import network
from streamprobe.system.console import guard
from streamprobe.tools import generation

ROOT = Path(__file__).parents[2]
KEYS = {"model": "m", "data": "d.json", "layers": [0]}


def one_line(capsys, status, *told):
    """Checks that a command line ended in one line and status 2, with no traceback; returns the line."""
    error = capsys.readouterr().err
    assert status == 2 and error.count("\n") == 1, error
    assert error.startswith("streamprobe: ") and "; expected " in error and "; fix: " in error
    assert "\x1b" not in error
    for text in told:
        assert text in error, error
    return error


def write(text, name="config.yaml"):
    Path(name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return name


@pytest.fixture(autouse=True)
def somewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


# --- the config and the command line ---

CONFIGS = {
    "nested 1,000 deep": ("layers: " + "[" * 1000 + "]" * 1000, "nested too deeply"),
    "a list that holds itself": ("labels: &a [*a]", "labels"),
    "a list under a scalar key": ("seed: [1, 2]", "seed with a list"),
    "a mapping under a scalar key": ("seed: {a: 1}", "seed with keys inside"),
    "null in a list": ("labels: [a, null]", "labels"),
    "a list in a list": ("layers: [[1]]", "layers"),
    "a word for a number": ("max_passes: many", "--max_passes"),
    "a boolean for a number": ("max_passes: yes", "--max_passes"),
    "a number for a boolean": ("bos: 7", "--bos"),
    "no date": ("revision: 2024-99-99", "config.yaml"),
    "no UTF-8": (b"prompt: \xff\xfe{problem}", "config.yaml"),
    "a lone surrogate": ('prompt: "\\ud800{problem}"', "no text"),
    "a control character": ("prompt: \x07{problem}", "config.yaml"),
    "null": ("null", "key: value"),
    "a text": ("hello", "key: value"),
    "a tag": ("model: !!python/object/apply:os.system [ls]", "config.yaml"),
    "a number as a key": ("1: 2", "unknown key '1'"),
}


@pytest.mark.parametrize("content, told", CONFIGS.values(), ids=CONFIGS.keys())
def test_a_config_that_cannot_be_is_told_in_one_line(capsys, content, told):
    base = yaml.safe_dump(KEYS) if isinstance(content, bytes) or ":" in content else ""
    if isinstance(content, str) and content.split(":")[0] in KEYS:
        base = yaml.safe_dump({k: v for k, v in KEYS.items() if k != content.split(":")[0]})
    whole = base.encode() + content if isinstance(content, bytes) else base + content
    one_line(capsys, main([write(whole)]), told)


@pytest.mark.parametrize("path", ["x" * 300 + ".yaml", ".", "a\0b.yaml", "gone/x.yaml"])
def test_a_path_that_is_no_config_is_told_in_one_line(capsys, path):
    one_line(capsys, main([path]), "config")


def test_a_config_without_permission_is_told_in_one_line(capsys, monkeypatch):
    def refuse(self):
        raise PermissionError(13, "Permission denied", str(self))

    write(yaml.safe_dump(KEYS))
    monkeypatch.setattr(Path, "read_bytes", refuse)  # who runs the tests may be allowed to read all
    one_line(capsys, main(["config.yaml"]), "Permission denied")


def test_yaml_leaves_texts_as_they_are_written():
    write(
        "model: 12:30\ndata: no.json\nlayers: 8\nlabels: [no, 1_000, 2024-01-01, '']\nrevision: 0123\nid_column: yes\n"
        "memory_gb: 1e1\nmax_chains: null\nlearning_rate: 1e-3\nbos: off\nsplit: category\ntest_categories: é\n"
    )
    config = load_config(["config.yaml"])
    assert config.model.model == "12:30" and config.probes.layers == [8] and config.model.revision == "0123"
    assert config.probes.labels == ["no", "1_000", "2024-01-01", ""] and config.data.id_column == "yes"
    assert config.training.memory_gb == "1e1" and config.data.max_chains is None and config.data.bos is False
    assert config.training.learning_rate == 1e-3 and config.data.test_categories == ["\u00e9"]
    assert yaml.safe_load("revision: 0123")["revision"] == 83  # negative control: what YAML makes of it


def test_a_config_is_utf_8_whatever_the_locale_says():
    write("\ufeffmodel: m\ndata: d\nlayers: [0]\nlabels: [zur\u00fcck]\n")
    script = "from streamprobe.config.load import load_config; print(ascii(load_config(['config.yaml']).probes.labels))"
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": str(ROOT)}
    ran = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60)
    assert ran.stdout == "['zur\\xfcck']\n", ran.stderr
    wrong = "print(ascii(open('config.yaml', errors='replace').read()))"  # negative control
    ran = subprocess.run([sys.executable, "-c", wrong], env=environment, capture_output=True, text=True, timeout=60)
    assert "zur\\xfcck" not in ran.stdout


@pytest.mark.parametrize("argv", [["--max_passes", "3"], ["--dry_run"], [], ["--seed=1"]])
def test_without_a_config_model_or_data_the_demo_is_meant(monkeypatch, argv):
    ran = []
    monkeypatch.setattr(pipeline, "run", ran.append)
    monkeypatch.chdir(ROOT)
    assert main(argv) == 0 and ran[0].name == "demo" and ran[0].model.model == "streamprobe/demo/model"


@pytest.mark.parametrize("argv", [["--model", "x"], ["--data=x.json"]])
def test_with_a_model_or_data_of_its_own_the_demo_is_not_meant(capsys, monkeypatch, argv):
    monkeypatch.chdir(ROOT)
    one_line(capsys, main(argv))


@pytest.mark.parametrize(
    "argv",
    [
        ["--seed", "1", "x.yaml"],
        ["--dry_run", "x.yaml"],
        ["--resume", "x.yml"],
        ["--labels", "a", "x.yaml"],
        ["--layers", "1", "2", "x.yaml"],
        ["x.yaml", "--seed", "1", "y.yaml"],
    ],
)
def test_the_config_comes_first(capsys, argv):
    one_line(capsys, main(argv), "config file first", f"run.py {argv[-1]}")


def test_a_folder_may_be_named_like_a_config():
    write(yaml.safe_dump(KEYS))
    assert load_config(["config.yaml", "--output_dir", "x.yaml"]).output.output_dir == "x.yaml"


def test_a_word_that_belongs_to_no_key(capsys):
    write(yaml.safe_dump(KEYS))
    one_line(capsys, main(["config.yaml", "--seed", "1", "2"]), "'2', which belongs to no key")


def test_bytes_that_are_no_text_on_the_command_line(capsys, run_folder):
    write(yaml.safe_dump(KEYS))
    one_line(capsys, main(["config.yaml", "--prompt", "\udcff{problem}"]), "prompt", "no text")
    one_line(capsys, cli.main(["watch", str(run_folder), "--prompt", "go \udcff"]), "prompt", "no text")
    write(yaml.safe_dump(KEYS), "l\udcff.yaml")
    one_line(capsys, main(["l\udcff.yaml"]), "--output_dir")
    assert load_config(["l\udcff.yaml", "--output_dir", "out"]).output.output_dir == "out"


def test_a_working_directory_that_is_gone(capsys, tmp_path):
    (tmp_path / "gone").mkdir()
    line = f"cd gone && rmdir ../gone && {sys.executable} {ROOT / 'run.py'}"
    ran = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 2 and ran.stderr.count("\n") == 1 and "working directory" in ran.stderr


# --- values ---


@pytest.mark.parametrize("name", ["meta", "xpu:0", "nonsense", "", "cuda:99", "disk"])
def test_a_device_that_cannot_compute_is_named(name):
    with pytest.raises(InputError, match="device_map"):
        check_device(name)
    for here in ("auto", "cpu", "balanced"):
        check_device(here)  # negative control


def test_what_would_take_minutes_without_a_word_is_refused(capsys):
    write(yaml.safe_dump(KEYS))
    one_line(capsys, main(["config.yaml", "--bootstrap", "1000000"]), "bootstrap 1000000", "at most 10,000")
    with pytest.raises(InputError, match="compiled for minutes"):
        check_device("cpu", "flex_attention")
    check_device("cpu", "sdpa")


KINDS, EACH = 10, 3000  # kinds of tokens, and tokens of each, of which these are positive
POSITIVE = np.arange(3, 3 + KINDS)


def repeated_features():
    """Features of few kinds of tokens, many more than there are kinds, with a padding of zeros, for a rare label."""
    random = np.random.default_rng(0)
    table = random.standard_normal((KINDS, 300)).astype(np.float32)
    table[:, 270:] = 0
    kinds = np.repeat(np.arange(KINDS), EACH)
    positive = np.concatenate([np.arange(EACH) < n for n in POSITIVE])
    order = random.permutation(len(kinds))
    return table, torch.from_numpy(table[kinds[order]])[:, None], torch.from_numpy(positive[order])[:, None]


def newton(acts, targets, passes):
    positive_weight = (~targets).sum(0) / targets.sum(0)
    about = (["embed"], [Column("a", "token", 0)], acts.shape[2], positive_weight)
    solver = NewtonSolver(*about, n_tokens=len(acts), l2=0.0, tolerance=1e-4)
    for _ in range(passes):
        for some, true in zip(acts.split(4000), targets.split(4000), strict=True):
            solver.step(some, true, torch.ones_like(true))
        solver.end_pass()
    return solver


def test_without_a_penalty_features_that_say_the_same_have_the_one_best_set_of_logits():
    """A probe that can give each kind its own logit gives it the logarithm of its weighted odds; the padding is no harm."""
    table, acts, targets = repeated_features()
    solver = newton(acts, targets, 30)
    logits = solver.bank().scores(torch.from_numpy(table)[:, None])[:, 0, 0].numpy()
    weight = (KINDS * EACH - POSITIVE.sum()) / POSITIVE.sum()
    np.testing.assert_allclose(logits, np.log(weight * POSITIVE / (EACH - POSITIVE)), atol=0.01)


# --- data ---

ROW = {"task_id": "a_1", "problem": "p", "reasoning_chain": "r", "annotated_chain": "r"}


def refused(data, *told):
    with pytest.raises(InputError) as caught:
        files.read_rows(data, split="train")
    text = str(caught.value)
    assert "\n" not in text and all(part in text for part in told), text
    return text


def test_without_a_network_the_hub_is_given_up_within_five_seconds():
    """A hub to which no one answers: once refused, once silent.  In a process of its own, for settings are read at import."""
    silent = socket.socket()
    silent.bind(("127.0.0.1", 0))
    silent.listen(1)
    script = """
import time, sys
from streamprobe.system import network
import huggingface_hub
began = time.perf_counter()
network.look_for_hub("some/model")
print(time.perf_counter() - began, huggingface_hub.is_offline_mode())
"""
    for port in (9, silent.getsockname()[1]):
        environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and "proxy" not in k.lower()}
        environment |= {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "PYTHONPATH": str(ROOT)}
        ran = subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60
        )
        seconds, offline = ran.stdout.split()
        assert float(seconds) < 5 and offline == "True" and not ran.stderr, ran.stderr


def test_a_hub_id_without_a_network_is_one_line():
    write(yaml.safe_dump(KEYS | {"model": "some/model"}))
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    environment |= {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(Path.cwd() / "hf")}
    began = time.perf_counter()
    ran = subprocess.run(
        [sys.executable, ROOT / "run.py", "config.yaml"], env=environment, capture_output=True, text=True, timeout=120
    )
    assert (
        time.perf_counter() - began < 20
    )  # libraries of a busy machine take their time; the hub's own tries take 23 s
    assert ran.returncode == 2 and ran.stderr.count("\n") == 1 and "some/model" in ran.stderr, ran.stderr


def test_a_hub_that_is_silent_forbids_no_other_server(monkeypatch):
    import datasets

    Path("chains.json").write_text(json.dumps([ROW]))
    server = HTTPServer(("127.0.0.1", 0), Quiet)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/chains.json"
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    refused(url, "Offline")  # negative control: whoever asks for it himself gets it
    monkeypatch.setattr(files, "hub_is_given_up", lambda: True)
    assert files.read_rows(url, split="train") == [ROW]
    server.shutdown()


class Quiet(SimpleHTTPRequestHandler):
    """Serves the working directory."""

    def log_message(self, *args):
        pass


def test_what_is_here_is_not_looked_for_on_the_hub(monkeypatch):
    from huggingface_hub import constants

    asked = []
    monkeypatch.setattr(network, "_answers", lambda: bool(asked.append(1)) or True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    Path("some").mkdir()
    Path("some/model").mkdir()
    for name in ("some/model", "./gone", "/a/b", "a/b/c", "x" * 5000 + "/"):
        network.look_for_hub(name)
    assert not asked
    network.look_for_hub("some/other")
    assert asked and not constants.HF_HUB_OFFLINE  # negative control


# --- CSV ---


@pytest.mark.parametrize(
    "text", ["=1+1", "+a", "-b", "@x", "\tx", "\rx", "'=x", "''@", "'plain", "plain", "", "1-2", " =x"]
)
def test_a_cell_that_looks_like_a_formula_is_quoted_and_comes_back(text):
    written = csvfiles.cell(text)
    assert written[:1] not in tuple("=+-@\t\r") and csvfiles.text_of(written) == text
    assert csvfiles.cell(-0.25) == "-0.25" and csvfiles.cell(-3) == -3  # numbers stay numbers
    if text[:1] in ("=", "+", "-", "@", "\t", "\r"):
        assert written != text  # negative control: the raw text would be a formula


def test_labels_like_formulas_go_through_results_and_back(run_folder, tmp_path):
    folder = shutil.copytree(run_folder, tmp_path / "run")
    rows = csvfiles.read_csv(folder / "results.csv", report.FIELDS)
    evil = [row | {"label": "=cmd|' /C calc'!A0"} for row in rows]
    (folder / "results.csv").write_bytes(report.pack_rows(evil, report.FIELDS))
    raw = list(csv.DictReader(io.StringIO((folder / "results.csv").read_text())))
    assert raw[0]["label"].startswith("'=") and float(raw[0]["auroc"]) == 0.6
    assert csvfiles.read_csv(folder / "results.csv", report.FIELDS)[0]["label"] == evil[0]["label"]


# --- folders of runs that are broken, or made to break ---

ODD = [
    None,
    True,
    -1,
    10**400,
    1e308,
    float("inf"),
    float("nan"),
    "x" * 3000,
    "",
    [],
    {},
    [[]],
    [None],
    {"a": 1},
    "\ud800",
    "<script>\x1b[2J",
    "9" * 5000,
    0.5,
]
CELLS = [
    "",
    "x",
    "inf",
    "nan",
    "1e308",
    "-1",
    "9" * 5000,
    "y" * 200_000,
    "\x1b[2J",
    "=1+1",
    "1.5",
    "\x00",
    "a\nb",
    "1e18",
]


def places(x, path=()):
    """Every place in parsed JSON, of lists the first two."""
    yield path
    for name in x if isinstance(x, dict) else range(min(2, len(x))) if isinstance(x, list) else ():
        yield from places(x[name], (*path, name))


def changed(x, path, value):
    """A copy with another value there, or without what is there where the value is `...`."""
    if not path:
        return value
    whole = at = copy.deepcopy(x)
    for name in path[:-1]:
        at = at[name]
    if value is ...:
        del at[path[-1]]
    else:
        at[path[-1]] = value
    return whole


def sane(capsys, run, argv):
    """Runs a command line; it must end in status 0, or in 2 and one line, and print nothing that commands a terminal."""
    status = run(argv)
    said = capsys.readouterr()
    assert status in (0, 2) and said.err.count("\n") == (status == 2), (argv, said.err)
    assert "\x1b" not in said.out + said.err
    return status


@pytest.fixture(scope="module")
def finished(tmp_path_factory, model_dir, chains_file):
    """The folder of a small run, with every file that a run writes."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    keys = {
        "model": model_dir,
        "data": str(chains_file),
        "dtype": "float32",
        "layers": [1],
        "lags": [0, 4],
        "controls": ["position"],
        "max_passes": 1,
        "bootstrap": 5,
        "output_dir": str(folder),
    }
    path = tmp_path_factory.mktemp("config") / "config.yaml"
    path.write_text(yaml.safe_dump(keys))
    assert main([str(path)]) == 0
    return folder


@pytest.fixture
def folder(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


class Silent:
    """A hub that takes all."""

    endpoint = "http://hub"

    def create_repo(self, *args, **options):
        pass

    create_commit = create_repo


@pytest.fixture
def mains(folder, monkeypatch):
    """The command lines that read a run, without loading its model: what is read of the folder comes before."""
    monkeypatch.setattr("huggingface_hub.HfApi", Silent)

    def stop(*args):
        raise InputError("the model", "not asked for here", "none")

    monkeypatch.setattr("streamprobe.run.opened.load_whole", stop)
    return {
        "report": (cli.main, ["report", str(folder)]),
        "hub": (cli.main, ["push", str(folder), "a/b"]),
        "monitor": (cli.main, ["watch", str(folder), "--prompt", "go"]),
    }


def test_the_run_itself_can_be_read(capsys, mains):
    """Negative control: what the next tests break is whole."""
    assert [sane(capsys, *mains[name]) for name in ("report", "hub", "monitor")] == [0, 0, 2]
    assert cli.main(mains["monitor"][1]) == 2 and "the model" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["summary.json", "transcripts.json"])
def test_any_change_to_a_json_file_is_read_or_told(capsys, folder, mains, name):
    whole = json.loads((folder / name).read_text())
    cases = [(path, value) for path in places(whole) for value in (*ODD, ...) if path or value is not ...]
    for path, value in random.Random(0).sample(cases, 8):
        (folder / name).write_text(json.dumps(changed(whole, path, value)))
        sane(capsys, *mains["report"])
    for path, value in ((("run", "config"), []), (("run", "preflight"), 5), (("run", "config"), None)):
        if name == "summary.json":
            (folder / name).write_text(json.dumps(changed(whole, path, value)))
            assert sane(capsys, *mains["report"]) == 2
    (folder / name).write_text("[" * 100_000)
    assert sane(capsys, *mains["report"]) == 2


def test_any_change_to_the_results_is_read_or_told(capsys, folder, mains):
    rows = list(csv.reader(io.StringIO((folder / "results.csv").read_text())))
    cases = [(i, j, cell) for i in (0, 1, 2) for j in range(len(rows[0])) for cell in CELLS]
    for i, j, cell in random.Random(0).sample(cases, 60):
        text = io.StringIO()
        csv.writer(text).writerows(changed(rows, (i, j), cell))
        (folder / "results.csv").write_bytes(text.getvalue().encode())
        for name in ("hub", "monitor") if i else mains:
            sane(capsys, *mains[name])
    whole = (folder / "results.csv").read_text()
    count = rows[0].index("n_tokens")
    for content in ("", "\0" * 9, "a,b\n1,2\n", whole + "1,2\n", whole.replace("\n", ",more\n", 2)):
        (folder / "results.csv").write_text(content)
        assert {sane(capsys, *mains[name]) for name in mains} == {2}
    text = io.StringIO()
    csv.writer(text).writerows(changed(rows, (1, count), "inf"))
    (folder / "results.csv").write_text(text.getvalue())
    assert sane(capsys, *mains["report"]) == 2


def save(folder, about, tensors):
    save_file(tensors, folder / "probes.safetensors", {"streamprobe": json.dumps(about)})


def test_any_change_to_the_probes_is_read_or_told(capsys, folder, mains):
    with safe_open(folder / "probes.safetensors", "pt") as f:
        about, tensors = json.loads(f.metadata()["streamprobe"]), {name: f.get_tensor(name) for name in f.keys()}
    cases = [(path, value) for path in places(about) for value in (*ODD, ...) if path or value is not ...]
    for path, value in random.Random(0).sample(cases, 100):
        save(folder, changed(about, path, value), tensors)
        for name in ("hub", "monitor"):
            sane(capsys, *mains[name])
    whole, odd = about["columns"], [float("inf"), "x"]
    for columns in ([[*whole[0], "", 0, 1, 2]], [[*column[:3], "permuted", 0] for column in whole], [odd], [[]]):
        save(folder, about | {"columns": columns}, tensors)
        assert {sane(capsys, *mains[name]) for name in ("hub", "monitor")} == {2}
    save(folder, about | {"layers": [float("inf")]}, tensors)
    assert {sane(capsys, *mains[name]) for name in ("hub", "monitor")} == {2}
    for config in ("text", 5):
        save(folder, about | {"config": config}, tensors)
        assert sane(capsys, *mains["hub"]) == 2
    for name, tensor in tensors.items():
        for kind in (torch.bool, torch.int64, torch.complex64):
            save(folder, about, tensors | {name: tensor.to(kind)})
            assert sane(capsys, *mains["monitor"]) == 2
        save(folder, about, tensors | {name: tensor.half()})
        assert load_probes(folder).scores(torch.zeros(1, 1, 32)).dtype == torch.float32


def test_any_change_to_a_runs_config_is_read_or_told(capsys, folder, mains):
    keys = yaml.safe_load((folder / "config.yaml").read_text())
    cases = [(name, value) for name in keys for value in ODD]
    for name, value in random.Random(0).sample(cases, 60):
        (folder / "config.yaml").write_text(yaml.safe_dump({**keys, name: value}))
        sane(capsys, *mains["monitor"])
    for content in ("null", "text", "[1]", "[" * 5000, "&a [*a]"):
        (folder / "config.yaml").write_text(content)
        assert sane(capsys, *mains["monitor"]) == 2


@pytest.mark.parametrize("name", ["n" * 300, "a\0b", "no such folder"])
def test_a_folder_that_cannot_be_is_told_by_every_command(capsys, name):
    for argv in (["report", name], ["push", name, "a/b"], ["watch", name, "--prompt", "x"], ["steer", name]):
        assert sane(capsys, cli.main, argv) == 2


def test_a_prompt_over_the_context_has_no_warning_before_its_line(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    tokenizer = make_tokenizer()
    tokenizer.model_max_length = 8
    assert len(generation.encode("box " * 100, "{problem}", tokenizer, True)) > 8 and not caplog.records
    tokenizer("box " * 100)
    assert "longer than" in caplog.text  # negative control


def test_a_download_that_breaks_off_is_reported(tmp_path, monkeypatch, capsys):
    """A server that promises more than it sends; whole, the same data are read (negative control)."""
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    whole = json.dumps(make_rows(3)).encode()

    class Handler(BaseHTTPRequestHandler):
        sent = 3

        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(whole)))
            self.end_headers()
            self.wfile.write(whole[: self.sent])

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/chains.json"
        assert guard(lambda: files.read_rows(url, split="train")) == 2
        told = capsys.readouterr().err
        assert told.count("\n") == 1 and "a URL that can be downloaded" in told
        Handler.sent = len(whole)
        assert len(files.read_rows(url, split="train")) == 3
        server.shutdown()


PROBES = {
    "numbers that are none": ({}, {"newton.weight": torch.full((3, 6, 32), torch.nan)}),
    "layers twice": ({"layers": [0, 0, 2]}, {}),
    "layers that are yes or no": ({"layers": [True, False, 2]}, {}),
    "half layers": ({"layers": [0.5, 1.0, 2]}, {}),
    "lags as text": ({"columns": [["backtracking", "token", "0"]] * 6}, {}),
    "a label that is a list": ({"columns": [[["a"], "token", 0]] * 6}, {}),
}


@pytest.mark.parametrize("name", PROBES)
def test_probes_of_wrong_types_and_numbers_are_refused(run_folder, tmp_path, name):
    path, (about, tensors) = tmp_path / "probes.safetensors", PROBES[name]
    with safe_open(run_folder / "probes.safetensors", framework="pt") as f:
        held = {key: f.get_tensor(key) for key in f.keys()}
        said = json.loads(f.metadata()["streamprobe"])
    save_file(held, path, {"streamprobe": json.dumps(said)})
    assert load_probes(path).layers == [0, 1, 2]  # negative control
    save_file(held | tensors, path, {"streamprobe": json.dumps(said | about)})
    with pytest.raises(InputError, match="which holds no probes"):
        load_probes(path)


def test_a_config_of_too_many_blocks_is_refused_before_they_are_built(model_dir):
    from streamprobe.model.blocks import check_layers
    from streamprobe.model.loading import read_config

    config = read_config(model_dir)
    check_layers(config, [0])  # negative control
    config.num_hidden_layers = 10_000_000
    with pytest.raises(InputError, match="10000000 as the number of its decoder blocks"):
        check_layers(config, [0])


def test_a_token_in_a_text_that_is_written_down_is_refused():
    secret, demo = "hf_" + "a" * 30, str(Path(__file__).parents[2] / "configs" / "demo.yaml")
    with pytest.raises(InputError, match="prompt with what looks like an access token") as error:
        load_config([demo, "--prompt", f"{secret} {{problem}}"])
    assert secret not in str(error.value)
    assert load_config([demo, "--prompt", "hf_a {problem}"]).data.prompt == "hf_a {problem}"  # neg. control
