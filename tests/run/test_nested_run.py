"""Nested probes through the whole program: what they add to results, and that they end the same however a run went."""

import csv
import json
import math
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from builders import make_rows
from finished import results
from forked import forked
from safetensors import safe_open

from streamprobe.cli import main as streamprobe
from streamprobe.cli import train as main
from streamprobe.probes import kept
from streamprobe.probes.kept import CONTROLS_FILE, NESTED, load_kept
from streamprobe.probes.storage import pack_tensors
from streamprobe.run import jobs, reader
from streamprobe.run.checkpoint import load_run
from streamprobe.run.pass_end import PassEnd
from streamprobe.solvers.nested import NestedSolver
from streamprobe.trainer import Done

KEYS = {
    "dtype": "float32",
    "layers": [0, 2],
    "lags": [0, 4, 8],
    "labels": ["backtracking"],
    "max_passes": 100,
    "tolerance": 1e-5,
    "max_batch_tokens": 512,
    "bootstrap": 20,
    "controls": ["joint+chain"],
}
pytestmark = pytest.mark.usefixtures("undrawn")
STORES = {"kept": [], "streamed": ["--memory_gb", "0.002"]}
GAINS = ("gain_bits", "gain", "gain_within")
FILES = ("results.csv", CONTROLS_FILE)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, model_dir: str, chains_file: Path) -> Path:
    """A folder with a config, and a run of it in `straight` for either way to keep activations."""
    folder = tmp_path_factory.mktemp("nested")
    keys = KEYS | {"model": model_dir, "data": str(chains_file)}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(keys))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for store, argv in STORES.items():
            assert main(["tiny.yaml", *argv, "--output_dir", store]) == 0
    return folder


@pytest.fixture(autouse=True)
def here(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(finished)


def train(out: str, *argv: str) -> Path:
    """The folder of a finished run, in one of its own."""
    assert main(["tiny.yaml", *argv, "--output_dir", out]) == 0
    return Path(out)


def rows_of(folder: str | Path) -> list[dict[str, str]]:
    return list(csv.DictReader((Path(folder) / "results.csv").open()))


def gains_of(folder: str | Path, names: tuple[str, ...] = GAINS) -> torch.Tensor:
    """The gains of a run [rows, names], of rows that have them."""
    return torch.tensor([[float(row[name]) for name in names] for row in rows_of(folder) if row["gain_bits"] != "nan"])


def summary(folder: str | Path) -> dict[str, Any]:
    return json.loads((Path(folder) / "summary.json").read_text())["run"]


def has_gains(row: dict[str, str]) -> bool:
    found = {math.isnan(float(row[name])) for name in (*GAINS, "penalty", "nested_gradient_norm")}
    assert len(found) == 1, row
    return found == {False}


@pytest.mark.parametrize("store", STORES)
def test_layers_have_gains_at_lags_above_0_and_nothing_else_has(store: str) -> None:
    rows = rows_of(store)
    assert {(row["layer"], row["control"], row["lag"]) for row in rows if has_gains(row)} == {
        (layer, "", lag) for layer in ("0", "2") for lag in ("4", "8")
    }
    assert {row["control"] for row in rows} == {"", "joint+chain"}
    norms = [float(row["nested_gradient_norm"]) for row in rows if has_gains(row)]
    assert max(norms) <= KEYS["tolerance"]
    about = summary(store)
    assert about["nested_passes"] > 1 and store in about["activations"]
    [verdict] = about["verdicts"]
    assert "corrected for the 4 probes looked at" in verdict and "WARNING" not in verdict


def test_passes_of_nested_probes_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert streamprobe(["evaluate", "kept", "--split", "test", "--out", "other"]) == 0
    assert "nested" not in capsys.readouterr().out  # negative control: there are none
    train("said")
    said = capsys.readouterr().out
    assert said.rindex("\npass ") < said.index("\nnested ") < said.rindex("\ntest ")
    assert f"{summary('said')['nested_passes']} of nested probes behind them" in said
    assert "nested " in said and "4 of 4 nested probes final" in said


def test_evaluate_gives_the_same_gains_of_the_same_chains() -> None:
    assert streamprobe(["evaluate", "kept", "--split", "test", "--out", "evaluated"]) == 0
    assert Path("evaluated/results.csv").read_bytes() == Path("kept/results.csv").read_bytes()


def test_gains_are_those_of_the_nested_probes_that_were_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control of the above: other nested probes give other gains, and nothing else but these."""
    train("changed", "--bootstrap", "0")
    path = Path("changed") / CONTROLS_FILE
    with safe_open(path, framework="pt") as f:
        about, tensors = f.metadata()["streamprobe"], {name: f.get_tensor(name) for name in f.keys()}
    tensors["newton.nested.bias"][1:] += 1.5
    path.write_bytes(pack_tensors(tensors, about))
    monkeypatch.setattr(kept, "_digest", lambda *_: json.loads(about)["sha256"])
    assert streamprobe(["evaluate", "changed", "--split", "test", "--out", "of-changed"]) == 0
    for before, now in zip(rows_of("changed"), rows_of("of-changed"), strict=True):
        changed = {name for name in before if before[name] != now[name]}
        none = (
            float(before["penalty"] if has_gains(before) else "inf") == math.inf
        )  # it is the control, whatever is kept
        assert changed == (set() if none else {"gain_bits"})


def killed_in_nested_pass(number: int) -> Callable[[], None]:
    """Lets a process die in such a pass of nested probes, with the checkpoint of the last pass before on disk."""

    def prepare() -> None:
        end, end_nested = PassEnd.__call__, NestedSolver.end_pass

        def saved(self: PassEnd, done: Done) -> None:
            self.checkpoints.seconds = 0.0
            end(self, done)
            self.checkpoints.wait()

        def deadly(self: NestedSolver) -> None:
            end_nested(self)
            if int(self.passes) == number:
                os.kill(os.getpid(), signal.SIGKILL)

        PassEnd.__call__ = saved  # type: ignore[method-assign]  # in a process of its own
        NestedSolver.end_pass = deadly  # type: ignore[method-assign]

    return prepare


@pytest.mark.parametrize("store", STORES)
def test_killed_while_they_are_trained_a_run_ends_the_same(store: str) -> None:
    """Nested probes begin anew, where the others ended."""
    argv, out = ["tiny.yaml", *STORES[store], "--output_dir"], "killed"
    train(out, *STORES[store]).rename(f"straight-{store}")  # files say which folder they are in
    [done] = forked([*argv, out], prepare=killed_in_nested_pass(3))
    assert done.status == -signal.SIGKILL
    checkpoint = load_run(Path(out))
    assert checkpoint and NESTED not in checkpoint.states and not (Path(out) / "results.csv").exists()
    [done] = forked([*argv, out, "--resume"])
    assert done.status == 0 and "resumed   after pass" in done.out
    again = results(out)
    assert [name for name, content in results(f"straight-{store}").items() if content != again[name]] == []
    shutil.rmtree(out)


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("first", [1, 3])
def test_a_finished_run_that_is_given_more_passes_ends_as_a_straight_one(store: str, first: int) -> None:
    out = f"more-{store}-{first}"
    more_passes(out, first, STORES[store], Path(store))


@pytest.mark.parametrize("store", STORES)
def test_nested_probes_that_alone_need_more_passes_end_as_in_a_straight_run(store: str, monkeypatch) -> None:
    """They begin anew."""
    monkeypatch.setattr(jobs, "BASELINE_EXACTNESS", 1)  # so that the control is done long before them
    straight = train(f"alone-{store}", *STORES[store])
    about = summary(straight)
    assert about["nested_passes"] > about["passes"]
    more_passes(f"nested-{store}", about["passes"], STORES[store], straight)


def more_passes(out: str, first: int, argv: list[str], straight: Path) -> None:
    """Trains for a few passes, and then for all of them: this is to be the straight run."""
    few = train(out, *argv, "--max_passes", str(first))
    assert few.joinpath("results.csv").read_bytes() != straight.joinpath("results.csv").read_bytes()
    train(out, *argv, "--resume")
    assert Path(out, "results.csv").read_bytes() == straight.joinpath("results.csv").read_bytes()
    assert summary(out)["nested_passes"] == summary(straight)["nested_passes"]


def test_a_finished_run_takes_its_nested_probes_up(monkeypatch: pytest.MonkeyPatch) -> None:
    out = train("again")
    before = [(out / name).read_bytes() for name in FILES]
    monkeypatch.setattr(NestedSolver, "step", None)
    train("again", "--resume")
    assert before == [(out / name).read_bytes() for name in FILES]


def test_streamed_activations_give_the_gains_of_kept_ones() -> None:
    """Within what the tolerance of the gradient leaves open, whatever the order of tokens."""
    fine = ("--tolerance", "1e-6", "--bootstrap", "0")
    first, second = (train(f"fine-{store}", *argv, *fine) for store, argv in STORES.items())
    torch.testing.assert_close(gains_of(first), gains_of(second), rtol=0, atol=1e-4)
    assert gains_of(first)[:, 0].abs().max() > 1e-3  # negative control: there is something to compare


def test_columns_that_share_matrices_end_with_the_same_gains(monkeypatch: pytest.MonkeyPatch) -> None:
    fine = ("--tolerance", "1e-6", "--bootstrap", "0")
    alone = train("alone", *fine)
    monkeypatch.setattr("streamprobe.run.solver_sizes.Matrices.must_share", lambda *_: True)
    shared = train("shared", *fine)
    assert summary(shared)["newton_matrices"] == "one per layer"
    torch.testing.assert_close(gains_of(shared), gains_of(alone), rtol=0, atol=1e-4)
    assert summary(shared)["nested_passes"] < 3 * summary(alone)["nested_passes"]


@pytest.mark.parametrize("passes", [1, 2, 8])
def test_after_a_few_passes_there_is_no_verdict_and_after_some_a_warning(passes: int) -> None:
    """No gain is known before validation has chosen a penalty: it is not 0."""
    out = train(f"few-{passes}", "--max_passes", str(passes))
    [verdict] = summary(out)["verdicts"]
    assert summary(out)["nested_passes"] == passes
    gains = [float(row["gain_bits"]) for row in rows_of(out) if row["lag"] != "0" and not row["control"]]
    if passes < 8:
        assert "no verdict on a token inside backtracking, since training ended before" in verdict
        assert all(map(math.isnan, gains))
    else:
        assert "WARNING: not converged (gradient norm " in verdict and all(map(math.isfinite, gains))


def test_adam_has_none_and_says_so() -> None:
    out = train("adam", "--solvers", "adam", "--max_passes", "1")
    assert not any(row["gain_bits"] != "nan" for row in rows_of(out))
    [verdict] = summary(out)["verdicts"]
    assert "no verdict" in verdict and "adam trains no probe that reads joint+chain and a layer" in verdict
    assert "nested_passes" not in summary(out)


def test_beside_adam_and_with_seeds_newtons_are_the_same() -> None:
    out = train("both", "--solvers", "adam", "newton", "--seeds", "2", "--max_passes", "40")
    assert {row["solver"] for row in rows_of(out) if has_gains(row)} == {"newton"}
    torch.testing.assert_close(gains_of(out), gains_of("kept"), rtol=0, atol=2e-3)  # tokens are in another order
    assert [each.feed for each in load_kept(out).final].count(NESTED) == 1
    assert streamprobe(["evaluate", "both", "--split", "test", "--out", "both-evaluated"]) == 0
    assert Path("both-evaluated/results.csv").read_bytes() == Path("both/results.csv").read_bytes()


def test_without_the_joint_control_there_are_none() -> None:
    out = train("without", "--controls", "position", "--max_passes", "2")
    assert not any(row["gain_bits"] != "nan" for row in rows_of(out)) and "nested_passes" not in summary(out)
    assert "the control joint+chain was not trained (--controls)" in summary(out)["verdicts"][0]


def test_one_label_a_text_has_gains_but_no_verdict() -> None:
    """Where joint+chain would know the label of the text it is left out, and nested probes with it."""
    rows = [
        {"question": row["problem"], "answer": row["reasoning_chain"] + " lie" * (n % 2) * 5, "deceptive": bool(n % 2)}
        for n, row in enumerate(make_rows(60, seed=7))
    ]
    Path("pooled.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    out = train("pooled", "--data", "pooled.jsonl", "--labels", "deceptive", "--controls", "text", "joint+chain")
    assert not any(row["gain_bits"] != "nan" for row in rows_of(out))
    assert "every text is all inside or all outside" in summary(out)["verdicts"][0]


def test_chains_that_were_skipped_are_skipped_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "find_bad_chains", lambda chains, *_, **__: [c for c in chains if c.row in (3, 4, 5)])
    train("skipped", "--bad_chains", "skip")
    assert streamprobe(["evaluate", "skipped", "--split", "test", "--out", "skipped-evaluated"]) == 0
    assert Path("skipped-evaluated/results.csv").read_bytes() == Path("skipped/results.csv").read_bytes()
    assert not torch.equal(gains_of("skipped"), gains_of("kept"))
