"""What a run must not give away: users and queries of URLs, tokens, paths of the machine; and what it must not run."""

import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import yaml
from safetensors import safe_open
from safetensors.torch import save_file

from streamprobe import cli
from streamprobe.cli import train as main
from streamprobe.data.files import read_rows
from streamprobe.errors import InputError
from streamprobe.probes.storage import load_probes
from streamprobe.reporting.html import document
from streamprobe.system.privacy import clean_url, for_others, without_secrets
from streamprobe.tools import marked_text

TOKEN = "hf_" + "Ab1" * 10
URL = f"https://someone:pass@host.org:8080/a/b.json?sig=topsecret&x={TOKEN}#frag"


@pytest.mark.parametrize(
    "text, shown",
    [
        (URL, "https://host.org:8080/a/b.json"),
        ("https://host/a.json", "https://host/a.json"),
        ("s3://key:secret@bucket/a.parquet", "s3://bucket/a.parquet"),
        ("zip://a.json::https://u:p@h/b.zip?k=1", "zip://a.json::https://h/b.zip"),
        ("http://u:p@[bad/x.json?k=v", "http://[bad/x.json"),
        ("https://user@h/x@y.json?a@b", "https://h/x@y.json"),
        ("wait: what?.json", "wait: what?.json"),
        ("user/name", "user/name"),
        (f"https://h/{TOKEN}/x.json", "https://h/***/x.json"),
    ],
)
def test_a_url_is_written_without_what_may_be_secret(text, shown):
    assert clean_url(text) == shown


def test_others_see_names_and_not_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = {
        "model": str(Path.home() / "models/llama"),
        "data": URL,
        "gguf_file": "/x/y.gguf",
        "output_dir": "..\\runs\\a",
        "prompt": f"Authorization: Bearer abc.def.0123456789 {Path.home()}/x {{problem}}",
        "labels": [TOKEN, "a"],
        "seed": 3,
        "revision": None,
    }
    own, shown = without_secrets(config), for_others(config)
    assert (
        own["model"] == config["model"]
        and own["labels"] == ["***", "a"]
        and own["data"] == "https://host.org:8080/a/b.json"
    )
    assert (shown["model"], shown["gguf_file"], shown["output_dir"]) == ("llama", "y.gguf", "a")
    assert shown["prompt"] == "Authorization: *** ~/x {problem}" and shown["seed"] == 3 and shown["revision"] is None
    assert for_others({"model": "user/name", "data": "user/set"}) == {"model": "user/name", "data": "user/set"}
    (tmp_path / "user/name").mkdir(parents=True)
    assert for_others({"model": "user/name"}) == {"model": "name"}  # a folder of that name is meant
    assert for_others({"data": "file:///home/me/x.json"}) == {"data": "x.json"}
    assert for_others(shown) == shown and without_secrets(own) == own  # so that a resumed run compares like with like


@pytest.mark.parametrize(
    "text",
    ["Basic arithmetic: {problem}", "Bearer of news: {problem}", "hf_transfer_learning", "task-one", "ghost_writer"],
)
def test_words_are_no_tokens(text):
    """A run's config is read again: by the monitor, and by who runs it anew."""
    assert without_secrets({"prompt": text, "labels": [text]}) == {"prompt": text, "labels": [text]}


@pytest.fixture
def served(chains_file):
    """A server that gives the chains to who knows the query."""

    class Server(BaseHTTPRequestHandler):
        def do_GET(self):
            content = chains_file.read_bytes() if "sig=topsecret" in self.path else b""
            self.send_response(200 if content else 403)
            self.send_header("ETag", '"one"')
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        do_HEAD = do_GET

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/chains.json"
    server.shutdown()


@pytest.fixture
def online(monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)  # it forbids any URL
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


class Hub:
    """A hub that keeps what it is given."""

    endpoint, files = "http://hub", {}

    def create_repo(self, *args, **options):
        pass

    def create_commit(self, repo, operations, **options):
        for each in operations:
            content = each.path_or_fileobj
            Hub.files[each.path_in_repo] = content if isinstance(content, bytes) else Path(content).read_bytes()


def test_no_file_of_a_run_holds_a_secret_and_what_is_uploaded_no_path(
    tmp_path, model_dir, served, online, capsys, monkeypatch
):
    """The whole way: the data come from a URL with a user and a query; then --resume; then the hub."""
    monkeypatch.chdir(tmp_path)
    url = served.replace("://", "://someone:passw0rd@") + "?sig=topsecret"
    keys = {
        "model": model_dir,
        "data": url,
        "dtype": "float32",
        "layers": [1],
        "lags": [0],
        "controls": ["none"],
        "max_passes": 1,
        "bootstrap": 0,
        "output_dir": "out",
    }
    Path("config.yaml").write_text(yaml.safe_dump(keys))
    assert main(["config.yaml"]) == 0
    said = capsys.readouterr()
    files = {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()}
    assert len(files) > 7
    for name, content in [*files.items(), ("stdout", said.out.encode()), ("stderr", said.err.encode())]:
        for secret in ("someone", "passw0rd", "topsecret", TOKEN):
            assert secret.encode() not in content, (name, secret)
    assert yaml.safe_load(Path("out/config.yaml").read_text())["data"] == served
    assert main(["config.yaml", "--resume", "--max_passes", "2"]) == 0, capsys.readouterr().err
    capsys.readouterr()
    assert (
        main(["config.yaml", "--resume", "--data", served]) == 2
    )  # negative control: the URL in memory is the whole one
    assert "sig" not in capsys.readouterr().err
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    assert cli.main(["push", "out", "someone_else/probes"]) == 0
    assert set(Hub.files) == {"probes.safetensors", "results.csv", "README.md"}
    for name, content in Hub.files.items():
        for path in (str(tmp_path), model_dir, str(Path.home())):
            assert path.encode() not in content, (name, path)
    assert model_dir in Path("out/config.yaml").read_text()  # negative control: the run's own config names it


def test_a_run_of_before_is_cleaned_as_it_goes_up(run_folder, tmp_path, monkeypatch):
    folder = shutil.copytree(run_folder, tmp_path / "run")
    with safe_open(folder / "probes.safetensors", "pt") as f:
        about, tensors = json.loads(f.metadata()["streamprobe"]), {name: f.get_tensor(name) for name in f.keys()}
    about["config"] |= {"model": "/home/me/secret-model", "data": URL}
    save_file(tensors, folder / "probes.safetensors", {"streamprobe": json.dumps(about), "note": "/home/me"})
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    assert cli.main(["push", str(folder), "a/b"]) == 0
    for content in Hub.files.values():
        assert b"/home/me" not in content and b"topsecret" not in content
    (tmp_path / "probes.safetensors").write_bytes(Hub.files["probes.safetensors"])
    fetched, own = load_probes(tmp_path / "probes.safetensors"), load_probes(run_folder)
    assert fetched.columns == own.columns and bool((fetched.weight == own.weight).all())
    assert b"/home/me" in (folder / "probes.safetensors").read_bytes()  # negative control


def test_what_goes_wrong_with_a_url_is_told_without_its_secrets(online, served):
    for url in (
        "foo://user:passw0rd@h/x.json?sig=topsecret",
        "http://user:passw0rd@127.0.0.1:9/x.json?sig=topsecret",
        served.replace("://", "://user:passw0rd@") + "?sig=no%74opsecret&k=a%20b'topsecre",
    ):  # which it refuses
        with pytest.raises(InputError) as caught:
            read_rows(url, split="train")
        assert "passw0rd" not in str(caught.value) and "opsecre" not in str(caught.value)


@pytest.mark.parametrize("command", ["watch", "steer"])
def test_a_models_code_is_run_only_where_the_command_line_says_so(run_folder, tmp_path, capsys, command, monkeypatch):
    folder = shutil.copytree(run_folder, tmp_path / "run")
    keys = yaml.safe_load((folder / "config.yaml").read_text()) | {"trust_remote_code": True}
    (folder / "config.yaml").write_text(yaml.safe_dump(keys))
    asked = []

    def load(*args, **options):
        asked.append(args)
        raise InputError("the model", "not asked for here", "none")

    monkeypatch.setattr("streamprobe.run.opened.load_whole", load)
    monkeypatch.setattr("streamprobe.run.opened.read_texts", load)
    more = ["--prompt", "go"] if command == "watch" else []
    assert cli.main([command, str(folder), *more]) == 2
    assert "--trust_remote_code" in capsys.readouterr().err and not asked
    assert cli.main([command, str(folder), *more, "--trust_remote_code"]) == 2
    assert "the model" in capsys.readouterr().err and asked  # negative control
    assert cli.main([command, str(run_folder), *more]) == 2 and "the model" in capsys.readouterr().err


def test_no_page_can_be_led_elsewhere():
    shown = marked_text.page("a", marked_text.Legend("b", 0.5), [])
    for policy in ("default-src 'none'", "base-uri 'none'", "form-action 'none'"):
        assert policy in shown.split("<style>")[0]
        assert policy in Path(document.__file__).read_text(encoding="utf-8")
