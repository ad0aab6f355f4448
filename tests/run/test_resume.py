"""A run that is killed, damaged or found in another state than it was left in loses nothing and ends in a line."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import yaml
from finished import WRITTEN, results
from forked import forked

from streamprobe.cli import train as main
from streamprobe.run import pipeline
from streamprobe.run.checkpoint import STATE, Checkpoints, load_run, save_run
from streamprobe.run.folder import claim_folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, model_dir: str, chains_file: Path) -> Path:
    """A folder with the config of the smallest run, and that run, finished, in `killed`."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "chains.json").write_text(json.dumps(json.loads(chains_file.read_text())[:30]))
    keys = {
        "model": model_dir,
        "data": "chains.json",
        "dtype": "float32",
        "layers": [0, 1],
        "lags": [0, 4],
        "max_passes": 4,
        "bootstrap": 2,
        "controls": ["position"],
        "max_batch_tokens": 2048,
        "output_dir": "killed",
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(keys))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["tiny.yaml"]) == 0
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of all that, in the working directory; the folder of the run."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return Path("killed")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killer(name: str, after: bool) -> Callable[[], None]:
    """Lets a process die at its first write of the file `name`: when half of it is there, or once it is in place."""

    def prepare() -> None:
        replace = os.replace

        def deadly(part: Path, target: Path) -> None:
            hit = target.name == Path(name).name
            if hit and not after:
                os.truncate(part, part.stat().st_size // 2)
                die()
            replace(part, target)
            if hit:
                die()

        os.replace = deadly  # type: ignore[assignment]
        pipeline.Checkpoints = partial(Checkpoints, seconds=0.0)  # type: ignore[assignment,misc]  # as often as it may

    return prepare


def test_killed_before_and_after_every_write_it_ends_the_same(run: Path, tmp_path: Path) -> None:
    """One folder, whose run is killed at each write in turn and goes on from there to the next."""
    run.rename("straight")
    argv = ["tiny.yaml"]
    for name in WRITTEN:
        for after in (False, True):
            before = (run / name).exists()
            [done] = forked(argv, prepare=killer(name, after))
            assert done.status == -signal.SIGKILL, (name, after, done)
            assert (run / name).exists() == (after or before)
            argv = ["tiny.yaml", "--resume"]
    [done] = forked(argv)
    last = load_run(Path("straight"))
    assert last and done.status == 0 and f"resumed   after pass {last.passes}\n" in done.out
    assert results("killed") == results("straight")


def test_files_that_are_not_replaced_whole_differ_without_atomic_writes(run: Path) -> None:
    """Negative control: the comparison above sees half a file."""
    whole = results("killed")
    content = (run / "results.csv").read_bytes()
    (run / "results.csv").write_bytes(content[: len(content) // 2])
    assert results("killed") != whole


def untouched(run: Path) -> dict[str, bytes]:
    return {path.relative_to(run).as_posix(): path.read_bytes() for path in run.rglob("*") if path.is_file()}


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line with which a resume is refused."""
    capsys.readouterr()
    assert main(["tiny.yaml", "--resume", *argv]) == 2
    error = capsys.readouterr().err
    assert error.startswith("streamprobe: ") and error.count("\n") == 1
    return error


def test_a_finished_run_is_never_replaced_by_another(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With its checkpoint or without, under another config or its own."""
    before = untouched(run)
    assert "--resume with layers [1]" in refused(capsys, "--layers", "1")
    assert untouched(run) == before
    (run / STATE).unlink()
    del before[STATE]
    for argv in (["--layers", "1"], []):
        assert f"holds results but no {STATE}" in refused(capsys, *argv)
        assert untouched(run) == before
    (run / "config.yaml").unlink()
    assert f"holds results but no {STATE}" in refused(capsys)


def test_a_finished_run_is_replaced_without_the_check(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control: nothing else stands between it and another run."""
    before = untouched(run)
    (run / STATE).unlink()
    monkeypatch.setattr(pipeline, "find_shared_earlier", lambda config, folder: (pipeline.NOTHING, config))
    assert main(["tiny.yaml", "--resume", "--layers", "1"]) == 0
    assert (run / "results.csv").read_bytes() != before["results.csv"]


def test_a_run_without_a_checkpoint_starts_over_under_its_own_config_only(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in set(WRITTEN) - {"config.yaml"}:
        (run / name).unlink()
    assert "--resume with seed 5" in refused(capsys, "--seed", "5")
    kept = (run / "config.yaml").read_text()
    for content in (": [", "- a list", "\0"):
        (run / "config.yaml").write_text(content)
        assert "killed/config.yaml, which cannot be read" in refused(capsys)
    (run / "config.yaml").write_text(kept)
    assert main(["tiny.yaml", "--resume", "--max_passes", "1"]) == 0
    assert "starting at the first pass" in capsys.readouterr().out


def damaged(path: Path, how: str) -> None:
    content = path.read_bytes()
    path.unlink()
    if how == "folder":
        path.mkdir()
    elif how == "dangling link":
        path.symlink_to("nothing")
    else:
        flipped = bytearray(content)
        flipped[-5] ^= 0x10
        path.write_bytes({"truncated": content[:-1], "empty": b"", "garbage": b"x" * 999, "flipped": flipped}[how])


@pytest.mark.parametrize("how", ["truncated", "empty", "garbage", "flipped", "folder", "dangling link"])
def test_a_damaged_checkpoint_is_reported_and_nothing_is_written(
    run: Path, capsys: pytest.CaptureFixture[str], how: str
) -> None:
    damaged(run / STATE, how)
    before = untouched(run)
    assert STATE in refused(capsys)
    assert untouched(run) == before


@pytest.mark.parametrize("change", ["shape", "dtype", "name", "part"])
def test_a_checkpoint_of_other_probes_is_never_trained_on(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """Sealed as it should be, but not what this run would have written."""
    state = load_run(run)
    assert state
    part = state.states["newton-layers"]
    if change == "shape":
        part["best"] = part["best"][:1]  # which torch would broadcast
    elif change == "dtype":
        part["best"] = part["best"].float()
    elif change == "name":
        part["better"] = part.pop("best")
    else:
        del state.states["newton-layers"]
    save_run(run, state)
    before = untouched(run)
    monkeypatch.setattr(pipeline, "train", None)
    assert "a checkpoint with" in refused(capsys, "--max_passes", "3")
    assert untouched(run) == before


def test_a_folder_in_the_way_is_reported_before_the_data_are_read(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streamprobe.run.setup.read_texts", None)
    for name in WRITTEN:
        path = run / name
        content = path.read_bytes()
        path.unlink()
        for block in (path.mkdir, lambda p=path: os.mkfifo(p), lambda p=path: p.symlink_to("nothing")):
            block()
            assert f"{name} cannot be written" in refused(capsys) or name == STATE
            path.rmdir() if path.is_dir() else path.unlink()
        path.write_bytes(content)
        part = path.with_name(path.name + ".part")
        part.mkdir()
        assert f"{name} cannot be written" in refused(capsys)
        part.rmdir()
    shutil.rmtree(run / "checkpoint")
    (run / "checkpoint").write_text("")
    assert "checkpoint cannot be written (it is not a folder)" in refused(capsys)


def test_a_link_to_a_file_elsewhere_stays_one(run: Path, tmp_path: Path) -> None:
    """As of a checkpoint that lies on a larger disk."""
    before = results("killed")
    for name in (STATE, "report.html"):
        (run / name).rename(tmp_path / Path(name).name)
        (run / name).symlink_to(tmp_path / Path(name).name)
    (tmp_path / "report.html").write_text("old")
    assert main(["tiny.yaml", "--resume"]) == 0
    assert (run / STATE).is_symlink() and (run / "report.html").is_symlink()
    assert results("killed") == before


def test_a_resume_of_a_run_under_way_is_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = untouched(run)
    with claim_folder("killed", "tiny", resume=True):
        assert "--resume in killed, where a run is under way" in refused(capsys)
    assert untouched(run) == before


def test_a_single_probe_of_adams_runs_to_its_end(run: Path) -> None:
    """One layer and one column: tensors of a single row, with strides of their own."""
    one = ["--layers", "1", "--lags", "0", "--solvers", "adam", "--output_dir", "single"]
    assert main(["tiny.yaml", *one]) == 0
    assert main(["tiny.yaml", *one, "--resume"]) == 0


def test_a_run_on_other_data_than_its_configs_goes_on(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is left out of the config file once is left out again."""
    keys = yaml.safe_load(Path("tiny.yaml").read_text()) | {"data_sha256": "0" * 64, "problem_column": "question"}
    Path("own.yaml").write_text(yaml.safe_dump(keys))
    shutil.copy("chains.json", "mine.json")
    argv = ["own.yaml", "--data", "mine.json"]
    assert main([*argv, "--output_dir", "straight"]) == 0
    assert main([*argv, "--output_dir", "two", "--max_passes", "1"]) == 0
    assert main([*argv, "--output_dir", "two", "--resume"]) == 0
    assert "left out, since of the data that own.yaml names: data_sha256, problem_column" in capsys.readouterr().out
    assert Path("two/results.csv").read_bytes() == Path("straight/results.csv").read_bytes()
    kept = yaml.safe_load(Path("two/config.yaml").read_text())
    assert kept["data"] == "mine.json" and kept["data_sha256"] is None and kept["problem_column"] != "question"
    more = ["--output_dir", "two", "--resume"]
    assert main([*argv, *more, "--data_sha256", "1" * 64]) == 2  # negative control: another key is another run
    assert "--resume with data_sha256" in capsys.readouterr().err


def test_a_run_that_is_killed_on_other_data_goes_on(run: Path) -> None:
    """The checkpoint of the first pass is there, and nothing after it."""
    keys = yaml.safe_load(Path("tiny.yaml").read_text()) | {"data_sha256": "0" * 64}
    Path("own.yaml").write_text(yaml.safe_dump(keys))
    shutil.copy("chains.json", "mine.json")
    argv = ["own.yaml", "--data", "mine.json"]
    assert main([*argv, "--output_dir", "straight"]) == 0
    [done] = forked([*argv, "--output_dir", "two"], prepare=killer(STATE, after=True))
    assert done.status == -signal.SIGKILL
    assert not Path("two/results.csv").exists()
    assert main([*argv, "--output_dir", "two", "--resume"]) == 0
    assert Path("two/results.csv").read_bytes() == Path("straight/results.csv").read_bytes()
