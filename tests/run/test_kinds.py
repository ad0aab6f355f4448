"""Runs of several kinds of probes, from one stream: killed, in folds, streamed and on several processes alike."""

import csv
import json
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from forked import forked
from killed import killed_after
from launched import launched

from streamprobe.cli import main as streamprobe
from streamprobe.cli import train as main
from streamprobe.probes.storage import load_probes

EVERY = ["linear", "meandiff", "ema4", "stack", "concat", "quad2", "mlp4", "attn2", "top_k1", "top_k4"]
JOINED = ("stack", "concat")
KEYS = {
    "dtype": "float32",
    "layers": [0, 2],
    "lags": [0, 4],
    "labels": ["backtracking"],
    "targets": ["token", "onset"],
    "max_passes": 100,
    "max_batch_tokens": 512,
    "bootstrap": 20,
    "controls": ["position", "permuted", "joint+chain"],
    "report_to": "none",
    "kinds": EVERY,
}


@pytest.fixture(scope="module", autouse=True)
def here(tmp_path_factory: pytest.TempPathFactory, model_dir: str, chains_file: Path) -> Iterator[Path]:
    """A folder with a config, in which all is done."""
    folder = tmp_path_factory.mktemp("kinds")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(KEYS | {"model": model_dir, "data": str(chains_file)}))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


def train(out: str, *argv: str) -> Path:
    assert main(["tiny.yaml", *argv, "--output_dir", out]) == 0
    return Path(out)


@pytest.fixture(scope="module")
def run(here: Path) -> Path:
    """A run of every kind."""
    return train("every")


def rows_of(folder: str | Path) -> list[dict[str, str]]:
    return list(csv.DictReader((Path(folder) / "results.csv").open()))


def numbers_of(folder: str | Path, *kinds: str) -> np.ndarray:
    """AUROC, its interval and the gains of the probes of these kinds."""
    names = ("auroc", "auroc_low", "auroc_high", "average_precision", "f1", "gain_bits", "gain_within", "over_linear")
    own = [row for row in rows_of(folder) if row["kind"] in kinds and not row["control"]]
    return np.array([[float(row[name]) for name in names] for row in own])


def test_every_kind_stands_in_the_results_beside_the_same_controls(run: Path) -> None:
    rows = [row for row in rows_of(run) if not row["control"]]
    assert list(dict.fromkeys(row["kind"] for row in rows)) == EVERY
    for kind in EVERY:
        own = [row for row in rows if row["kind"] == kind]
        assert len(own) == (1 if kind in JOINED else 2) * 4
        assert {row["layer"] for row in own} == ({""} if kind in JOINED else {"0", "2"})
        assert all(0 < float(row["auroc"]) < 1 and float(row["threshold"]) < 30 for row in own)
        assert all((row["over_linear"] != "nan") == (kind != "linear") for row in own)
        assert all(row["lift"] != "nan" and row["best_control"] for row in own)
        assert all(row["gain_bits"] != "nan" for row in own if int(row["lag"]) > 0), kind
    assert {row["kind"] for row in rows_of(run) if row["control"]} == {"linear"}
    between = list(csv.DictReader((run / "differences.csv").open()))
    kinds = {(row["a"], row["b"]) for row in between if row["between"] == "kind"}
    assert ("linear", "attn2") in kinds and ("stack", "concat") in kinds and ("linear", "stack") not in kinds


def test_a_probe_of_all_layers_says_how_much_of_it_is_each_layers(run: Path) -> None:
    norms = json.loads((run / "summary.json").read_text())["run"]["layer_norms"]
    assert norms.keys() == set(JOINED) and len(norms["concat"]) == 4
    weight = load_probes(run, kind="concat").weight[0, 0]  # [L, D], raw
    for own in norms["concat"].values():
        assert own.keys() == {"layer00", "layer02"} and all(norm > 0 for norm in own.values())
    first = next(iter(norms["concat"].values()))
    raw = dict(zip(first, weight.norm(dim=1).tolist(), strict=True))
    assert raw != first, "in units of each feature's deviation"


def test_linear_probes_and_controls_are_as_in_a_run_of_these_alone(run: Path) -> None:
    alone = train("alone", "--kinds", "linear")
    names = ("auroc", "average_precision", "gain_bits", "lift", "f1")
    ours, theirs = (
        [[float(row[name]) for name in names] for row in rows_of(folder) if row["kind"] == "linear"]
        for folder in (run, alone)
    )
    np.testing.assert_allclose(ours, theirs, atol=2e-3)  # solved to a gradient of 1e-3
    assert rows_of(alone)[0].keys() == rows_of(run)[0].keys()


def test_what_is_certainly_above_linear_is_said_and_nothing_else(run: Path, capsys: pytest.CaptureFixture) -> None:
    page = (run / "report.html").read_text()
    assert "<h2 id=kinds>Kinds of probes</h2>" in page
    above = [row for row in rows_of(run) if float(row["over_linear_low_corrected"]) > 0]
    assert ("is certainly above linear probes at any lag" in page) >= (not above)
    assert "id=kinds" not in (train("plain", "--kinds", "linear") / "report.html").read_text()


def test_a_run_that_was_killed_ends_as_one_that_was_not(run: Path) -> None:
    argv = ["tiny.yaml", "--output_dir", "killed"]
    [done] = forked(argv, prepare=killed_after(2, saved=1))
    assert done.status == -signal.SIGKILL
    [done] = forked([*argv, "--resume"])
    assert done.status == 0 and "resumed   after pass" in done.out
    for name in ("results.csv", "probes.safetensors", "controls.safetensors", "differences.csv"):
        assert (run / name).read_bytes() == Path("killed", name).read_bytes(), name


def test_streamed_tokens_give_the_same_probes(run: Path) -> None:
    """Where activations do not fit, the model reads the chains again for the samples."""
    streamed = train("streamed", "--memory_gb", "0.0035")
    kept = [json.loads((folder / "summary.json").read_text())["run"]["activations"] for folder in (run, streamed)]
    assert kept[0].endswith("kept") and kept[1].endswith("streamed")
    kinds = [kind for kind in EVERY if kind != "linear"]
    np.testing.assert_allclose(numbers_of(run, *kinds)[:, 0], numbers_of(streamed, *kinds)[:, 0], atol=0.02)


@pytest.mark.parametrize("size", [2])
def test_two_processes_find_what_one_does(run: Path, size: int) -> None:
    done = launched(["tiny.yaml", "--output_dir", f"w{size}"], size)
    assert [each.status for each in done] == [0] * size, done
    np.testing.assert_allclose(numbers_of(run, *EVERY), numbers_of(f"w{size}", *EVERY), atol=1e-5)


def test_folds_test_every_chain_and_keep_the_means_of_their_logits() -> None:
    folder = train("folds", "--folds", "3")
    assert {row["kind"] for row in rows_of(folder)} == set(EVERY)
    for kind in ("mlp4", "attn2", "quad2", "ema4", "concat"):
        bank = load_probes(folder, kind=kind)
        assert torch.isfinite(bank.scores(torch.randn(7, 2, bank.n_features))).all()
    assert load_probes(folder, kind="mlp4").parts["outer"].shape[-1] == 12, "the units of three folds"


def test_probes_on_disk_say_what_was_judged(run: Path) -> None:
    """Evaluated on the run's own test chains, every kind has the run's own numbers."""
    assert streamprobe(["evaluate", str(run), "--split", "test", "--out", "again"]) == 0
    np.testing.assert_allclose(numbers_of(run, *EVERY), numbers_of("again", *EVERY), atol=1e-5)


@pytest.mark.parametrize(
    "given, said",
    [
        (["mlp64"], "linear among them"),
        (["linear", "cubic"], "kinds cubic; expected of linear, meandiff"),
        (["linear", "mlp"], "kinds mlp; expected mlp64, the nearest one; fix: correct --kinds"),
        (["linear", "stack2"], "kinds stack2;"),
        (["linear", "mlp4", "mlp4"], "repetition"),
    ],
)
def test_kinds_that_do_not_go_are_refused_in_a_line(given: list[str], said: str, capsys) -> None:
    assert main(["tiny.yaml", "--kinds", *given, "--output_dir", "bad"]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and not Path("bad").exists()


def test_kinds_need_a_solver_that_converges(capsys) -> None:
    assert main(["tiny.yaml", "--solvers", "adam", "--output_dir", "bad"]) == 2
    assert "newton" in capsys.readouterr().err
