"""Infinite activations and ones that are no number, wherever they occur: named, or left out like a refused row."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import inputs_of, make_rows

from streamprobe import cli
from streamprobe.cli import train as main
from streamprobe.run import reader
from streamprobe.tools import steer as steering

pytestmark = pytest.mark.usefixtures("undrawn")
BAD = "\u00a7"  # a letter that no other text holds; its tokens overflow
KEYS = (
    "--layers 1 2 --lags 0 4 --controls position permuted --max_passes 3 --tolerance 1e-9 --l2 0.1 "
    "--max_batch_tokens 1024 --bootstrap 20 --dtype float32"
).split()
SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def overflowing(tmp_path_factory: pytest.TempPathFactory, model_dir: str, tokenizer: Any) -> str:
    """The tiny model, in which the token of BAD overflows."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("overflowing") / "model"
    shutil.copytree(model_dir, folder)
    weights = load_file(folder / "model.safetensors")
    token = tokenizer(BAD, add_special_tokens=False)["input_ids"][-1]
    weights["model.embed_tokens.weight"][token] = torch.inf
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return str(folder)


def data_with(tmp_path: Path, at: int, response: str | None) -> Path:
    """60 chains, of which that at `at` begins with another text, or is refused where this is empty."""
    rows = make_rows(60, seed=7)
    row = rows[at]
    for name in ("reasoning_chain", "annotated_chain"):
        row[name] = response + row[name] if response else ""
    path = tmp_path / f"{'bad' if response else 'refused'}.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory, model_dir: str) -> dict[str, int]:
    """A row of each split."""
    data = data_with(tmp_path_factory.mktemp("plain"), 0, " ")
    splits = inputs_of(["--model", model_dir, "--data", str(data), *KEYS]).dataset.splits
    ids = [row["task_id"] for row in make_rows(60, seed=7)]
    return {name: ids.index(splits[name][1].id) for name in SPLITS}


def launch(model: str, data: Path, folder: Path, *more: str) -> int:
    return main(["--model", model, "--data", str(data), "--output_dir", str(folder), *KEYS, *more])


def results(folder: Path) -> tuple[bytes, bytes]:
    return (folder / "results.csv").read_bytes(), (folder / "categories.csv").read_bytes()


def counts(folder: Path) -> dict[str, Any]:
    """What became of the rows, as a run wrote it."""
    return json.loads((folder / "summary.json").read_text(encoding="utf-8"))["run"]["counts"]


@pytest.mark.parametrize("split", SPLITS)
def test_the_first_bad_activation_is_named_and_the_chain_can_be_left_out(
    split, overflowing, places, tmp_path, capsys
) -> None:
    at = places[split]
    name = make_rows(60, seed=7)[at]["task_id"]
    bad, run = data_with(tmp_path, at, f"one two {BAD} "), tmp_path / "run"
    assert launch(overflowing, bad, run) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "Traceback" not in told
    assert f"chain '{name}', token " in told and ", layer 1; " in told and "--bad_chains skip" in told
    assert not (run / "results.csv").exists()

    assert launch(overflowing, bad, run, "--resume", "--bad_chains", "skip") == 0
    shown = capsys.readouterr().out
    assert "1 chains with activations that are infinite" in shown
    assert "59 used (0 of them repaired" in shown and f"not numbers ({name})" in shown
    assert launch(overflowing, data_with(tmp_path, at, None), tmp_path / "refused") == 0
    assert results(run) == results(tmp_path / "refused")
    left_out, refused = (counts(tmp_path / name) for name in ("run", "refused"))
    reason = "with activations that are infinite or not numbers"
    assert left_out.pop("refused") == {reason: [name]} and refused.pop("refused") == {"with an empty response": [name]}
    assert left_out == refused and left_out["used"] == 59


def test_a_bad_activation_passes_without_the_check(overflowing, places, tmp_path, monkeypatch, capsys) -> None:
    """Negative control: nothing else names the chain."""
    monkeypatch.setattr(reader, "check_finite", lambda batches, chains, layers: batches)
    launch(overflowing, data_with(tmp_path, places["train"], f"one two {BAD} "), tmp_path / "run")
    assert "chain '" not in capsys.readouterr().err


@pytest.mark.parametrize("checked", [True, False], ids=["", "fails without the check"])
def test_a_layer_that_a_device_loses_is_named_before_it_is_trained_on(
    checked, model_dir, tmp_path, monkeypatch, capsys
) -> None:
    """It was there when the model read its first text."""

    def losing(*args: Any) -> list[int]:
        widths = check_places(*args)
        args[0].layers[2].register_forward_hook(lambda _module, _inputs, output: output * 0)
        return widths

    check_places = reader.trial.check_places
    monkeypatch.setattr(reader.trial, "check_places", losing)
    if not checked:
        monkeypatch.setattr(reader, "check_finite", lambda batches, chains, layers: batches)
    status, told = launch(model_dir, data_with(tmp_path, 0, " "), tmp_path / "run"), capsys.readouterr().err
    if checked:
        assert status == 2 and told.count("\n") == 1 and "--device_map" in told
        assert "activations that are 0 at all " in told and " tokens of a batch: layer 2; " in told
    else:
        assert "activations that are 0" not in told


def test_scores_that_overflow_are_told(overflowing, tmp_path, monkeypatch, capsys) -> None:
    """Finite activations and weights may still give an infinite logit."""
    from streamprobe.probes.linear import ProbeBank

    scores = ProbeBank.scores
    monkeypatch.setattr(ProbeBank, "scores", lambda bank, acts: scores(bank, acts) * 3e38)
    assert launch(overflowing, data_with(tmp_path, 0, " "), tmp_path / "run") == 2
    assert "scores that are infinite" in capsys.readouterr().err


def test_steering_leaves_out_what_the_run_left_out(overflowing, places, tmp_path, monkeypatch, capsys) -> None:
    run = tmp_path / "run"
    assert (
        launch(overflowing, data_with(tmp_path, places["train"], f"one two {BAD} "), run, "--bad_chains", "skip") == 0
    )
    asked = [str(run), "--layer", "1", "--problems", "4", "--max_new_tokens", "4", "--strengths", "0", "4"]
    capsys.readouterr()
    assert cli.main(["steer", *asked]) == 0
    assert "nan" not in capsys.readouterr().out
    monkeypatch.setattr(steering, "find_bad_chains", lambda *_, **__: [])
    assert cli.main(["steer", *asked]) == 2  # negative control
    assert "activations that are infinite" in capsys.readouterr().err


def test_steering_refuses_other_data_than_the_runs(model_dir, tmp_path, capsys) -> None:
    run = tmp_path / "run"
    assert launch(model_dir, data_with(tmp_path, 0, " "), run) == 0
    other = data_with(tmp_path, 1, None)
    asked = [str(run), "--layer", "1", "--problems", "2", "--max_new_tokens", "2", "--strengths", "0"]
    assert cli.main(["steer", *asked, "--data", str(other)]) == 2
    assert "that of the chains of" in capsys.readouterr().err
    assert cli.main(["steer", *asked, "--data", str(data_with(tmp_path, 0, " "))]) == 0  # negative control
