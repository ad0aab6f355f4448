"""Probes in a library: from a run's folder, from the hub, and what a stranger's file may not do.  The hub is a stub."""

import base64
import csv
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

import streamprobe
from streamprobe import cli
from streamprobe.errors import InputError
from streamprobe.lags import Column, make_columns
from streamprobe.probes.linear import ProbeBank
from streamprobe.probes.sites import layer_sites
from streamprobe.probes.storage import load_probes
from streamprobe.tools import hub

ROOT = Path(__file__).parents[2]


# --- a bank in a library ---


def test_importing_the_package_imports_no_library():
    script = """
import sys, streamprobe
heavy = {"torch", "transformers", "huggingface_hub", "numpy"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
try:
    streamprobe.nothing
except AttributeError as error:
    assert "nothing" in str(error)
from streamprobe import load_probes
assert "torch" in sys.modules and "transformers" not in sys.modules
assert load_probes is streamprobe.probes.storage.load_probes
"""
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)
    for name in streamprobe.__all__:
        assert callable(getattr(streamprobe, name))


def test_a_folder_gives_its_probes(run_folder, bank):
    probes = streamprobe.load_probes(str(run_folder))
    assert (probes.layers, probes.columns, probes.solver) == (bank.layers, bank.columns, "newton")
    assert torch.equal(probes.threshold, bank.threshold) and torch.equal(probes.weight, bank.weight)
    acts = torch.randn(5, 3, 32)
    place = probes.place(layer=1, lag=4, target="onset")
    by_hand = acts[:, 1].double() @ probes.weight[place].double() + probes.bias[place].double()
    torch.testing.assert_close(probes.scores(acts)[:, place[0], place[1]].double(), by_hand, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(probes.probabilities(acts)[:, place[0], place[1]].double(), 1 / (1 + (-by_hand).exp()))
    for copy in (probes.clone(), probes.to("cpu")):
        assert torch.equal(copy.threshold, probes.threshold) and copy.solver == "newton"
    assert probes.clone().threshold.data_ptr() != probes.threshold.data_ptr()


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("target", ["token", "onset"])
@pytest.mark.parametrize("lag", [-2, 0, 4])
def test_a_probe_is_found_by_what_it_predicts(bank, layer, target, lag):
    i, k = bank.place(layer, lag, "backtracking", target)
    assert bank.layers[i] == layer and bank.columns[k] == Column("backtracking", target, lag)


def test_the_place_of_a_label_is_its_own():
    columns = make_columns(["a", "b"], ["token", "within"], [0, 4])
    bank = ProbeBank(layer_sites([5]), columns, torch.zeros(1, len(columns), 2), torch.zeros(1, len(columns)))
    found = {(c.label, c.target, c.lag): bank.place(5, c.lag, c.label, c.target) for c in columns}
    assert sorted(found.values()) == [(0, k) for k in range(len(columns))]
    assert bank.place(5, 4) == found["a", "token", 4] and bank.place(5, 4, "b") == found["b", "token", 4]
    with pytest.raises(InputError, match="lag 0; expected one of 4"):
        bank.place(5, 0, "a", "within")  # it only looks ahead
    for wrong, told in (
        ((6, 0), "layer 6"),
        ((5, 1), "lag 1"),
        ((5, 0, "c"), "label c"),
        ((5, 0, "a", "onset"), "onset"),
    ):
        with pytest.raises(InputError, match=told):
            bank.place(*wrong)


def test_controls_are_not_taken_for_probes():
    class Wide(Column):
        control = "permuted"

    columns = [Wide("a", "token", 0), Column("a", "token", 0)]
    assert ProbeBank(layer_sites([5]), columns, torch.zeros(1, 2, 2), torch.zeros(1, 2)).place(5, 0) == (0, 1)


def odd_file(path: Path, kind: str) -> Path:
    about = {"solvers": ["newton"], "layers": [0, 1], "columns": [["a", "token", 0]]}
    tensors = {f"newton.{part}": torch.zeros(2, 1) for part in ("bias", "threshold")} | {
        "newton.weight": torch.zeros(2, 1, 4)
    }
    if kind == "shapes":
        tensors["newton.weight"] = torch.zeros(2, 2, 4)
    if kind == "missing":
        del tensors["newton.bias"]
    if kind == "empty":
        about["columns"] = []
    metadata = {
        "no metadata": None,
        "other metadata": {"format": "pt"},
        "no JSON": {"streamprobe": "{"},
        "a list": {"streamprobe": "[1]"},
    }.get(kind, {"streamprobe": json.dumps(about)})
    save_file(tensors, path, metadata)
    if kind == "pickle":
        torch.save(tensors, path)
    if kind == "text":
        path.write_text("probes")
    return path


KINDS = ["shapes", "missing", "empty", "no metadata", "other metadata", "no JSON", "a list", "pickle", "text"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_holds_no_probes_is_told(tmp_path, kind):
    with pytest.raises(InputError, match="holds no probes"):
        load_probes(odd_file(tmp_path / "probes.safetensors", kind))
    assert load_probes(odd_file(tmp_path / "good.safetensors", "good")).layers == [0, 1]  # negative control


@pytest.mark.parametrize("name", ["gone", "./gone/there", "/gone/there", "a/b/c", "user/", "../x/y", "~/x"])
def test_what_is_no_name_on_the_hub_is_not_looked_for_there(name, monkeypatch):
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(InputError, match="does not exist"):
        load_probes(name)


# --- the hub ---


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as it takes to make a repository, commit small files to it and read them back."""

    files: dict[str, dict[str, bytes]] = {}
    created: list[dict] = []

    def answer(self, status, content=b"", **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def do_POST(self):
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Authorization") != "Bearer good":
            return self.answer(401, b'{"error": "Invalid credentials"}')
        if self.path == "/api/repos/create":
            Hub.created.append(asked := json.loads(body))
            name = f"{asked['organization']}/{asked['name']}"
            Hub.files.setdefault(name, {})
            return self.answer(
                200, json.dumps({"url": f"http://{self.headers['Host']}/{name}", "name": name, "id": name}).encode()
            )
        if self.path == "/api/validate-yaml":
            return self.answer(200, b'{"errors": [], "warnings": []}')
        if found := re.fullmatch(r"/api/models/(\w+/\w+)/preupload/main", self.path):
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            return self.answer(200, json.dumps({"files": files}).encode())
        if found := re.fullmatch(r"/api/models/(\w+/\w+)/commit/main", self.path):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    Hub.files[found[1]][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return self.answer(
                200,
                json.dumps(
                    {
                        "commitUrl": f"http://{self.headers['Host']}/{found[1]}/commit/a",
                        "commitOid": "a" * 40,
                        "success": True,
                    }
                ).encode(),
            )
        return self.answer(404)

    def do_GET(self):
        found = re.fullmatch(r"/(\w+/\w+)/resolve/main/(.+)", self.path)
        if not found or found[1] not in Hub.files:
            return self.answer(404, X_Error_Code="RepoNotFound")
        content = Hub.files[found[1]].get(found[2])
        if content is None:
            return self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit="a" * 40)
        return self.answer(200, content, ETag=f'"{hashlib.sha1(content).hexdigest()}"', X_Repo_Commit="a" * 40)

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def endpoint():
    server = HTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def with_hub(endpoint, folder, *command, token="good"):
    """Runs Python with the stub as its hub; the address is read when huggingface_hub is imported."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(folder / "hf"), "HF_TOKEN": token}
    environment |= {"PYTHONPATH": str(ROOT), "HF_HUB_DISABLE_XET": "1"}
    return subprocess.run(
        [sys.executable, *command], env=environment, cwd=folder, capture_output=True, text=True, timeout=120
    )


READ = """
import sys, torch
from streamprobe import load_probes
from streamprobe.errors import InputError
probes = load_probes("someone/probes")
here = load_probes(sys.argv[1])
assert (probes.layers, probes.columns, probes.solver) == (here.layers, here.columns, here.solver)
for name in ("weight", "bias", "threshold"):
    assert torch.equal(getattr(probes, name), getattr(here, name))
for name in ("someone/gone", "someone/empty"):
    try:
        load_probes(name)
    except InputError as error:
        print(error)
"""


def test_probes_go_to_the_hub_and_come_back_bit_for_bit(run_folder, endpoint, tmp_path):
    done = with_hub(endpoint, tmp_path, "-m", "streamprobe", "push", str(run_folder), "someone/probes", "--private")
    assert done.returncode == 0 and f"{endpoint}/someone/probes" in done.stdout, done.stderr
    files = Hub.files["someone/probes"]
    assert set(files) == {"probes.safetensors", "results.csv", "README.md"}
    assert files["probes.safetensors"] == (run_folder / "probes.safetensors").read_bytes()
    assert "private" in json.dumps(Hub.created[-1])
    Hub.files["someone/empty"] = {}
    read = with_hub(endpoint, tmp_path, "-c", READ, str(run_folder))
    assert read.returncode == 0, read.stderr
    lines = read.stdout.splitlines()
    assert len(lines) == 2 and all("not found on the hub" in line for line in lines)
    assert "someone/gone" in lines[0] and "someone/empty" in lines[1]


def test_coming_back_bit_for_bit_fails_without_the_same_probes(run_folder, endpoint, tmp_path, bank):
    other = tmp_path / "other"
    other.mkdir()
    save = {f"newton.{part}": getattr(bank, part).clone() + 1 for part in ("weight", "bias", "threshold")}
    about = {"solvers": ["newton"], "layers": bank.layers, "columns": [c.saved for c in bank.columns]}
    save_file(save, other / "probes.safetensors", {"streamprobe": json.dumps(about)})
    Hub.files["someone/probes"] = {"probes.safetensors": (other / "probes.safetensors").read_bytes()}
    done = with_hub(endpoint, tmp_path, "-c", READ, str(run_folder))
    assert done.returncode == 1 and "AssertionError" in done.stderr


def test_what_the_hub_refuses_is_told_in_one_line(run_folder, endpoint, tmp_path):
    argv = ["-m", "streamprobe", "push", str(run_folder), "someone/probes"]
    done = with_hub(endpoint, tmp_path, *argv, token="bad")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "hf auth login" in done.stderr, done.stderr
    assert done.stderr.startswith("streamprobe: ") and "; expected " in done.stderr


def test_a_name_that_is_none_is_told(run_folder, capsys):
    assert cli.main(["push", str(run_folder), "some..one/x"]) == 2
    error = capsys.readouterr().err
    assert "some..one/x" in error and error.count("\n") == 1


def test_a_hub_that_cannot_be_reached_is_told(run_folder, tmp_path):
    nowhere = "http://127.0.0.1:9"
    done = with_hub(nowhere, tmp_path, "-m", "streamprobe", "push", str(run_folder), "someone/probes")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "a connection" in done.stderr, done.stderr


@pytest.mark.parametrize(
    "argv", [[], ["gone", "a/b"], [".", "a/b"], [".", "a/b", "--public"], [".", "name"], [".", ""]]
)
def test_bad_command_lines(tmp_path, monkeypatch, capsys, argv):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["push", *argv]) == 2
    error = capsys.readouterr().err
    assert error.startswith("streamprobe: ") and error.count("\n") == 1 and "; fix: " in error


def test_the_card_tells_the_results(run_folder, bank):
    rows = list(csv.DictReader((run_folder / "results.csv").open()))
    about = {
        "solvers": ["newton"],
        "layers": [0, 1, 2],
        "columns": [list(c) for c in bank.columns],
        "config": {"model": "org/model"},
    }
    card = hub.make_card(about, rows, "someone/probes")
    head, text = card.removeprefix("---\n").split("---\n", 1)
    assert yaml.safe_load(head)["base_model"] == "org/model" and 'load_probes("someone/probes")' in text
    tables = re.findall(r"### (.*)\n\n\| \| -2 \| \+0 \| \+4 \|\n\|---\|---\|---\|---\|\n((?:\|.*\n)+)", text)
    assert [title for title, _ in tables] == [f"backtracking, target {t}, solver newton" for t in ("token", "onset")]
    assert tables[0][1].splitlines()[1] == "| layer01 " + "| 0.900 (0.500&ndash;1.000) " * 3 + "|"
    here = hub.make_card({**about, "config": {"model": str(run_folder)}}, rows, "someone/probes")
    assert str(run_folder) not in here and "base_model" not in here  # a path says nothing to others


def test_text_from_data_stays_text_in_the_card(run_folder):
    evil = "|<script>[x](http://y)\n# `a`*"
    row = {
        "kind": "linear",
        "site": "resid_post",
        "solver": "newton",
        "label": evil,
        "target": "token",
        "control": "",
        "layer": "0",
        "lag": "0",
    }
    row |= {"auroc": "0.5", "auroc_low": "nan", "auroc_high": "nan"}
    card = hub.make_card({"solvers": ["newton"], "layers": [0], "columns": [[evil, "token", 0]]}, [row], "a/b")
    assert "<script>" not in card and "[x]" not in card and "| layer00 | 0.500 |" in card and "\n# `a`" not in card
    with pytest.raises(InputError, match="results.csv"):
        hub.make_card({"solvers": ["n"], "layers": [0], "columns": [["a", "token", 0]]}, [{"auroc": "high"}], "a/b")
