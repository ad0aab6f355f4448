"""What goes wrong in a stream is counted, named and told in a line, and ends it only where it must."""

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from builders import make_rows
from launched import launched
from streamed import counts_of, distance, probes_of, standing_of, write_config, write_lines
from test_not_finite import BAD
from test_not_finite import overflowing as overflowing_model

from streamprobe.cli import train as main
from streamprobe.reporting import files
from streamprobe.reporting.tracking import event_file
from streamprobe.run import checkpoint
from streamprobe.run.checkpoint import STATE, Checkpoints
from streamprobe.run.streaming import loop
from streamprobe.system.files import unwritable

pytestmark = pytest.mark.usefixtures("undrawn")
overflowing = overflowing_model  # a fixture
NOT_FINITE = "with activations that are infinite or not numbers"
Read = pytest.CaptureFixture[str]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def plain_rows(n: int, seed: int = 3) -> list[dict[str, str]]:
    """Chains in which the label never comes."""
    return [
        {name: text.replace("backtracking", "deduction") for name, text in row.items()} | {"task_id": f"plain {i}"}
        for i, row in enumerate(make_rows(n, seed))
    ]


def refused(capsys: Read, *argv: str) -> str:
    """The one line with which a launch ends."""
    capsys.readouterr()
    assert main([*argv, "--output_dir", "run"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("streamprobe: ") and error.count("\n") == 1, error
    return error


# --- records that cannot be used ---


def test_corrupt_records_are_counted_and_named_and_the_others_are_used(
    folder: Path, model_dir: str, capsys: Read
) -> None:
    rows: list[Any] = make_rows(60, seed=7)
    config = write_config(folder, model_dir, rows)
    assert main([config, "--output_dir", "whole"]) == 0
    corrupt = [*rows[:20], '{"task_id": "half', *rows[20:40], "[1, 2]", rows[40] | {"reasoning_chain": ""}, *rows[41:]]
    write_lines(folder / "chains.jsonl", corrupt)
    capsys.readouterr()
    assert main([config, "--output_dir", "run"]) == 0
    shown, counts = capsys.readouterr().out, counts_of("run")
    assert (counts["read"], counts["used"]) == (62, 59)
    named = [name for names in counts["refused"].values() for name in names]
    assert set(named) == {"chains.jsonl:21", "chains.jsonl:42", rows[40]["task_id"]}
    for name in named:
        assert name in shown.split("report    at")[1]
    assert counts_of("whole")["refused"] == {}


def test_a_chain_that_is_no_number_is_left_out_or_ends_the_stream(
    folder: Path, model_dir: str, overflowing: str, capsys: Read
) -> None:
    """Wherever it comes: refused at once where it trains, and at the report where it judges."""
    rows = make_rows(60, seed=7)
    bad = [dict(row) for row in rows]
    for name in ("reasoning_chain", "annotated_chain"):
        for row in bad[30:50]:
            row[name] = f"one two {BAD} {row[name]}"
    config = write_config(folder, overflowing, bad)
    told = refused(capsys, config)
    assert "activations that are infinite or not numbers: chain '" in told and "--bad_chains skip" in told
    assert told.split("'")[1] in {row["task_id"] for row in bad[30:50]}
    before = standing_of("run")
    assert 0 < before["rounds"] and before["counts"]["used"] <= 30
    assert main([config, "--output_dir", "run", "--resume", "--bad_chains", "skip"]) == 0
    assert NOT_FINITE in capsys.readouterr().out
    counts = counts_of("run")
    assert counts["used"] == 40 and len(counts["refused"][NOT_FINITE]) == 20
    write_lines(
        folder / "chains.jsonl", [*rows[:30], *[row | {"reasoning_chain": ""} for row in rows[30:50]], *rows[50:]]
    )
    assert main([config, "--output_dir", "without"]) == 0
    assert distance("run", "without") < 1e-6
    write_lines(folder / "chains.jsonl", bad)
    every = launched([config, "--output_dir", "two", "--bad_chains", "skip"], 2)
    assert [done.status for done in every] == [0, 0], every
    assert counts_of("two") == counts and distance("two", "run") < 1e-5


def test_a_test_chain_that_is_no_number_ends_the_stream_at_a_report(
    folder: Path, overflowing: str, capsys: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streamprobe.run.streaming.rounds.split_of", split_by_number)
    rows = make_rows(60, seed=7)
    rows[2] |= {name: f"one {BAD} {rows[2][name]}" for name in ("reasoning_chain", "annotated_chain")}
    keys = (
        "--report_tokens 2000 --split_by chain --reservoir_tokens 100000 --test_tokens 100000".split()
    )  # all are kept
    told = refused(capsys, write_config(folder, overflowing, rows), *keys)
    assert f"chain '{rows[2]['task_id']}'" in told and "--bad_chains skip" in told


def split_by_number(name: str, **_: Any) -> str:
    """A third of the chains for each split, by their names."""
    return ("train", "validation", "test")[[row["task_id"] for row in make_rows(60, seed=7)].index(name) % 3]


# --- a disk that is full ---


def full(path: Path, *_: Any) -> None:
    raise unwritable(path, OSError(errno.ENOSPC, "No space left on device"))


def failing(work: Callable[..., Any], calls: range) -> Callable[..., Any]:
    """A function whose calls of these numbers find the disk full."""
    number = iter(range(10**9))
    return lambda *args: (full if next(number) in calls else work)(*args)


def test_a_full_disk_stops_nothing_but_the_writing(
    folder: Path, model_dir: str, capsys: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_config(folder, model_dir, 120)
    more = ["--report_tokens", "4000", "--report_to", "tensorboard"]
    assert main([config, "--output_dir", "straight", *more]) == 0
    capsys.readouterr()
    monkeypatch.setattr(loop, "Checkpoints", lambda folder: Checkpoints(folder, seconds=0.0))
    monkeypatch.setattr(checkpoint, "write_atomic", failing(checkpoint.write_atomic, range(1, 3)))
    monkeypatch.setattr(files, "write_atomic", failing(files.write_atomic, range(3, 4)))
    flush = event_file.EventFile.flush
    monkeypatch.setattr(event_file.EventFile, "flush", failing(flush, range(3, 5)))
    assert main([config, "--output_dir", "run", *more]) == 0
    done = capsys.readouterr()
    assert done.err == "" and done.out.count("disk      checkpoint not written, the stream goes on: ") == 2
    assert done.out.count("disk      curves not written, the stream goes on: ") == 2
    assert done.out.count("disk      report not written, the stream goes on: ") == 1
    assert "No space left on device" in done.out
    assert probes_of("run") == probes_of("straight") and Path("run", STATE).exists()


def test_a_full_disk_at_the_very_end_is_an_error_and_resume_ends_it(
    folder: Path, model_dir: str, capsys: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_config(folder, model_dir, 40)
    with monkeypatch.context() as patch:
        patch.setattr(files, "write_atomic", full)
        assert "No space left on device" in refused(capsys, config)
    assert main([config, "--output_dir", "run", "--resume"]) == 0
    assert main([config, "--output_dir", "straight"]) == 0
    assert probes_of("run") == probes_of("straight")


# --- chains that do not suffice ---


def test_a_report_that_comes_too_early_is_left_out(folder: Path, model_dir: str, capsys: Read) -> None:
    """The label comes only in the second half; all controls are judged in the end."""
    rows = [*plain_rows(60), *make_rows(60, seed=7)]
    names = ["position", "persistence", "joint", "joint+chain"]
    config = write_config(folder, model_dir, rows, controls=names, reservoir_tokens=10**6, test_tokens=10**6)
    assert main([config, "--output_dir", "run", "--report_tokens", "3000"]) == 0
    done = capsys.readouterr()
    assert "report    left out, the stream goes on: label 'backtracking', which never occurs" in done.out
    assert done.out.count("report    at ") > 2 and done.err == ""
    assert all(f"\n{name} " in done.out for name in names)
    reached = standing_of("run")
    assert reached["reports"] >= 2 and reached["controls"] == names


def test_a_stream_without_both_classes_is_an_error_at_its_end(folder: Path, model_dir: str, capsys: Read) -> None:
    told = refused(capsys, write_config(folder, model_dir, plain_rows(80)), "--report_tokens", "3000")
    assert "label 'backtracking', which never occurs" in told
    assert not Path("run/results.csv").exists()


@pytest.mark.parametrize(
    "rows, said",
    [
        ([], "chains.jsonl with no rows; "),
        ([{"a": 1}, {"a": 2}], "with the columns 'a'; expected those of one of the formats "),
        ([row | {"reasoning_chain": ""} for row in make_rows(5)], "no train chains (5 chains refused: 5 with an empty"),
        (["no json"] * 3, "whose first rows cannot be read (chains.jsonl:1"),
    ],
)
def test_a_stream_of_no_use_is_refused_in_a_line(
    rows: list[Any], said: str, folder: Path, model_dir: str, capsys: Read
) -> None:
    told = refused(capsys, write_config(folder, model_dir, rows))
    assert said in told, told
    assert not Path("run").exists()


# --- keys that do not go together ---


@pytest.mark.parametrize(
    "argv",
    [
        ["--folds", "3"],
        ["--split", "category", "--test_categories", "alpha"],
        ["--max_chains", "9"],
        ["--data_sha256", "0" * 64],
        ["--round_tokens", "9"],
        ["--max_tokens", "0"],
        ["--wait_seconds", "-1"],
        ["--streaming", "maybe"],
    ],
)
def test_keys_that_need_all_chains_first_are_refused(
    argv: list[str], folder: Path, model_dir: str, capsys: Read
) -> None:
    told = refused(capsys, write_config(folder, model_dir, 9), *argv)
    assert argv[0].strip("-").split("_")[0] in told


def test_resume_with_other_keys_is_refused_and_with_more_tokens_goes_on(
    folder: Path, model_dir: str, capsys: Read
) -> None:
    config = write_config(folder, model_dir, 60)
    assert main([config, "--output_dir", "run", "--max_tokens", "3000"]) == 0
    kept = standing_of("run")
    assert 3000 <= kept["tokens"] < 3300
    others = ("--round_tokens", "2048"), ("--reservoir_tokens", "9000"), ("--streaming", "false"), ("--layers", "2")
    for argv in others:
        assert f"--resume with {argv[0][2:]} " in refused(capsys, config, "--resume", *argv)
    write_lines(folder / "chains.jsonl", make_rows(60, seed=8))
    assert "which is another file than before" in refused(capsys, config, "--resume")
    write_lines(folder / "chains.jsonl", make_rows(60, seed=7))
    assert main([config, "--output_dir", "run", "--resume"]) == 0
    assert counts_of("run")["used"] == 60 and standing_of("run")["tokens"] > kept["tokens"]


def test_a_dry_run_shows_the_first_round_and_writes_nothing(folder: Path, model_dir: str, capsys: Read) -> None:
    config = write_config(folder, model_dir, 60)
    assert main([config, "--output_dir", "run", "--dry_run"]) == 0
    shown = capsys.readouterr().out
    assert "chains    1" in shown and "example   'alpha_0'" in shown and not Path("run").exists()
