"""Probes of every kind on other data: on the run's own test chains they score as in its results."""

import csv
import json
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from kind_banks import NAMES, add_kinds, make_bank

from streamprobe.cli import main
from streamprobe.probes import kinds
from streamprobe.probes.kept import FinalProbes, KeptProbes
from streamprobe.probes.kind_bank import KindBank
from streamprobe.probes.linear import ProbeBank
from streamprobe.probes.mixed import Mixed
from streamprobe.probes.sites import ALL_LAYERS
from streamprobe.run import ending
from streamprobe.run.kind_feeds import kind_feed, mixed_feed

pytestmark = pytest.mark.usefixtures("undrawn")
SAME = ("results.csv", "differences.csv", "categories.csv", "reliability.csv", "curves.json", "transcripts.json")
KEYS = {
    "dtype": "float32",
    "layers": [0, 2],
    "lags": [0, 4],
    "labels": ["backtracking", "deduction"],
    "max_passes": 2,
    "bootstrap": 5,
    "max_batch_tokens": 128,  # so that some chains go through in chunks
    "unlabelled": "ignore",
}


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    add_kinds(monkeypatch)


def final_of_kind(linear: FinalProbes, kind: str) -> FinalProbes:
    """Random probes of a kind; of concat and fading those of no control."""
    assert isinstance(linear.bank, ProbeBank)
    bank = make_bank(linear.bank, kind)
    if kind != "squares":
        bank = bank.choose(linear.shared, torch.zeros(len(bank.bias), len(linear.shared), dtype=torch.float64))
    at = [linear.bank.columns.index(column) for column in bank.columns]
    none = torch.zeros_like(bank.bias)
    return FinalProbes(linear.solver, kind, bank, linear.half[at], none.long(), none)


def final_mixed(nested: FinalProbes, kind: str) -> FinalProbes:
    """Random probes of what a kind adds to the joint control."""
    control, *layers = nested.bank.sites
    sites = [control, *([ALL_LAYERS] if kind == "concat" else layers)]
    random = torch.Generator().manual_seed(len(kind))
    shape = (len(sites), len(nested.bank.columns))
    widths: dict[str, tuple[int, ...]] = {"nested": (len(layers) + 1,), "own": (), "bias": ()}
    parts = {name: torch.randn(*shape, *width, generator=random) / 4 for name, width in widths.items()}
    threshold, none = torch.full(shape, torch.nan, dtype=torch.float64), torch.zeros(shape)
    bank = KindBank(Mixed(), sites, nested.bank.columns, parts, threshold, nested.solver)
    return FinalProbes(nested.solver, f"nested {kind}", bank, nested.half, none.long(), none, none + 1)


def train_with_kinds(folder: Path, patch: pytest.MonkeyPatch, **keys: Any) -> Path:
    """A finished run in which probes of all kinds stand beside the linear ones."""
    keep, score, held_out = ending.probes_to_keep, ending.score, ending.held_out_batches

    def keep_all(*given: Any) -> KeptProbes:
        kept = keep(*given)
        linear = next(each for each in kept.final if each.feed == "layers")
        nested = next(each for each in kept.final if each.feed == "nested")
        more = [final_of_kind(linear, kind) for kind in NAMES] + [final_mixed(nested, kind) for kind in NAMES]
        return kept._replace(final=[*kept.final, *more])

    def score_all(final: Any, feeds: Any, batches: Any, **_: Any) -> Any:
        layers, nested = (next(feed for feed in feeds if feed.name == name) for name in ("layers", "nested"))
        own = {}
        for each in final:
            if each.feed in NAMES:
                n = len(each.bank.columns)  # the first ones
                own[each.feed] = kind_feed(layers, each.feed)._replace(columns=layers.columns[:n])
        mixed = [mixed_feed(nested, layers, kind, own=own[kind]) for kind in NAMES]
        return score(final, [*feeds, *own.values(), *mixed], batches)

    def read_every(setup: Any, *given: Any) -> Any:
        setup.reader.stream = partial(setup.reader.stream, every=True)
        return held_out(setup, *given)

    for name, change in {"probes_to_keep": keep_all, "score": score_all, "held_out_batches": read_every}.items():
        patch.setattr(ending, name, change)
    (folder / "tiny.yaml").write_text(yaml.safe_dump(KEYS | keys))
    assert main(["train", str(folder / "tiny.yaml"), "--output_dir", str(folder / "run")]) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, model_dir: str, chains_file: Path) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("finished")
    rows = json.loads(chains_file.read_text())
    for row in rows:  # text without a label, which no column asks
        row["annotated_chain"] = row["annotated_chain"].replace('["initializing"]', "").replace('"]deduction', '"]')
    (folder / "chains.json").write_text(json.dumps(rows))
    with pytest.MonkeyPatch.context() as patch:
        add_kinds(patch)
        yield train_with_kinds(folder, patch, model=model_dir, data=str(folder / "chains.json"))


@pytest.fixture
def run(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that run, in the working directory."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(finished, "run"))


def rows_of(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "results.csv").open()))


def test_probes_of_every_kind_are_as_in_the_results_of_the_run(run: Path) -> None:
    rows = rows_of(run)
    assert list(dict.fromkeys(row["kind"] for row in rows)) == ["linear", *NAMES]
    for row in rows:
        if row["kind"] != "linear" and not row["control"] and row["lag"] == "4":  # as far as the control applies
            assert not [name for name in ("auroc", "gain_bits", "over_linear", "lift") if row[name] == "nan"], row
    assert main(["evaluate", "run", "--split", "test"]) == 0
    for name in SAME:
        assert (run / "evaluations/test" / name).read_bytes() == (run / name).read_bytes(), name


def test_they_are_as_in_the_results_fails_without_every_token(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what no column asks the probes that look back would not hear; no other scores change."""
    monkeypatch.setattr("streamprobe.run.evaluate.looks_back", lambda kind: False)
    assert main(["evaluate", "run", "--split", "test"]) == 0
    pairs = list(zip(rows_of(run), rows_of(run / "evaluations/test"), strict=True))
    assert {a["kind"] for a, b in pairs if a["auroc"] != b["auroc"]} == {"fading"}


def test_runs_are_compared_by_their_linear_probes_alone(run: Path, capsys: Any) -> None:
    shutil.copytree(run, "again")
    capsys.readouterr()
    assert main(["compare", "run", "again"]) == 0
    lines = capsys.readouterr().out.splitlines()
    shown = "\n".join(line for line in lines if not line.startswith("verdict"))  # which may name any kind
    assert len(shown) < len("\n".join(lines))
    best = max(float(row["auroc"]) for row in rows_of(run) if row["kind"] == "linear" and not row["control"])
    assert f"{best:.3f}" in shown and not [kind for kind in NAMES if kind in shown]


def test_a_kind_that_is_no_longer_known_is_one_line(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.delitem(kinds.KINDS, "squares")
    assert main(["evaluate", "run", "--split", "test"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("streamprobe: ") and error.count("\n") == 1 and "a kind that is not known (squares" in error


def test_probes_without_those_that_they_read_are_one_line(run: Path, capsys: Any) -> None:
    """A config with other controls: there is no joint control to add to."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump(config | {"controls": ["permuted"]}))
    assert main(["evaluate", "run", "--split", "test"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("streamprobe: ") and error.count("\n") == 1 and "config.yaml" in error
