"""What is printed, on every kind of stream, and what each command line makes of an error."""

import ast
import errno
import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from streamprobe.errors import InputError
from streamprobe.system import console

ROOT = Path(__file__).parents[2]


# --- one line, one status ---


@pytest.mark.parametrize(
    "error, told",
    [
        (InputError("this", "that", "so"), "this; expected that; fix: so"),
        (torch.OutOfMemoryError("CUDA out of memory"), "too little device memory"),
        (MemoryError(), "too little memory"),
        (np._core._exceptions._ArrayMemoryError((10**12,), np.dtype("float64")), "too little memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "too little memory"),
        (OSError(errno.ENOSPC, "No space left on device", "x.json"), "x.json"),
        (OSError(errno.EROFS, "Read-only file system"), "no room to write"),
        (OSError(errno.EFBIG, "File too large"), "no room to write"),
    ],
)
def test_what_the_user_can_fix_is_one_line_and_status_2(capsys, error, told):
    def work():
        raise error

    assert console.guard(work, smaller="take less") == 2
    said = capsys.readouterr().err
    assert said.startswith("streamprobe: ") and said.count("\n") == 1 and told in said
    assert "; expected " in said and "; fix: " in said


@pytest.mark.parametrize("error", [ValueError("bug"), RuntimeError("shape mismatch"), OSError(errno.ENOENT, "gone")])
def test_a_bug_fails_without_being_dressed_up(error):
    def work():
        raise error

    with pytest.raises(type(error)):
        console.guard(work)


def test_ctrl_c_says_how_to_go_on_and_help_ends_well(capsys):
    def stop():
        raise KeyboardInterrupt

    assert console.guard(stop, interrupted="interrupted; --resume") == 130
    assert capsys.readouterr().err == "streamprobe: interrupted; --resume\n"
    assert console.guard(lambda: sys.exit(0)) == 0 and console.guard(lambda: None) == 0


def test_real_allocations_that_fail_are_told(capsys):
    assert console.guard(lambda: torch.empty(2**50)) == 2
    assert console.guard(lambda: np.empty(2**55)) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and all("too little memory" in line for line in said)


# --- text ---


def test_no_text_commands_the_terminal(capsys):
    evil = "a\x1b[2Jb\x07\x9b1m\u202e\r\ud800\ttab\nline \u00fc \u25b2"
    console.say(evil)
    console.warn(evil)
    said = capsys.readouterr()
    for text in (said.out, said.err):
        assert text == "a\ufffd[2Jb\ufffd\ufffd1m\ufffd\ufffd\ufffd\ttab\nline \u00fc \u25b2\n"


@pytest.mark.parametrize("encoding, shown", [("ascii", "^ \\xe4 v - \\u6f22"), ("latin-1", "^ \u00e4 v - \\u6f22")])
def test_letters_that_an_encoding_lacks_fall_back(encoding, shown):
    text = "\u25b2 \u00e4 \u25bc \u2013 \u6f22"
    with pytest.raises(UnicodeEncodeError):  # negative control
        text.encode(encoding)
    assert text.encode(encoding, "streamprobe").decode(encoding) == shown
    assert text.encode("utf-8", "streamprobe").decode() == text


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    "environment, colour, bars",
    [
        ({}, True, True),
        ({"NO_COLOR": "1"}, False, True),
        ({"NO_COLOR": ""}, True, True),
        ({"TERM": "dumb"}, False, False),
    ],
)
def test_colours_and_bars_are_for_terminals_that_want_them(monkeypatch, environment, colour, bars):
    for name, value in ({"NO_COLOR": "", "TERM": "xterm"} | environment).items():
        monkeypatch.setenv(name, value)
    assert not console.shows_colour() and not console.shows_progress()  # pytest's streams are no terminals
    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert console.shows_colour() is colour and console.shows_progress() is bars


@pytest.mark.parametrize("unbuffered", [False, True])
def test_the_end_of_a_bar_is_not_held_back(unbuffered):
    """What tqdm ends with, on standard error, goes before the next line on standard output."""
    arrives, fd = os.pipe()
    raw = io.FileIO(fd, "w")
    stream = io.TextIOWrapper(raw if unbuffered else io.BufferedWriter(raw), "utf-8", write_through=unbuffered)
    shown = console._text(stream, console._Sink(fd))
    for end in ("\r", "\n"):
        shown.write(f"bar{end}")
        ready, *_rest = select.select([arrives], [], [], 0)
        assert bool(ready) is unbuffered  # negative control: a stream that is buffered waits
        assert not ready or os.read(arrives, 10) == f"bar{end}".encode()
    os.close(arrives)
    shown.detach()
    stream.detach()


# --- what is typed ---

TYPED = """
import json, sys
from streamprobe.system.console import guard, read_lines
sys.exit(guard(lambda: print(json.dumps(list(read_lines("> ", aside=len(sys.argv) > 1))), flush=True)))
"""


def piped(content, *argv):
    """The lines of what is piped into a process of its own, and what came on its standard error."""
    ran = subprocess.run([sys.executable, "-c", TYPED, *argv], input=content, capture_output=True, check=True, cwd=ROOT)
    return json.loads(ran.stdout), ran.stderr.decode()


def more_of(terminal, last):
    """What comes from a terminal; where nothing does, a control key that was `last` is pressed again.

    One that comes before the program has put the terminal into its own mode is lost, as it may be for anyone.
    """
    for _ in range(20):
        ready, *_rest = select.select([terminal], [], [], 2)
        if ready:
            return os.read(terminal, 1000)
        if last in ("\x03", "\x04"):
            os.write(terminal, last.encode())
    raise TimeoutError("nothing comes from the terminal")


def typed(keys, *argv):
    """What a terminal shows where these keys are typed, each after the sign."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(ROOT)
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # which what starts the tests in the background has let be ignored
        os.execv(sys.executable, [sys.executable, "-c", TYPED, *argv])
    shown, last = b"", ""
    for number, key in enumerate(keys, 1):
        while shown.count(b"> ") < number:
            shown += more_of(terminal, last)
        os.write(terminal, key.encode())
        last = key
    with suppress(OSError):  # the end of a terminal
        while more := more_of(terminal, last):
            shown += more
    os.close(terminal)
    return shown.decode(), os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize(
    "content, lines",
    [
        (b"", []),
        (b"a\nb", ["a", "b"]),
        (b"a\r\n\n\nb\n", ["a"]),
        (b" \t\nb\n", []),
        ("\u00e9 \u6f22\n".encode(), ["\u00e9 \u6f22"]),
        (b"a\xffb\nc\n", ["a\udcffb", "c"]),
        (b"x" * 100_000 + b"\n", ["x" * 100_000]),
    ],
)
def test_lines_are_read_up_to_one_without_text(content, lines):
    assert piped(content) == (lines, "") == piped(content, "aside")  # no sign where nobody types


@pytest.mark.parametrize("end", ["\n", "\x04", "\x03"], ids=["an empty line", "Ctrl-D", "Ctrl-C"])
@pytest.mark.parametrize("argv", [[], ["aside"]], ids=["sign", "sign aside"])
def test_at_a_terminal_each_line_is_asked_for_until_someone_ends_it(end, argv):
    shown, status = typed(["wait\n", "no\n", end], *argv)
    assert status == 0 and shown.splitlines()[-1].removeprefix("> ") == '["wait", "no"]'
    met = shown.replace("^C> ", "^C")  # a Ctrl-C that meets the sign while it is written has it written again
    assert met.count("> ") == 3


def test_ctrl_c_as_soon_as_the_sign_is_seen_is_the_end(monkeypatch):
    """Before the line is asked for, which on a busy machine comes later."""

    class Hasty(Terminal):
        pressed = False

        def flush(self):
            if not self.pressed:
                self.pressed = True
                raise KeyboardInterrupt

    monkeypatch.setattr(console, "typed_at_terminal", lambda: True)
    monkeypatch.setattr(sys, "stdin", io.StringIO("wait\n"))
    monkeypatch.setattr(sys, "stderr", Hasty())
    assert list(console.read_lines("> ", aside=True)) == []
    assert list(console.read_lines("> ", aside=True)) == ["wait"]  # negative control: without Ctrl-C


def test_lines_end_where_standard_input_is_closed(monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    assert list(console.read_lines("> ")) == [] and not console.typed_at_terminal()


def test_a_reader_that_went_away_is_noticed(tmp_path):
    script = """
import sys, time
from streamprobe.system.console import guard, has_reader, say
def work():
    before = has_reader()
    sys.stdin.readline()
    say("x")
    print(before, has_reader(), file=sys.stderr)
guard(work)
"""
    for gone in (True, False):
        start = subprocess.Popen(
            [sys.executable, "-c", script],
            **dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE),
            cwd=ROOT,
            text=True,
        )
        if gone:
            start.stdout.close()
            start.stdout = None
        assert start.communicate("\n")[1].split() == ["True", str(not gone)]


# --- streams, in processes of their own (without torch, so each is quick) ---

WORK = """
import sys
from streamprobe.system.console import guard, say, warn
def work():
    for number in range(50):
        say(f"line {number} \\u25b2 " + "x" * 2000)
        print("a library's", number, file=sys.stderr, flush=True)
    open(sys.argv[1], "w").write("done")
sys.exit(guard(work))
"""
PLAIN = """
import sys
for number in range(50):
    print(f"line {number} \\u25b2 " + "x" * 2000, flush=True)
open(sys.argv[1], "w").write("done")
"""


def shell(script, tmp_path, redirection, **environment):
    """Runs the script with bash's redirection; returns status, what came out, and whether the work was done."""
    (tmp_path / "work.py").write_text(script)
    done = tmp_path / "done"
    line = f"{sys.executable} {tmp_path / 'work.py'} {done} {redirection}; exit ${{PIPESTATUS[0]}}"
    env = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"} | {"PYTHONPATH": str(ROOT)} | environment
    ran = subprocess.run(["bash", "-c", line], env=env, capture_output=True, text=True, timeout=60)
    return ran.returncode, ran.stdout, ran.stderr, done.exists() and done.read_text() == "done"


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_goes_away_stops_nothing(tmp_path, unbuffered):
    status, out, err, done = shell(WORK, tmp_path, "2>/dev/null | head -1", PYTHONUNBUFFERED=unbuffered)
    assert (status, done, out.count("\n"), err) == (0, True, 1, "") and out.startswith("line 0 ")


def test_a_closed_pipe_fails_without_the_guard(tmp_path):
    status, _, err, done = shell(PLAIN, tmp_path, "| head -1")
    assert status != 0 and not done and "BrokenPipeError" in err


@pytest.mark.parametrize("redirection", [">&- 2>&-", "2>&-", ">&-", "<&- >&- 2>&-"])
def test_streams_that_are_closed_are_done_without(tmp_path, redirection):
    status, _, _, done = shell(WORK, tmp_path, redirection)
    assert status == 0 and done  # and the file that is opened in the work holds `done` alone, not what was printed


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_output_that_is_lost_on_a_full_disk_is_told_once_at_the_end(tmp_path):
    status, out, err, done = shell(WORK, tmp_path, ">/dev/full")
    assert (status, out, done) == (2, "", True)
    told = [line for line in err.splitlines() if line.startswith("streamprobe: ")]
    assert len(told) == 1 and err.splitlines()[-1] == told[0] and "standard output" in told[0]
    assert shell(WORK, tmp_path, "2>/dev/full >/dev/null")[::3] == (2, True)


def test_a_full_disk_fails_without_the_guard(tmp_path):
    status, _, err, done = shell(PLAIN, tmp_path, ">/dev/full")
    assert status != 0 and not done and "No space left" in err


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_any_encoding_takes_the_alarm(tmp_path, encoding):
    status, out, err, done = shell(WORK, tmp_path, "| cut -c1-20", PYTHONIOENCODING=encoding)
    assert status == 0 and done and ("line 0 \u25b2" if encoding == "utf-8" else "line 0 ^") in out
    assert "Unicode" not in err


def test_help_needs_no_torch_and_no_reader(tmp_path):
    """The real command line, under a locale of ASCII, to a pipe that closes."""
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": ""}
    line = f"{sys.executable} -X importtime {ROOT / 'run.py'} --help 2>{tmp_path / 'times'} | head -1; exit ${{PIPESTATUS[0]}}"
    ran = subprocess.run(["bash", "-c", line], env=environment, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0 and ran.stdout == "usage: run.py [CONFIG] [--key value ...]\n"
    modules = {text.split("|")[-1].strip() for text in (tmp_path / "times").read_text(errors="replace").splitlines()}
    assert "streamprobe.system.console" in modules and "torch" not in modules


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_training_with_letters_beyond_ascii_runs_to_a_pipe_that_closes_in_an_ascii_locale(
    tmp_path, model_dir, chains_file
):
    """The whole way: a config in UTF-8, labels and ids beyond ASCII, `| head -1`, and then the monitor, printed in ASCII."""
    text = (
        chains_file.read_text(encoding="utf-8").replace("backtracking", "zur\u00fcck\u25b2").replace("alpha", "\u00e4")
    )
    (tmp_path / "chains.json").write_text(text, encoding="utf-8")
    keys = {
        "model": model_dir,
        "data": str(tmp_path / "chains.json"),
        "dtype": "float32",
        "labels": ["zur\u00fcck\u25b2"],
        "layers": [1],
        "lags": [0],
        "controls": ["none"],
        "max_passes": 1,
        "bootstrap": 0,
        "output_dir": str(tmp_path / "out"),
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(keys, allow_unicode=True), encoding="utf-8")
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "OMP_NUM_THREADS": "1"}
    environment |= {"PYTHONPATH": str(ROOT)}
    line = f"{sys.executable} {ROOT / 'run.py'} {tmp_path / 'config.yaml'} | head -1; exit ${{PIPESTATUS[0]}}"
    ran = subprocess.run(["bash", "-c", line], env=environment, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0 and ran.stdout.count("\n") == 1 and not ran.stderr, ran.stderr
    assert "zur\u00fcck\u25b2" in (tmp_path / "out/results.csv").read_text(encoding="utf-8")
    options = ["--prompt", "go", "--max_new_tokens", "5"]
    watch = [sys.executable, "-m", "streamprobe", "watch", str(tmp_path / "out"), *options]
    shown = subprocess.run(watch, env=environment, capture_output=True, text=True, timeout=120)
    assert shown.returncode == 0 and "zur\\xfcck^" in shown.stdout and "alarm (^)" in shown.stdout, shown.stderr


def test_everything_but_the_console_prints_through_it():
    """No module of the package has a print of its own, but for the demo's training, which is a script."""
    printing = {
        path.name
        for path in (ROOT / "streamprobe").rglob("*.py")
        for line in path.read_text(encoding="utf-8").splitlines()
        if line.strip().startswith("print(")
    }
    assert printing == {"train.py"}


POSIX = {"resource", "fcntl", "pwd", "grp", "termios", "pty"}


def imported(source):
    """The modules that a module's source imports as it is loaded: not those within a function or an `if` or `try`."""
    body = [node for node in ast.parse(source).body if isinstance(node, ast.Import | ast.ImportFrom)]
    return {
        name.split(".")[0]
        for node in body
        for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names])
    }


def test_no_module_needs_what_windows_lacks_to_be_imported():
    for path in (ROOT / "streamprobe").rglob("*.py"):
        assert not imported(path.read_text(encoding="utf-8")) & POSIX, path
    assert imported("import os, resource\nfrom fcntl import flock") & POSIX == {"resource", "fcntl"}  # negative control
