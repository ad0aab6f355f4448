"""The doors of the house: what is added in one place, here in a few lines, works from the config to the report."""

import csv
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import fingerprint, load_chains, make_rows
from test_docs import controls_of_the_schema, files_without_a_row, read, tables_of_controls
from torch import Tensor

from streamprobe import load_probes
from streamprobe.cli import main, train
from streamprobe.controls.table import CONTROLS, Control
from streamprobe.data.annotations import Annotation, Section
from streamprobe.data.columns import Role, is_text, never
from streamprobe.data.dataset import make_dataset
from streamprobe.data.formats import FORMATS, Format, annotated
from streamprobe.data.records import FormatOptions, Record, Row
from streamprobe.data.sources import read_records
from streamprobe.evaluation.results import TestResults
from streamprobe.lags import Column
from streamprobe.probes.kind_bank import KindBank
from streamprobe.probes.kinds import KINDS, Kind
from streamprobe.probes.linear import ProbeBank
from streamprobe.probes.sites import Site, control_sites, layer_sites
from streamprobe.probes.storage import pack_probes
from streamprobe.reporting.files import FILES, OutputFile

KEYS = ["--layers", "0", "2", "--lags", "0", "4", "--bootstrap", "20", "--max_passes", "2", "--dtype", "float32"]


# A format: what is written in capitals is backtracking.


def capitals(row: Row, _options: FormatOptions) -> Record:
    """A text whose sections are in capitals, and all else deduction."""
    spans = [(found[0].isupper(), *found.span()) for found in re.finditer(r"[A-Z .]{4,}|[^A-Z]+", row["text"])]
    sections = [Section("backtracking" if loud else "deduction", start, end) for loud, start, end in spans]
    return Record(row["text"], Annotation(sections), row["question"])


CAPITALS = Format(capitals, "sections in capitals", Role("a text", ["text"], is_text, never))


# A control: whether the number of the token is even.


def evenness(chain: Any, _n_labels: int) -> Tensor:
    """[T, 1]."""
    return (chain.ids % 2).float()[:, None]


EVENNESS = Control("whether the token's number is even", "P", features=evenness)


# A file: the name of the best probe.


def best_txt(results: TestResults) -> bytes:
    """The layer and the lag with the highest AUROC."""
    best = max((row for row in results.rows if not row["control"]), key=lambda row: row["auroc"])
    return f"layer {best['layer']}, lag {best['lag']:+d}".encode()


BEST = OutputFile(best_txt, "the best probe")


def in_capitals(row: dict[str, str]) -> dict[str, str]:
    """A row of the format `annotated` in the other one."""
    record = annotated(row, FormatOptions())
    text = list(record.response)
    for section in record.sections:
        if section.label == "backtracking":
            text[section.start : section.end] = record.response[section.start : section.end].upper()
    return {"text": "".join(text), "question": row["problem"], "task_id": row["task_id"]}


@pytest.fixture
def doors(monkeypatch: pytest.MonkeyPatch) -> None:
    """The three additions, each a row of its table."""
    monkeypatch.setitem(FORMATS, "capitals", CAPITALS)
    monkeypatch.setitem(CONTROLS, "evenness", EVENNESS)
    monkeypatch.setitem(FILES, "best.txt", BEST)


@pytest.fixture
def data(tmp_path: Path) -> str:
    path = tmp_path / "capitals.json"
    path.write_text(json.dumps([in_capitals(row) for row in make_rows(60, seed=7)]), encoding="utf-8")
    return str(path)


@pytest.mark.usefixtures("doors")
def test_a_format_a_control_and_a_file_go_from_config_to_report(data, model_dir, tmp_path, capsys) -> None:
    run = tmp_path / "run"
    argv = ["--model", model_dir, "--data", data, "--format", "capitals", "--output_dir", str(run), *KEYS]
    assert train([*argv, "--controls", "position", "evenness", "permuted"]) == 0
    printed = capsys.readouterr().out
    assert "sections: " in printed and "60 used" in printed and "best.txt" in printed
    rows = list(csv.DictReader((run / "results.csv").open()))
    assert {row["control"] for row in rows} == {"", "position", "evenness", "permuted"}
    assert {row["lag"] for row in rows if row["control"] == "evenness"} == {"0", "4"}
    assert "\nevenness " in printed
    assert re.fullmatch(r"layer [02], lag \+[04]", (run / "best.txt").read_text())
    page = (run / "report.html").read_text()
    assert "evenness: whether the token&#x27;s number is even" in page and page.count(">evenness<") >= 2
    assert main(["report", str(run)]) == 0
    for path in run.iterdir():
        if path.name not in ("best.txt", "checkpoint"):
            path.unlink()
    shutil.rmtree(run / "checkpoint")
    assert train(argv) == 2 and "holds a run (best.txt)" in capsys.readouterr().err


@pytest.mark.usefixtures("doors")
def test_they_are_in_help_and_the_docs_are_found_to_lack_them(capsys) -> None:
    assert main(["train", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "capitals (sections in capitals)" in shown and "evenness (whether the token's number is even)" in shown
    assert tables_of_controls(read("docs/controls.md")) != [controls_of_the_schema()]
    assert files_without_a_row(read("docs/files.md")) == ["best.txt"]


def test_a_run_fails_without_their_rows(data, model_dir, tmp_path, capsys) -> None:
    argv = ["--model", model_dir, "--data", data, "--output_dir", str(tmp_path / "run"), *KEYS]
    assert train([*argv, "--format", "capitals"]) == 2
    assert "format capitals; expected one of auto, annotated, spans, " in capsys.readouterr().err
    assert train([*argv, "--controls", "evenness"]) == 2
    assert "controls evenness; expected one of embed, text, position" in capsys.readouterr().err


# Controls that are made in the two other ways: other labels, and a layer of embeddings.


def backwards(codes: Tensor, _support: Tensor, _random: Any) -> Tensor:
    """The labels in the order from the last token to the first."""
    return codes.flip(0)


def negated(_words: Any, embedded: Tensor, n: int) -> Tensor:
    """[n, E]: as good as the embedding itself."""
    return -embedded[-n:]


def test_controls_of_other_labels_and_of_embeddings_have_the_same_door(
    chains_file, model_dir, tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.setitem(CONTROLS, "backwards", Control("the labels backwards", "1", relabel=backwards))
    monkeypatch.setitem(CONTROLS, "negated", Control("the embedding negated", "2", embedded=negated))
    argv = ["--model", model_dir, "--data", str(chains_file), "--output_dir", str(tmp_path / "run"), *KEYS]
    assert train([*argv, "--controls", "embed", "negated", "backwards"]) == 0
    rows = list(csv.DictReader((tmp_path / "run" / "results.csv").open()))
    area = {(row["control"], row["lag"]): float(row["auroc"]) for row in rows if row["layer"] in ("", "0")}
    for lag in ("0", "4"):
        assert area["negated", lag] == pytest.approx(area["embed", lag], abs=2e-3)
        assert ("backwards", lag) in area
    printed = capsys.readouterr().out
    assert "\nnegated " in printed and "\nbackwards " in printed


# A source: rows that are made on the way.


class Made:
    """Records without a file."""

    partial = False

    def __init__(self, n: int, place: int = 0):
        self.rows, self.place = make_rows(n, seed=5), place

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Record]:
        for number in range(self.place, len(self.rows)):
            self.place += 1
            row = self.rows[number]
            yield replace(annotated(row, FormatOptions()), id=row["task_id"])

    def state(self) -> dict[str, int]:
        """Where it stands."""
        return {"place": self.place}


def test_a_source_of_another_kind_gives_the_same_chains(tokenizer) -> None:
    labels = ["backtracking", "deduction"]
    made = make_dataset(read_records(Made(30)), tokenizer, labels, context=512)
    assert len(made.chains()) == 30
    assert made.fingerprint() == fingerprint(load_chains(make_rows(30, seed=5), tokenizer, labels)[0])
    source = Made(30)
    first = [next(iter(source)) for _ in range(3)]
    rest = list(Made(30, **source.state()))
    assert [record.id for record in first + rest] == [row["task_id"] for row in make_rows(30, seed=5)]


# A kind of probe: the square of a linear one.


class Squares:
    """The squared logits of linear probes."""

    kind, joined, looks_back = "squares", False, False

    def scorer(self, parts):
        """Squares of what linear probes say."""
        bank = ProbeBank([], [], parts["weight"], parts["bias"])
        return lambda acts, chain: bank.scores(acts).square()

    def mean_of_folds(self, parts, n):
        """There is one."""
        return dict(parts)

    def n_features(self, parts):
        """The width of the weights."""
        return parts["weight"].shape[2]


def test_a_kind_of_probe_is_saved_and_read_back_as_what_it_is(tmp_path, monkeypatch) -> None:
    columns = [Column("event", "token", lag) for lag in (0, 4)]
    parts = {"weight": torch.randn(1, 2, 8), "bias": torch.randn(1, 2)}
    bank = KindBank(Squares(), layer_sites([3]), columns, parts, torch.zeros(1, 2), "newton")
    path, acts = tmp_path / "probes.safetensors", torch.randn(5, 1, 8)
    monkeypatch.setitem(KINDS, "squares", Kind("the square of a linear probe's logit", form=lambda _: Squares()))
    linear = ProbeBank(bank.reads, columns, parts["weight"], parts["bias"], torch.zeros(1, 2), "newton")
    path.write_bytes(pack_probes({"newton": linear, "newton/squares": bank}, {"config": {}}))
    loaded = load_probes(path, kind="squares")
    for probes in (loaded, loaded.clone(), loaded.to("cpu"), loaded.choose([0, 1], loaded.threshold)):
        assert torch.equal(probes.scores(acts), bank.scores(acts)) and probes.kind == "squares"
    assert torch.equal(load_probes(path).scores(acts), linear.scores(acts))
    monkeypatch.delitem(KINDS, "squares")
    with pytest.raises(ValueError, match="a kind that is not known"):
        load_probes(path, kind="squares")


def test_a_site_says_itself_whether_it_is_a_control() -> None:
    assert (
        not Site("attn_out").is_control
        and control_sites(["embed"])[0].is_control
        and not Site("layer12", 12).is_control
    )
