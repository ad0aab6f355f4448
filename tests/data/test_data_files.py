"""Rows of a file, a folder, a glob, a URL or the hub: the same ones from each; what cannot be read ends in one line."""

import hashlib
import os
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from builders import compress, make_rows, write_rows

from streamprobe.data.detect import FormatQuery
from streamprobe.data.files import read_rows
from streamprobe.data.records import FormatOptions
from streamprobe.data.sources import open_source
from streamprobe.errors import InputError

ROW = {"task_id": "a_1", "problem": "p", "reasoning_chain": "r", "annotated_chain": "r"}
read = partial(read_rows, split="train")


@pytest.fixture(autouse=True)
def somewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def refused(data: str, *said: str, **options: Any) -> str:
    """Checks that data are refused in one line with what is expected and a fix; returns it."""
    with pytest.raises(InputError) as caught:
        read(data, **options)
    text = str(caught.value)
    assert "\n" not in text and "; expected " in text and "; fix: " in text
    assert all(part in text for part in said), text
    return text


# --- a file ---


@pytest.mark.parametrize("squeezed", ["", ".gz", ".zst"])
@pytest.mark.parametrize("suffix", ["csv", "tsv", "json", "jsonl", "ndjson", "parquet"])
def test_read_rows(suffix, squeezed):
    rows = make_rows(30, seed=8)
    rows[3]["problem"] = 'é漢🙂 "quoted" \\ \n\t'
    assert read(write_rows(Path(f"x.{suffix}{squeezed}"), rows)) == rows


def test_read_rows_of_the_shared_file(chains_file):
    assert read(str(chains_file)) == make_rows(60, seed=7)


def test_a_text_is_called_by_its_file():
    assert read(write_rows(Path("chain 7.txt.zst"), [{"text": "wait"}])) == [{"id": "chain 7", "text": "wait"}]


def test_read_rows_caches_no_copy():
    def cached() -> int:
        cache = Path(os.environ["HF_DATASETS_CACHE"])
        return sum(p.stat().st_size for p in cache.rglob("*") if p.is_file())

    before = cached()
    for suffix in ("json", "jsonl", "parquet", "csv.gz"):
        read(write_rows(Path(f"y.{suffix}"), make_rows(30, seed=8)))
    assert cached() == before
    from datasets import load_dataset

    load_dataset("json", data_files="y.json", split="train")  # negative control: not streamed
    assert cached() > before


@pytest.mark.parametrize("suffix", ["json", "csv.gz"])
def test_digest(suffix):
    """That of the file as it lies."""
    rows = make_rows(3)
    path = write_rows(Path(f"x.{suffix}"), rows)
    digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    assert read(path, sha256=digest) == read(path, sha256=digest.upper()) == rows
    refused(path, digest, "0" * 64, sha256="0" * 64)


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_one_odd_row_leaves_the_others_as_they_are(suffix):
    rows: list[dict[str, Any]] = [*make_rows(3)]
    rows[2]["reasoning_chain"] = 3
    assert read(write_rows(Path(f"x.{suffix}"), rows)) == rows


def test_text_that_looks_like_dates_stays_text():
    rows = [row | {"problem": f"2021-01-0{i + 1}"} for i, row in enumerate(make_rows(3))]
    for suffix in ("json", "csv", "jsonl"):
        assert read(write_rows(Path(f"x.{suffix}"), rows)) == rows
    from datasets import load_dataset  # negative control: it gives the column a type

    typed = load_dataset("json", data_files="x.jsonl", split="train", streaming=True)
    assert next(iter(typed))["problem"] != "2021-01-01"


def test_a_local_file_may_have_any_name():
    rows = [ROW, ROW | {"problem": "q"}]
    for name in ("wait: what?.json", "a#b?c=d.json", "*[x].JSON", "50%.json", "**.csv", "a?b*[c].parquet"):
        write_rows(Path("plain" + Path(name).suffix.lower()), rows)
        Path("plain" + Path(name).suffix.lower()).rename(name)
        assert read(name) == rows


def test_a_file_that_comes_with_the_package_is_found_from_any_folder():
    assert len(read("streamprobe/demo/chains.json")) == 500
    assert read("streamprobe/demo/*.json") == read("streamprobe/demo/chains.json")


BROKEN = {
    "cut.json": '[{"task_id": "a", "problem": "b"',
    "words.json": "hello",
    "cut.jsonl": '{"task_id": "a"}\n{"task_id":',
    "words.parquet": "hello",
    "words.csv.gz": "hello",
    "words.json.zst": "hello",
    "numbers.json": "[1, 2, 3]",
    "none.json": "[]",
    "nothing.json": "",
    "nothing.jsonl": "",
    "nothing.csv": "",
    "header.csv": "a,b\n",
    "nothing.parquet": "",
    "nothing.jsonl.gz": "",
    "deep.json": "[" * 100_000,
    "deeper.json": "[" + "[" * 100_000 + "]" * 100_000 + "]",
    "deep.jsonl": '{"a":' * 100_000,
    "number.json": "1" * 5000,
    "open.csv": 'a,b\n1,"2\n3,4\n',
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_file(name):
    Path(name).write_text(BROKEN[name], encoding="utf-8")
    assert len(refused(name, name)) < 300
    Path("folder").mkdir()
    Path(name).rename(f"folder/{name}")
    refused("folder", "folder" if "no rows" in refused(f"folder/{name}") else name)


def test_a_broken_file_is_reported_by_the_place_and_by_what_it_should_be():
    Path("x.jsonl").write_bytes(b'{"a": 1}\n[]\n')
    refused("x.jsonl", "(line 2 is no object)", "expected JSON lines, an object a line")
    Path("x.csv").write_bytes("a,b\n1,café\n".encode("latin-1"))
    refused("x.csv", "x.csv, line 2: byte 9 (0xe9) is no UTF-8; expected UTF-8", "iconv -f latin1")
    Path("x.zip").write_bytes(b"PK")
    refused("x.zip", "x.zip, which ends in .zip", ".csv, .tsv, .parquet, .txt, .md (each also with .gz or .zst")
    Path("x").write_bytes(b"")
    refused("x", "data x;", ".csv")


@pytest.mark.parametrize("name", ["nowhere.json", "nowhere.csv.gz", "nowhere.txt", "./nowhere", "/no/where", "a/b/c"])
def test_what_is_not_there(name):
    refused(name, f"{name}, which does not exist")


def test_what_is_no_file():
    os.mkfifo("pipe.json")
    Path("loop.json").symlink_to("loop.json")
    for name in ("pipe.json", "loop.json"):
        refused(name, f"{name}, which is no file")


@pytest.mark.parametrize("data", ["foo://x.json", "x" * 5000 + ".json", "a\0b.json", "a\0b*.json", "x" * 5000 + "*"])
def test_data_that_cannot_be_had(data):
    refused(data, "data")


# --- folders and globs ---


def test_a_folder_is_its_files_in_sorted_order(capsys):
    rows = make_rows(9)
    Path("chains").mkdir()
    for number, place in ((2, "c.jsonl.gz"), (0, "a.jsonl"), (1, "b.ndjson.zst")):
        write_rows(Path("chains", place), rows[3 * number : 3 * number + 3])
    assert read("chains") == read("chains/") == read("chains/*") == read("chains/?.*") == rows
    assert capsys.readouterr().out.splitlines()[0] == "data      3 files of chains, 9 rows"
    assert read("chains/[ac]*") == rows[:3] + rows[6:]  # negative control: it is the names that choose


def test_files_that_are_no_data_are_left_out_with_a_word(capsys):
    rows = make_rows(4)
    Path("chains/below").mkdir(parents=True)
    for place in ("x.csv", ".hidden.csv", "below/y.csv"):
        write_rows(Path("chains", place), rows[:2] if place == "x.csv" else rows[2:])
    for place in ("README.md", "notes.txt", "sheet.PDF", "LICENSE", ".DS_Store"):
        Path("chains", place).write_text("hello")
    Path("chains/again.csv").symlink_to("x.csv")
    assert read("chains") == rows[:2]
    said = (
        "data      1 file of chains, 2 rows; left out: 1 without an ending, 1 .md, 1 .pdf, 1 .txt, 1 link to another\n"
    )
    assert capsys.readouterr().out == said
    assert read("chains/**/*.csv") == [*rows[2:], *rows[:2]]


def test_a_folder_that_a_link_leads_back_to_is_read_once():
    Path("chains/below").mkdir(parents=True)
    Path("chains/below/up").symlink_to("..")
    write_rows(Path("chains/below/x.csv"), make_rows(3))
    assert read("chains/**/*.csv") == make_rows(3)


def test_texts_of_a_folder_are_called_by_their_place(capsys):
    for place in ("a/1.txt", "a/2.txt.gz", "b/1.txt"):
        Path("texts", place).parent.mkdir(parents=True, exist_ok=True)
        write_rows(Path("texts", place), [{"text": place}])
    found = [
        {"id": name, "text": text} for name, text in (("a/1", "a/1.txt"), ("a/2", "a/2.txt.gz"), ("b/1", "b/1.txt"))
    ]
    assert read("texts/**/*.txt*") == read(f"{Path.cwd()}/**/*.txt*") == found
    assert read("texts/a") == [row | {"id": row["id"][2:]} for row in found[:2]]
    os.chdir("texts")
    assert read("**/*.txt*") == found and [row["id"] for row in read("a")] == ["1", "2"]


def test_files_of_several_types_are_refused_with_their_counts():
    Path("mixed").mkdir()
    for place in ("a.jsonl", "b.jsonl", "c.csv.gz", "README.md"):
        write_rows(Path("mixed", place), [{"text": "x"}])
    for data in ("mixed", "mixed/*"):
        refused(data, "several types (1 .csv.gz, 2 .jsonl)", "such as mixed/*.jsonl")
    assert len(read("mixed/*.jsonl")) == 2
    Path("texts").mkdir()
    for place in ("a.txt", "README.md"):
        write_rows(Path("texts", place), [{"text": "x"}])
    refused("texts", "several types (1 .md, 1 .txt)")


def test_a_folder_or_glob_without_a_file():
    Path("empty").mkdir()
    refused("empty", "data empty without a file that can be read (no file at all)", "such as empty/**/*.jsonl")
    refused("*.csv", "data *.csv without a file")
    refused("gone/**", "data gone/** without a file")
    Path("empty/x.pdf").write_text("hello")
    refused("empty", "(1 .pdf)", ".csv, .tsv")
    Path("none").mkdir()
    Path("none/x.csv").write_text("a,b\n")
    refused("none", "data none with no rows")


def test_keys_of_other_sources_are_refused():
    write_rows(Path("x.json"), make_rows(3))
    for data in (".", "*.json"):
        refused(data, "data_sha256 with the files of", "drop data_sha256", sha256="0" * 64)
    refused("some/name", "data_sha256 with the data set some/name", sha256="0" * 64)
    for data in (".", "x.json", "http://h/x.json"):
        refused(data, "data_config main with", "drop data_config", config="main")


# --- elsewhere ---


class Quiet(SimpleHTTPRequestHandler):
    """Serves the working directory."""

    def log_message(self, *args):
        pass


def test_any_file_may_lie_at_a_url(monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)  # this test serves its own network
    server = ThreadingHTTPServer(("127.0.0.1", 0), Quiet)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    rows = make_rows(5)
    for name in ("x.csv", "x.jsonl.gz", "x.json.zst", "x.parquet"):
        path = write_rows(Path(name), rows)
        digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
        assert read(f"{url}/{name}?download=true#x", sha256=digest) == rows
    Path("a b.txt").write_bytes(compress(b"wait", ""))
    assert read(f"{url}/a%20b.txt") == [{"id": "a b", "text": "wait"}]
    Path("bad.csv").write_text("a,b\n1\n")
    refused(f"{url}/bad.csv?token=x", "/bad.csv, which cannot be read (line 2")
    refused(f"{url}/x.zip", "/x.zip, which ends in .zip")
    refused(f"{url}/gone.csv", "gone.csv", "a URL that can be downloaded")
    server.shutdown()


def test_a_configuration_of_a_data_set_on_the_hub(monkeypatch):
    """A folder with the card of a data set stands for one on the hub, which `datasets` reads in the same way."""
    import datasets

    for name in ("easy", "hard"):
        Path("hub", name).mkdir(parents=True)
        write_rows(Path("hub", name, "rows.jsonl"), [{"text": name}])
    card = "".join(f"- config_name: {name}\n  data_files: {name}/*\n" for name in ("easy", "hard"))
    Path("hub/README.md").write_text(f"---\nconfigs:\n{card}---\n")
    load = datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", lambda name, *args, **options: load("hub", *args, **options))
    assert [read("some/name", config=name) for name in ("easy", "hard")] == [[{"text": "easy"}], [{"text": "hard"}]]
    refused("some/name", "easy", "hard", "--data_config")  # negative control: one must be chosen
    refused("some/name", "'easy', 'hard'", config="none")
    with pytest.raises(InputError, match=r"\['train'\]|train"):
        read_rows("some/name", split="test", config="easy")
    found = open_source(
        "some/name",
        FormatQuery("text", labelled=False),
        FormatOptions(),
        config="hard",
    )
    assert len(found) == 1
