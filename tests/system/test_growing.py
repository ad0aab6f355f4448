"""A file that grows by whole pieces: whatever kills its writer, it goes on behind the last of them."""

import json
import os
import signal
from contextlib import suppress
from multiprocessing import get_context

import pytest

from streamprobe.errors import InputError
from streamprobe.system import growing
from streamprobe.system.growing import grow

FACTS = {"texts": "abc", "most": 3}
PIECES = [bytes([65 + i]) * (i + 1) for i in range(5)]


def write(path, resume=False, stop=99, facts=FACTS, convert=None):
    """Adds the pieces that are not there yet, up to `stop`; returns how many were there."""
    with grow(path, "out", facts, resume) as file:
        done = file.state or 0
        for number in range(done, len(PIECES)):
            if number == stop:
                raise KeyboardInterrupt
            file.add(PIECES[number], number + 1)
        file.finish(convert)
    return done


@pytest.mark.parametrize("stop", range(1, 5))
def test_an_interrupted_one_goes_on_behind_its_last_piece(tmp_path, stop):
    path = tmp_path / "x.csv"
    with pytest.raises(KeyboardInterrupt):
        write(path, stop=stop)
    assert not path.exists()
    assert write(path, resume=True) == stop
    assert path.read_bytes() == b"".join(PIECES) and os.listdir(tmp_path) == ["x.csv"]


def test_what_was_written_behind_the_last_whole_piece_is_cut_off(tmp_path):
    path = tmp_path / "x.csv"
    with pytest.raises(KeyboardInterrupt):
        write(path, stop=2)
    with open(tmp_path / "x.csv.part", "ab") as f:
        f.write(b"half of a pie")
    assert write(path, resume=True) == 2 and path.read_bytes() == b"".join(PIECES)


def test_pieces_fail_without_the_cut(tmp_path, monkeypatch):
    path = tmp_path / "x.csv"
    with pytest.raises(KeyboardInterrupt):
        write(path, stop=2)
    with open(tmp_path / "x.csv.part", "ab") as f:
        f.write(b"half of a piece, longer than all that follows")
    monkeypatch.setattr(growing.GrowingFile, "add", lambda self, content, state: open(self.part, "ab").write(content))
    write(path, resume=True)
    assert path.read_bytes() != b"".join(PIECES)


def _killed_at(path, place):
    """Writes, and dies by SIGKILL at the `place`th time that something is put on the disk."""
    count = 0
    real = os.fsync

    def fsync(fd):
        nonlocal count
        count += 1
        if count == place:
            os.kill(os.getpid(), signal.SIGKILL)
        real(fd)

    os.fsync = fsync
    write(path, resume=True)


def test_a_writer_that_is_killed_anywhere_loses_no_whole_piece(tmp_path):
    for place in range(1, 12):
        path = tmp_path / f"{place}.csv"
        child = get_context("fork").Process(target=_killed_at, args=(path, place))
        child.start()
        child.join(60)
        assert child.exitcode == -signal.SIGKILL
        assert write(path, resume=True) >= (place - 3) // 2
        assert path.read_bytes() == b"".join(PIECES)


def test_nothing_is_left_where_nothing_was_added(tmp_path):
    with suppress(RuntimeError), grow(tmp_path / "x.csv", "out", FACTS, False):
        raise RuntimeError
    assert os.listdir(tmp_path) == []
    assert write(tmp_path / "x.csv", resume=True) == 0  # there is nothing to go on with, which is no error


def test_a_file_that_is_made_of_the_pieces(tmp_path):
    write(tmp_path / "x", convert=lambda part, whole: whole.write_bytes(part.read_bytes()[::-1]))
    assert (tmp_path / "x").read_bytes() == b"".join(PIECES)[::-1] and os.listdir(tmp_path) == ["x"]


def test_what_is_there_is_not_written_over(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("mine")
    for resume in (False, True):
        with pytest.raises(InputError, match="which (exists|is whole); expected a new file"):
            write(path, resume)
    assert path.read_text() == "mine"
    path.unlink()
    with pytest.raises(KeyboardInterrupt):
        write(path, stop=1)
    with pytest.raises(InputError, match="the beginning of a file that was interrupted; expected --resume"):
        write(path)


def test_the_beginning_of_another_command_is_not_gone_on_with(tmp_path):
    path = tmp_path / "x.csv"
    with pytest.raises(KeyboardInterrupt):
        write(path, stop=1)
    for facts, name in ((FACTS | {"most": 4}, "most 4; expected 3"), (FACTS | {"new": 1}, "new 1"), ({}, "most None")):
        with pytest.raises(InputError, match=f"--resume with {name}"):
            write(path, resume=True, facts=facts)
    assert write(path, resume=True) == 1


@pytest.mark.parametrize("log", ["", "{", "[]", '{"size": 99, "state": 1, "facts": {}}', '{"size": "x"}', None])
def test_a_beginning_that_is_broken_is_refused_in_one_line(tmp_path, log):
    path = tmp_path / "x.csv"
    with pytest.raises(KeyboardInterrupt):
        write(path, stop=1)
    note = tmp_path / "x.csv.part.json"
    assert json.loads(note.read_text())["facts"] == FACTS
    note.unlink()
    if log is not None:
        note.write_text(log)
    with pytest.raises(InputError, match="cannot be gone on with"):
        write(path, resume=True)


def test_two_commands_do_not_write_one_file(tmp_path):
    path = tmp_path / "x.csv"
    with grow(path, "out", FACTS, False) as file:
        file.add(b"a", 1)
        with pytest.raises(InputError, match="which another command is writing"):
            write(path, resume=True)
    assert write(path, resume=True) == 1
