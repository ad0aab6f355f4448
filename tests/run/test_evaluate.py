"""A run's probes on other data: on its own test chains they score as in its results, and what cannot be is one line."""

import csv
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from builders import make_rows
from safetensors import safe_open

from streamprobe.cli import main
from streamprobe.data.splits import split_chains
from streamprobe.probes import kept
from streamprobe.probes.kept import CONTROLS_FILE, load_kept
from streamprobe.probes.storage import pack_tensors
from streamprobe.run import reader

pytestmark = pytest.mark.usefixtures("undrawn")
SAME = ("results.csv", "differences.csv", "categories.csv", "reliability.csv", "curves.json", "transcripts.json")
KEYS = {
    "dtype": "float32",
    "layers": [0, 2],
    "lags": [0, 4],
    "labels": ["backtracking", "deduction"],
    "max_passes": 2,
    "seeds": 2,
    "seed": 3,
    "bootstrap": 5,
    "max_batch_tokens": 512,
}


def train(folder: Path, **keys: Any) -> Path:
    """The folder of a finished run."""
    (folder / "tiny.yaml").write_text(yaml.safe_dump(KEYS | keys))
    assert main(["train", str(folder / "tiny.yaml"), "--output_dir", str(folder / "run")]) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, model_dir: str, chains_file: Path) -> Path:
    """A run with all controls, two labels and two seeds."""
    return train(tmp_path_factory.mktemp("finished"), model=model_dir, data=str(chains_file))


@pytest.fixture
def run(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that run, in the working directory."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(finished, "run"))


def rows_of(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "results.csv").open()))


def write(rows: list[dict[str, Any]], name: str = "other.json") -> str:
    Path(name).write_text(json.dumps(rows), encoding="utf-8")
    return name


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """What `evaluate run ARGV` prints where it is refused in a line."""
    capsys.readouterr()
    assert main(["evaluate", "run", *argv]) == 2
    error = capsys.readouterr().err
    assert error.startswith("streamprobe: ") and error.count("\n") == 1
    assert error.count("; expected ") == error.count("; fix: ") == 1
    return error


def split_of(chains_file: Path) -> tuple[list[dict[str, str]], list[str]]:
    """The rows of the run's data and the split of each, by the function that the run uses."""
    rows = json.loads(chains_file.read_text())
    return rows, split_chains([row["problem"] for row in rows])


# --- the run's own test chains ---


def test_on_its_own_test_chains_everything_is_as_in_its_results(
    tmp_path: Path, model_dir: str, chains_file: Path
) -> None:
    """With every kind of column and both solvers."""
    keys = {"targets": ["token", "onset", "within"], "solvers": ["adam", "newton"], "lags": [-2, 0, 4]}
    run = train(tmp_path, model=model_dir, data=str(chains_file), **keys)
    assert main(["evaluate", str(run), "--split", "test"]) == 0
    for name in SAME:
        assert (run / "evaluations/test" / name).read_bytes() == (run / name).read_bytes(), name
    now, before = (json.loads((f / "summary.json").read_text()) for f in (run / "evaluations/test", run))
    assert now["results"] == before["results"] and now["run"]["verdicts"] == before["run"]["verdicts"]
    assert now["run"]["data_fingerprint"] == before["run"]["data_fingerprint"]


def test_its_own_data_may_lie_elsewhere_now(run: Path, chains_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump(config | {"data": "gone.json"}))
    assert "gone.json, which does not exist" in refused(capsys, "--split", "test")
    assert not (run / "evaluations").exists()
    shutil.copy(chains_file, "moved.json")
    assert main(["evaluate", "run", "--split", "test", "--data", "moved.json", "--out", "there"]) == 0
    assert Path("there/results.csv").read_bytes() == (run / "results.csv").read_bytes()
    other = write(make_rows(60, seed=8))
    assert "that of the chains of run; fix: give the run's own data" in refused(
        capsys, "--split", "test", "--data", other
    )


def change(run: Path, name: str, add: float) -> None:
    """Adds to a tensor of controls.safetensors."""
    path = run / CONTROLS_FILE
    with safe_open(path, framework="pt") as f:
        about, tensors = f.metadata()["streamprobe"], {name: f.get_tensor(name) for name in f.keys()}
    tensors[name] = tensors[name] + add
    path.write_bytes(pack_tensors(tensors, about))


@pytest.mark.parametrize(
    ("name", "field", "controls"),
    [
        ("newton.position.threshold", "f1", {"position"}),
        ("newton.embeddings.half", "f1_at_half", {"embed", "text"}),
        ("newton.joint+chain.threshold", "f1", {"joint+chain"}),
        ("words.mean", "auroc", {"text", "joint", "joint+chain"}),
    ],
)
def test_a_row_is_as_before_fails_without_what_was_kept(
    run: Path, name: str, field: str, controls: set[str], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """And rows of other controls stay as they are; without the patch such a file is refused."""
    with safe_open(run / CONTROLS_FILE, framework="pt") as f:
        known = json.loads(f.metadata()["streamprobe"])["sha256"]
    if name == "words.mean":  # the words of a chain all move alike, but not those of directions that are turned
        with safe_open(run / CONTROLS_FILE, framework="pt") as f:
            about, tensors = f.metadata()["streamprobe"], {key: f.get_tensor(key) for key in f.keys()}
        tensors["words.directions"] = tensors["words.directions"].flip(1).clone()
        (run / CONTROLS_FILE).write_bytes(pack_tensors(tensors, about))
    else:
        change(run, name, 1.5)
    assert "not as it was written" in refused(capsys, "--split", "test")
    monkeypatch.setattr(kept, "_digest", lambda *_: known)
    assert main(["evaluate", "run", "--split", "test"]) == 0
    pairs = zip(rows_of(run), rows_of(run / "evaluations/test"), strict=True)
    assert {before["control"] for before, now in pairs if before[field] != now[field]} == controls


def test_permuted_labels_are_as_before_fails_without_the_seed_of_the_run(run: Path) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump(config | {"seed": 4}))
    assert main(["evaluate", "run", "--split", "test"]) == 0
    pairs = zip(rows_of(run), rows_of(run / "evaluations/test"), strict=True)
    assert {before["control"] for before, now in pairs if before["auroc"] != now["auroc"]} == {"permuted"}


@pytest.mark.parametrize("keys", [{}, {"controls": ["none"], "seeds": 1, "solvers": ["newton"]}])
def test_chains_that_were_skipped_are_skipped_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_dir: str, chains_file: Path, keys: dict[str, Any]
) -> None:
    """A training chain among them, which moves the labels that are drawn for all behind it."""
    monkeypatch.setattr(reader, "find_bad_chains", lambda chains, *_, **__: [c for c in chains if c.row in bad])
    rows, splits = split_of(chains_file)
    bad = {splits.index("train"), splits.index("test")}
    run = train(tmp_path, model=model_dir, data=str(chains_file), bad_chains="skip", **keys)
    assert main(["evaluate", str(run), "--split", "test"]) == 0
    assert (run / "evaluations/test/results.csv").read_bytes() == (run / "results.csv").read_bytes()
    assert int(rows_of(run)[0]["n_chains"]) == splits.count("test") - 1


# --- other data ---


def numbers(row: dict[str, str]) -> list[float]:
    names = ("auroc", "average_precision", "f1", "threshold", "f1_at_half", "brier", "n_tokens", "n_positive")
    return [float(row[name]) for name in names]


def test_the_same_chains_in_another_file_score_the_same(
    run: Path, chains_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All of them, whatever the split of the run; permuted labels are drawn anew, with other positives at the ends."""
    rows, splits = split_of(chains_file)
    other = write([row for row, split in zip(rows, splits, strict=True) if split == "test"])
    assert main(["evaluate", "run", "--data", other]) == 0
    assert "overlap" not in capsys.readouterr().out
    now = rows_of(run / "evaluations/other")
    for before, after in zip(rows_of(run), now, strict=True):
        if before["control"] != "permuted":
            assert numbers(after) == pytest.approx(numbers(before), abs=1e-5, nan_ok=True)
    assert any(a["auroc"] != b["auroc"] for a, b in zip(now, rows_of(run), strict=True) if a["control"] == "permuted")


def test_joint_controls_are_given_the_labels_of_the_run(run: Path, chains_file: Path) -> None:
    """Whichever other labels the data have, and in whichever order they would come there."""
    rows, splits = split_of(chains_file)
    known = load_kept(run).section_labels
    assert list(known[:2]) == KEYS["labels"] and len(known) > 2
    other = write([row for row, split in zip(rows, splits, strict=True) if split == "test"])
    for row in rows:  # a label that only other texts have, and that most of them have
        row["annotated_chain"] += '["musing"] hm["end-section"]'
        row["reasoning_chain"] += " hm"
    more = write([row for row, split in zip(rows, splits, strict=True) if split == "test"], "more.json")
    for data in (other, more):
        assert main(["evaluate", "run", "--data", data]) == 0
    for before, now in zip(rows_of(run / "evaluations/other"), rows_of(run / "evaluations/more"), strict=True):
        if before["control"].startswith("joint") and before["target"] == "token":
            assert float(now["auroc"]) == pytest.approx(float(before["auroc"]), abs=0.05)


def test_the_same_chains_score_the_same_fails_without_their_labels(run: Path, chains_file: Path) -> None:
    rows, splits = split_of(chains_file)
    swapped = {"backtracking": "deduction", "deduction": "backtracking"}
    for row in rows:
        for old, new in swapped.items():
            row["annotated_chain"] = row["annotated_chain"].replace(f'["{old}"]', f'["{new}."]')
        row["annotated_chain"] = row["annotated_chain"].replace('."]', '"]')
    other = write([row for row, split in zip(rows, splits, strict=True) if split == "test"])
    assert main(["evaluate", "run", "--data", other]) == 0
    pairs = zip(rows_of(run), rows_of(run / "evaluations/other"), strict=True)
    real = [(float(a["auroc"]), float(b["auroc"])) for a, b in pairs if not a["control"]]
    assert all(a != pytest.approx(b, abs=0.01) for a, b in real)


def test_chains_that_the_run_has_seen_are_counted(
    run: Path, chains_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of training and validation, whatever their white space; a file of test chains has none (see above)."""
    rows, splits = split_of(chains_file)
    rows = [row | {"problem": f"\n{row['problem']} "} for row in rows]
    assert main(["evaluate", "run", "--data", write(rows), "--out", "seen"]) == 0
    n = splits.count("train") + splits.count("validation")
    assert f"overlap   {n} of 60 chains have a problem" in capsys.readouterr().out
    assert json.loads(Path("seen/summary.json").read_text())["run"]["chains_seen"] == n


def test_each_evaluation_has_a_folder_of_its_own_with_a_page(drawn: None, run: Path) -> None:
    other = write(make_rows(20, seed=5), "two words (ü).json")
    for _ in range(2):
        assert main(["evaluate", "run", "--data", other]) == 0
    first, second = run / "evaluations/two-words-ü", run / "evaluations/two-words-ü-2"
    assert {path.name for path in first.iterdir()} == {*SAME, "summary.json", "report.html"}
    for name in SAME:
        assert (first / name).read_bytes() == (second / name).read_bytes()
    page = (first / "report.html").read_bytes()
    assert b"<h1>run on two-words-" in page
    assert main(["report", str(first)]) == 0 and (first / "report.html").read_bytes() == page


def test_keys_of_the_runs_own_data_are_not_those_of_others(
    tmp_path: Path, model_dir: str, chains_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Its columns, its checksum, its names of labels and its choice of chains; the prompt stays."""
    monkeypatch.chdir(tmp_path)
    rows = json.loads(chains_file.read_text())
    own = [{"q": row["problem"], "name": row["task_id"], "a": row["reasoning_chain"]} for row in rows]
    for row, given in zip(own, rows, strict=True):
        row["tags"] = given["annotated_chain"].replace('["backtracking"]', '["Turn"]')
    columns = {"problem_column": "q", "id_column": "name", "response_column": "a", "annotation_column": "tags"}
    names = {"label_names": ["Turn=backtracking"], "max_chains": 50, "prompt": "Q: {problem} A: "}
    keys = {"solvers": ["newton"], "seeds": 1, "controls": ["none"], **columns, **names}
    train(tmp_path, model=model_dir, data=write(own, "own.json"), **keys)
    assert main(["evaluate", "run", "--split", "test"]) == 0
    assert Path("run/evaluations/test/results.csv").read_bytes() == Path("run/results.csv").read_bytes()
    assert main(["evaluate", "run", "--data", str(chains_file), "--out", "plain"]) == 0
    given = [word for name, value in columns.items() for word in (f"--{name}", value)]
    argv = ["evaluate", "run", "--data", "own.json", "--out", "given", "--label_names", "Turn=backtracking", *given]
    assert main(argv) == 0
    assert Path("plain/results.csv").read_bytes() == Path("given/results.csv").read_bytes()
    config = json.loads(Path("plain/summary.json").read_text())["run"]["config"]
    assert config["prompt"] == names["prompt"] and config["max_chains"] is config["label_names"] is None
    assert "of which annotated is the nearest: it lacks the text" in refused(capsys, "--data", "own.json")


def test_a_label_that_the_data_never_have_is_a_line_and_rows_of_nan(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = make_rows(20, seed=5)
    for row in rows:
        row["annotated_chain"] = row["annotated_chain"].replace('["backtracking"]', '["musing"]')
    assert main(["evaluate", "run", "--data", write(rows)]) == 0
    said = capsys.readouterr().out
    assert "label     'backtracking' never occurs (the data's labels: deduction, " in said
    assert "nan       2 of 4 columns lack a class here" in said
    for row in rows_of(run / "evaluations/other"):
        assert math.isnan(float(row["auroc"])) == (row["label"] == "backtracking")
        assert row["label"] != "backtracking" or row["n_positive"] == "0"


# --- what is refused ---


def test_data_on_which_nothing_can_be_judged_are_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = make_rows(5, seed=5)
    for row in rows:
        row["annotated_chain"] = row["annotated_chain"].replace('["backtracking"]', '["a"]').replace("deduction", "b")
    error = refused(capsys, "--data", write(rows))
    assert "no probe can be judged" in error and "(the data's labels: b, " in error and "--label_names" in error
    for row in rows:
        row["reasoning_chain"] = ""
    assert "without a chain that can be used (5 refused: 5 with an empty response" in refused(
        capsys, "--data", write(rows)
    )
    assert "with no rows" in refused(capsys, "--data", write([]))
    assert "gone.json, which does not exist" in refused(capsys, "--data", "gone.json")
    assert "nothing to judge on" in refused(capsys)
    assert "nothing to judge on" in refused(capsys, "--data", "")
    assert not (run / "evaluations").exists()


def test_nothing_is_written_over(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    error = refused(capsys, "--split", "test", "--out", "run")
    assert "out 'run'; expected a folder outside of the run" in error
    for inside in ("run/checkpoint", ""):
        assert f"out {inside!r}; expected" in refused(capsys, "--split", "test", "--out", inside)
    Path("file").write_text("")
    assert "out file, which is a file" in refused(capsys, "--split", "test", "--out", "file")
    assert main(["evaluate", "run", "--split", "test", "--out", "once"]) == 0
    assert "out once, which holds a run" in refused(capsys, "--split", "test", "--out", "once")
    assert {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()} == before


def test_a_run_that_is_not_finished_or_from_before_is_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / CONTROLS_FILE).rename("kept")
    assert f"run, a run without {CONTROLS_FILE}" in refused(capsys, "--split", "test")
    Path("kept").rename(run / CONTROLS_FILE)
    (run / "probes.safetensors").unlink()
    assert "let it finish: --resume" in refused(capsys, "--split", "test")


def test_results_that_are_not_of_the_probes_are_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = run / "results.csv"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if not line.startswith("newton,linear,resid_post,2,")))
    assert "which is not of the probes of this run" in refused(capsys, "--split", "test")
    path.unlink()
    assert "results.csv" in refused(capsys, "--split", "test")


def test_another_model_is_refused_or_said(
    run: Path, model_dir: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(model_dir), AutoTokenizer.from_pretrained(model_dir)
    for name, changes in {
        "wide": {"hidden_size": 64},
        "flat": {"num_hidden_layers": 2},
        "other": {},
    }.items():
        torch.manual_seed(9)
        config = type(model.config)(**model.config.to_dict() | changes)
        type(model)(config).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    argv = ["--split", "test", "--model"]
    assert "probes of 32 features and a model of hidden size 64" in refused(capsys, *argv, "wide")
    assert "layer" in refused(capsys, *argv, "flat")
    assert "gone" in refused(capsys, *argv, "gone")
    assert main(["evaluate", "run", *argv, "other"]) == 0
    assert "model     its weights, or their number format, are not those" in capsys.readouterr().out
    assert main(["evaluate", "run", "--split", "test", "--out", "same"]) == 0
    assert "its weights" not in capsys.readouterr().out


def test_a_config_that_is_not_the_runs_is_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())
    for change in ({"controls": ["none"]}, {"controls": ["permuted"]}, {"layers": [0, 1]}, {"seeds": 1}):
        (run / "config.yaml").write_text(yaml.safe_dump(config | change))
        assert "config.yaml" in refused(capsys, "--split", "test"), change
    (run / "config.yaml").write_text(yaml.safe_dump(config | {"labels": ["deduction"]}))
    assert "config.yaml" in refused(capsys, "--data", config["data"])
    (run / "config.yaml").write_text(yaml.safe_dump(config | {"trust_remote_code": True}))
    assert "--trust_remote_code" in refused(capsys, "--split", "test")
