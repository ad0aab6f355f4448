"""Where a run writes: two at once, folders that cannot be written to, full disks, and files that the user names."""

import errno
import fcntl
import json
import os
import resource
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from forked import Done, forked
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from streamprobe import cli
from streamprobe.cli import train as main
from streamprobe.commands import shared
from streamprobe.errors import InputError
from streamprobe.reporting.tracking import event_file
from streamprobe.reporting.tracking.tensorboard import TensorBoard
from streamprobe.reporting.tracking.tracker import Tracker
from streamprobe.run import folder, pipeline
from streamprobe.run.checkpoint import STATE, load_run
from streamprobe.run.folder import LOCK, claim_folder, file_names
from streamprobe.system import files


@pytest.fixture
def config(tmp_path: Path, model_dir: str, chains_file: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A config of the smallest run, in the working directory."""
    monkeypatch.chdir(tmp_path)
    Path("chains.json").write_text(json.dumps(json.loads(chains_file.read_text())[:30]))
    keys = {
        "model": model_dir,
        "data": str(tmp_path / "chains.json"),
        "dtype": "float32",
        "layers": [0],
        "lags": [0, 4],
        "max_passes": 2,
        "bootstrap": 2,
        "controls": ["none"],
    }
    Path("tiny.yaml").write_text(yaml.safe_dump(keys))
    return str(tmp_path / "tiny.yaml")


def results(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in ("results.csv", "probes.safetensors", "transcripts.json")]


def listed(folder: str | Path = ".") -> set[str]:
    return {path.relative_to(folder).as_posix() for path in Path(folder).rglob("*")}


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line with which a run is refused, before anything is read or left behind."""
    before = listed()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("streamprobe.run.setup.read_texts", None)
        assert main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("streamprobe: ") and error.count("\n") == 1
    assert listed() == before
    return error


# Two at once


def test_runs_that_start_at_once_each_get_a_folder(config: str, tmp_path: Path) -> None:
    done = forked(*[[config]] * 4)
    assert [each.status for each in done] == [0] * 4, done
    folders = sorted(Path("runs").iterdir())
    assert [path.name for path in folders] == ["tiny", "tiny-2", "tiny-3", "tiny-4"]
    assert all(results(path) == results(folders[0]) and not (path / LOCK).exists() for path in folders)


def test_of_runs_into_one_folder_a_single_one_runs(config: str, tmp_path: Path) -> None:
    done = forked(*[[config, "--output_dir", "a/b/out"]] * 4)
    assert sorted(each.status for each in done) == [0, 2, 2, 2]
    lines = [each.line for each in done if each.status]
    assert all("a run is under way" in line or "which holds a run" in line for line in lines)
    assert (Path("a/b/out") / "results.csv").exists()


def test_a_claimed_folder_is_nobody_elses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with claim_folder(None, "x", False) as first, claim_folder(None, "x", False) as second:
        assert (first, second) == (Path("runs/x"), Path("runs/x-2"))
        for resume, given in ((False, "runs/x"), (True, "runs/x"), (True, None)):
            with pytest.raises(InputError, match="where a run is under way"), claim_folder(given, "x", resume):
                pass
        (first / "config.yaml").touch()
        (second / "config.yaml").touch()
    with claim_folder(None, "x", True) as newest, claim_folder(None, "x", False) as third:
        assert (newest, third) == (second, Path("runs/x-3"))
    assert listed("runs") == {"x", "x/config.yaml", "x-2", "x-2/config.yaml"}, "no lock, and nothing of the third"


def test_two_claim_one_folder_without_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(files, "lock", lambda path: None)
    with claim_folder(None, "x", False) as first, claim_folder(None, "x", False) as second:
        assert first == second


def claim_often(number: int, times: int) -> int:
    """Claims the same default folder over and over, now writing a run, now refused; returns 0 if it was always alone."""
    for i in range(times):
        try:
            with claim_folder(None, "x", False) as claimed:
                alone = os.open(claimed / "alone", os.O_CREAT | os.O_EXCL)  # fails if somebody else is in there
                os.close(alone)
                if (i + number) % 3 == 0:
                    (claimed / "config.yaml").write_text(str(number))
                os.unlink(claimed / "alone")
        except (OSError, InputError) as error:
            print(repr(error))
            return 1
    return 0


def test_claims_that_come_and_go_at_once_never_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pids = []
    for number in range(6):
        pids.append(os.fork())
        if not pids[-1]:
            os._exit(claim_often(number, 30))
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0] * 6
    written = sorted(path.name for path in Path("runs").iterdir() if (path / "config.yaml").exists())
    assert len(written) == 6 * 10
    assert not [path for path in Path("runs").rglob("*") if path.name in ("alone", LOCK)]


def test_a_killed_run_leaves_no_lock_that_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pid = os.fork()
    if not pid:
        claim = folder._claim(Path("out"))
        os.kill(os.getpid(), 9 if claim and (Path("out") / LOCK).exists() else 1)
    assert os.waitpid(pid, 0)[1] == 9 and (Path("out") / LOCK).exists()
    with claim_folder("out", "x", False) as again:
        assert again == Path("out")


@pytest.mark.parametrize("number", sorted(files.NO_LOCKS))
def test_without_locks_a_run_goes_on_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int
) -> None:
    def flock(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fcntl, "flock", flock)
    with claim_folder(None, "x", False) as claimed:
        assert claimed == Path("runs/x")
    assert "file system without locks" in capsys.readouterr().out and not listed()


def test_a_refused_run_leaves_nothing_behind(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("broken.json").write_text("{")
    Path("mine").mkdir()
    Path("mine/notes.txt").touch()
    before = listed()
    for argv in ([], ["--output_dir", "a/b"], ["--output_dir", "mine"], ["--resume"]):
        assert main([config, "--data", "broken.json", *argv]) == 2
        assert listed() == before


# Folders that cannot be written to

LONG = "/".join(["d" * 200] * 25)


@pytest.mark.parametrize(
    "given",
    [
        "/proc/x",
        "/sys/x",
        "/proc",
        "/dev/null",
        "/dev/null/x",
        "n" * 300,
        LONG,
        "dangling",
        "dangling/x",
        "loop",
        "loop/x",
        "tiny.yaml",
        "tiny.yaml/x",
    ],
)
def test_a_folder_that_cannot_be_is_refused_before_the_data_are_read(
    config: str, capsys: pytest.CaptureFixture[str], given: str
) -> None:
    Path("dangling").symlink_to("nowhere")
    Path("loop").symlink_to("loop")
    assert f"output_dir {given}" in refused(capsys, config, "--output_dir", given)
    assert "runs/tiny" in refused_with_runs_in_the_way(capsys, config)


def refused_with_runs_in_the_way(capsys: pytest.CaptureFixture[str], config: str) -> str:
    Path("runs").write_text("")
    try:
        return refused(capsys, config)
    finally:
        Path("runs").unlink()


def test_a_null_byte_in_a_folders_name_is_refused(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("null.yaml").write_text('output_dir: "a\\0b"\n' + Path(config).read_text())
    assert "null byte" in refused(capsys, "null.yaml")


def test_names_that_are_too_long_in_a_folder_that_is_not_are_refused(
    config: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A folder whose path leaves room for config.yaml, and not for the longer names."""
    deep = tmp_path
    while len(str(deep)) < 4000:
        deep = deep / ("d" * min(200, 4060 - len(str(deep))))
    for size in (4060, 4075):
        given = deep.with_name("d" * (len(deep.name) + size - len(str(deep))))
        assert "File name too long" in refused(capsys, config, "--output_dir", str(given))


def test_a_folder_of_part_files_in_the_way_is_refused(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    for name in file_names():
        shutil.rmtree("out", ignore_errors=True)
        Path(f"out/{name}.part").mkdir(parents=True)
        assert f"{name} cannot be written (" in refused(capsys, config, "--output_dir", "out")


def test_a_file_for_the_checkpoints_folder_and_what_cannot_be_a_lock_are_refused(
    config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("out").mkdir()
    Path("out/checkpoint").write_text("")
    assert "checkpoint cannot be written" in refused(capsys, config, "--output_dir", "out")
    Path("out/checkpoint").unlink()
    (Path("out") / LOCK).mkdir()
    assert "Is a directory" in refused(capsys, config, "--output_dir", "out")
    (Path("out") / LOCK).rmdir()
    Path("precious").write_text("precious")
    (Path("out") / LOCK).symlink_to("../precious")
    assert "output_dir out" in refused(capsys, config, "--output_dir", "out")
    assert Path("precious").read_text() == "precious"


def test_a_part_file_is_replaced_and_never_written_through(tmp_path: Path) -> None:
    """Of a killed process, or a link that somebody put there."""
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "results.csv.part").symlink_to("precious")
    files.write_atomic(tmp_path / "results.csv", b"new")
    assert (tmp_path / "precious").read_text() == "precious" and (tmp_path / "results.csv").read_bytes() == b"new"
    assert not (tmp_path / "results.csv").is_symlink() and len(listed(tmp_path)) == 2


def unprivileged() -> None:
    """Becomes nobody, where this is the superuser, whom no mode of a folder stops."""
    if os.geteuid() == 0:
        os.setgid(65534)
        os.setuid(65534)


@pytest.fixture
def public(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder, the working directory, that everybody may read and nobody write to."""
    made = Path(tempfile.mkdtemp(prefix="streamprobe-"))
    monkeypatch.chdir(made)
    made.chmod(0o555)
    yield made
    made.chmod(0o755)
    shutil.rmtree(made)


def test_a_read_only_working_directory_or_folder_is_refused(config: str, public: Path, tmp_path: Path) -> None:
    claims = [(None, "runs/tiny"), ("x", "x"), (".", ".")]
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        unprivileged()
        for given, _ in claims:
            try:
                with claim_folder(given, "tiny", False):
                    os.write(write, b"claimed\n")
            except InputError as error:
                os.write(write, f"{error}\n".encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        lines = pipe.read().splitlines()
    assert os.waitpid(pid, 0)[1] == 0 and len(lines) == len(claims)
    for (_, name), line in zip(claims, lines, strict=True):
        assert line.startswith(f"output_dir {name}, which cannot be made or written to (Permission denied)")


def test_a_working_directory_that_is_gone_is_reported(config: str, tmp_path: Path) -> None:
    def leave() -> None:
        Path("gone").mkdir()
        os.chdir("gone")
        os.rmdir("../gone")

    for more in ([], ["--output_dir", str(tmp_path / "out")]):
        [done] = forked([config, *more], prepare=leave)
        assert "a working directory that is gone" in done.line
    assert not (tmp_path / "out").exists()


# Room


def test_too_little_room_is_reported_before_training(
    config: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main([config, "--output_dir", "out"]) == 0
    state, real = load_run(Path("out")), shutil.disk_usage(".")
    assert state
    size = sum(tensor.nbytes for part in state.states.values() for tensor in part.values())
    monkeypatch.setattr(pipeline, "train", None)
    for free in (0, size, 2 * size):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: real._replace(free=free))
        assert main([config, "--output_dir", "new"]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "free on the disk of new" in error and not Path("new").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: real._replace(free=3 * size))
    with pytest.raises(TypeError):  # negative control: it trains where there is room
        main([config, "--output_dir", "new"])


def limited(bytes_: int) -> Any:
    def prepare() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    return prepare


def goes_on(done: Done, straight: Path, config: str, folder: str = "out") -> None:
    """The run ended in a line, left no part of a file, and `--resume` ends as if nothing had been."""
    assert "make room" in done.line
    assert not [name for name in listed(folder) if name.endswith(".part")]
    assert main([config, "--output_dir", folder, "--resume"]) == 0
    assert results(Path(folder)) == results(straight)


def test_a_file_size_limit_ends_in_a_line_and_resume_goes_on(config: str, tmp_path: Path) -> None:
    keys = yaml.safe_load(Path(config).read_text())
    # With so many lags a checkpoint is larger than config.yaml, which is written first.
    Path(config).write_text(yaml.safe_dump({**keys, "lags": list(range(-8, 9))}))
    assert main([config, "--output_dir", "straight"]) == 0
    sizes = {
        name: (Path("straight") / name).stat().st_size for name in file_names() if (Path("straight") / name).exists()
    }
    state = sizes[STATE]
    met = set()
    for limit in (0, 2000, state // 2, state + 100, max(sizes.values()) - 100):
        shutil.rmtree("out", ignore_errors=True)
        [done] = forked([config, "--output_dir", "out"], prepare=limited(limit))
        met.add(next(word for word in ("cannot be written", "a limit of") if word in done.line))
        if Path("out").exists():
            goes_on(done, Path("straight"), config)
    assert met == {"cannot be written", "a limit of"}, "at the start, and in the middle"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 200 kB."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=200k", "none", str(place)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_fills_up_ends_in_a_line_and_resume_goes_on(config: str, tmp_path: Path, small_disk: Path) -> None:
    """Full at the start, before training, and at later moments; then room is made."""
    assert main([config, "--output_dir", "straight"]) == 0
    filler = small_disk / "filler"
    where = set()
    for left in (0, 8, 20, 36, 48, 60, 76, 92):
        shutil.rmtree(small_disk / "out", ignore_errors=True)
        filler.write_bytes(bytes(0))
        filler.write_bytes(bytes(shutil.disk_usage(small_disk).free - left * 1024 // 4096 * 4096))
        argv = [config, "--output_dir", str(small_disk / "out")]
        [done] = forked(argv)
        if done.status == 0:
            break
        where.add(done.line.replace(str(small_disk), "").split(",")[0])
        filler.unlink()
        if (small_disk / "out").exists():
            goes_on(done, Path("straight"), config, str(small_disk / "out"))
    assert len(where) > 2, where


class FullDisk:
    """A file on a disk that takes so many bytes."""

    def __init__(self, path: Path, room: int):
        self.file, self.room = open(path, "xb", buffering=0), room

    def write(self, content: bytes) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        n = self.file.write(content[: self.room])
        self.room -= n
        return n


def test_curves_that_find_no_room_wait_and_are_reported_at_the_flush(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run goes on to its checkpoint; once there is room, every event is there, in order, and whole."""
    disks: list[FullDisk] = []

    def full(path: Path, *_: Any, **__: Any) -> FullDisk:
        disks.append(FullDisk(path, 100))  # in the middle of an event
        return disks[-1]

    monkeypatch.setattr(event_file, "open", full, raising=False)
    monkeypatch.setattr(event_file, "SECONDS", -1)
    tracker = Tracker([TensorBoard(tmp_path, {})], [])
    for step in range(50):
        tracker.number("a", step, step)
    with pytest.raises(InputError, match="events.out.*No space left.*make room.*--resume"):
        tracker.flush()
    disks[0].room = 10**6
    tracker.number("a", 50, 50)
    tracker.flush()
    assert [(e.step, e.value) for e in EventAccumulator(str(tmp_path)).Reload().Scalars("a")] == [
        (step, step) for step in range(51)
    ]


def test_a_full_disk_under_the_curves_alone_ends_behind_the_checkpoint(
    config: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main([config, "--output_dir", "straight"]) == 0
    with monkeypatch.context() as patch:
        patch.setattr(event_file, "open", lambda path, *_, **__: FullDisk(path, 100), raising=False)
        assert main([config, "--output_dir", "out"]) == 2
    error = capsys.readouterr().err
    state = load_run(Path("out"))
    assert error.count("\n") == 1 and "events.out.tfevents" in error and state and state.passes == 1
    assert main([config, "--output_dir", "out", "--resume"]) == 0
    assert results(Path("out")) == results(Path("straight"))


# Files that the user names


def reported(path: str | Path) -> str:
    """What --html is refused with."""
    with pytest.raises(InputError) as caught:
        shared.check_file(Path(path), "html")
        shared.write_file(Path(path), "html", "page")
    assert f"html {path}, which cannot be written" in str(caught.value) or "\0" in str(path)
    return str(caught.value)


def test_a_device_a_pipe_and_a_link_are_written_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    os.mknod("null", stat.S_IFCHR | 0o666, os.makedev(1, 3)) if os.geteuid() == 0 else Path("null").symlink_to(
        os.devnull
    )
    os.mkfifo("pipe")
    Path("real").write_text("old and longer")
    Path("link").symlink_to("real")
    Path("new").symlink_to("made")
    kinds = {name: os.lstat(name) for name in ("null", "pipe", "link", "new")}
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append(Path("pipe").read_text()))
    reader.start()
    for name in (os.devnull, *kinds):
        shared.check_file(Path(name), "html")
        shared.write_file(Path(name), "html", "page \ud800")
    reader.join(10)
    assert read == ["page \\ud800"] == [Path("real").read_text()] == [Path("made").read_text()]
    for name, before in kinds.items():
        after = os.lstat(name)
        assert (after.st_ino, stat.S_IFMT(after.st_mode)) == (before.st_ino, stat.S_IFMT(before.st_mode))
    assert os.stat(os.devnull).st_rdev == os.makedev(1, 3)
    assert capsys.readouterr().out.count("wrote ") == 5


def test_a_device_is_replaced_by_a_plain_rename(tmp_path: Path) -> None:
    """Negative control: what happened to /dev/null."""
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "part").write_text("page")
    os.replace(tmp_path / "part", tmp_path / "link")
    assert not (tmp_path / "link").is_symlink() and not (tmp_path / "real").exists()


def test_the_standard_output_keeps_what_was_printed(tmp_path: Path) -> None:
    """Also where it is a file, which opening anew would empty."""
    code = (
        "from pathlib import Path; from streamprobe.commands import shared as g; print('before'); p = Path('/dev/stdout')\n"
        "g.check_file(p, 'html'); g.write_file(p, 'html', 'page\\n')"
    )
    with open(tmp_path / "out", "wb") as out:
        env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
        subprocess.run([sys.executable, "-c", code], stdout=out, check=True, cwd=Path(__file__).parents[2], env=env)
    assert (tmp_path / "out").read_text() == "before\npage\nwrote /dev/stdout\n"


def test_a_file_that_the_user_named_is_replaced_whole_or_stays(tmp_path: Path) -> None:
    page, beside = tmp_path / "page.html", tmp_path / "page.html.part"
    beside.write_text("the user's own")
    shared.write_file(page, "html", "old")
    shared.check_file(page, "html")
    assert page.read_text() == "old" and listed(tmp_path) == {"page.html", "page.html.part"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
        assert "No space left" in reported(page)
    assert beside.read_text() == "the user's own"
    longest = tmp_path / f"{'n' * 250}.html"
    shared.check_file(longest, "html")
    shared.write_file(longest, "html", "page")
    longest.unlink()
    assert page.read_text() == "old" and listed(tmp_path) == {"page.html", "page.html.part"}


def test_what_cannot_be_written_is_reported_up_front(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shared, "write_file", None)
    for name in ("loop", "to-folder", "far"):
        Path(name).symlink_to({"loop": "loop", "to-folder": ".", "far": "gone/x"}[name])
    for name in (".", "gone/x.html", "n" * 300, "loop", "to-folder", "far", "/proc/x", "a\0b", "/"):
        reported(name)
    assert listed() == {"loop", "to-folder", "far"}


def test_a_socket_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
        reported("socket")
    assert stat.S_ISSOCK(os.lstat("socket").st_mode)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_full_device_is_one_line_and_nothing_is_called_written(
    run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [str(run_folder), "--prompt", "one two", "--max_new_tokens", "2", "--html", "/dev/full"]
    assert cli.main(["watch", *argv]) == 2
    printed = capsys.readouterr()
    assert "wrote" not in printed.out and "No space left on device" in printed.err
    assert printed.err.startswith("streamprobe: html /dev/full") and printed.err.count("\n") == 1
