"""What is printed, so that any terminal, file or pipe can take it; and the exit status of every command line."""

import codecs
import errno
import io
import os
import sys
import time
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from typing import Any

from streamprobe.errors import InputError, first_line, out_of_memory
from streamprobe.system.distributed import Ended, is_main
from streamprobe.system.wrapping import columns_of, wrapped

PLAIN = {"▲": "^", "▼": "v", "–": "-", "—": "-", "‘": "'", "’": "'", "“": '"', "”": '"', "\ufffd": "?"}
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


def printable(text: str) -> str:
    """Text without control characters, so that what data or a model holds cannot command the terminal."""
    return "".join(c if c in "\n\t" or unicodedata.category(c)[0] != "C" else "\ufffd" for c in text)


def say(text: str = "", end: str = "\n") -> None:
    """Prints text, made printable, at once; for a terminal long lines are broken between words."""
    shown = printable(text)
    write((wrapped(shown, columns_of(sys.stdout)) if end == "\n" else shown) + end)


def write(text: str) -> None:
    """Prints text as it stands: the colours of this package, and what is printable already."""
    if sys.stdout is not None:
        sys.stdout.write(text)
        sys.stdout.flush()


def warn(text: str) -> None:
    """Prints text, made printable, on standard error, broken as `say` does."""
    if sys.stderr is not None:
        sys.stderr.write(wrapped(printable(text), columns_of(sys.stderr)) + "\n")
        sys.stderr.flush()


def has_reader() -> bool:
    """Whether what is printed may still be read: not once a pipe's other end is gone."""
    sink = _raw(sys.stdout) if isinstance(sys.stdout, io.TextIOWrapper) else None
    return not (isinstance(sink, _Sink) and sink.gone)


def shows_colour() -> bool:
    """Whether standard output is a terminal that shows colours, for someone who wants them (no-color.org)."""
    wanted = not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    return wanted and sys.stdout is not None and sys.stdout.isatty()


def shows_progress() -> bool:
    """Whether standard error is a terminal in which a bar can be drawn over itself, and this process the one to."""
    drawn = sys.stderr is not None and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
    return drawn and is_main()


def typed_at_terminal() -> bool:
    """Whether standard input is a terminal, at which someone types."""
    return sys.stdin is not None and sys.stdin.isatty()


def read_lines(sign: str, aside: bool = False) -> Iterator[str]:
    """The lines of standard input as they come, up to its end or to one without text.

    At a terminal each is asked for by a sign, `aside` on standard error, and Ctrl-C is the end, too.  Bytes that are no
    text come as surrogates.
    """
    if sys.stdin is None:
        return
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")
    terminal = typed_at_terminal()
    if terminal:
        with suppress(ImportError):
            import_module("readline")  # lets `input` edit the line
    while True:
        try:
            if terminal and aside and sys.stderr is not None:  # in here, for a Ctrl-C may come once the sign is seen
                sys.stderr.write(sign)
                sys.stderr.flush()
            line = input(sign if terminal and not aside else "")
        except (EOFError, KeyboardInterrupt) as end:
            if not terminal and isinstance(end, KeyboardInterrupt):
                raise
            line = ""
            if terminal:
                (warn if aside else say)("")  # ends the line of the sign
        if not line.strip():
            return
        yield line.removesuffix("\r")


def guard(work: Callable[[], object], smaller: str = "free some", interrupted: str = "interrupted") -> int:
    """Does the work of a command line; returns its exit status: 0, or 2 where the user can fix what went wrong.

    What can be fixed is said in one line: an InputError, memory that runs out (`smaller` says what helps), a disk that
    is full or cannot be written.  130 after Ctrl-C, with the word `interrupted`.  What else goes wrong is a bug and
    shows its traceback.  A reader that goes away (`| head -1`) stops nothing; output that is lost is reported.
    """
    with _open_streams() as sinks:
        try:
            _check_folder()
            work()
            status = 0
        except SystemExit as done:  # of --help
            status = done.code if isinstance(done.code, int) else 0
        except KeyboardInterrupt:
            warn(f"streamprobe: {interrupted}")
            status = 130
        except Ended:
            status = 2
        except Exception as error:
            reason = _reason(error, smaller)
            if reason is None:
                raise
            warn(f"streamprobe: {reason}")
            status = 2
        for stream in filter(None, (sys.stdout, sys.stderr)):
            stream.flush()
        for sink in sinks:
            if sink.lost:
                lost = InputError(
                    f"{sink.name} that was lost ({sink.lost})", "room for it", "free some; the rest is done"
                )
                warn(f"streamprobe: {lost}")
                status = status or 2
    return status


def _check_folder() -> None:
    """Raises InputError for a working directory that is gone, without which libraries cannot even be imported."""
    try:
        os.getcwd()
    except OSError as error:
        raise InputError(f"a working directory that is gone ({error})", "one that exists", "cd into another") from None


def _reason(error: Exception, smaller: str) -> InputError | None:
    """What is said of an error of the user's or the machine's; None for a bug."""
    if isinstance(error, InputError):
        return error
    if out_of_memory(error):
        torch = sys.modules.get("torch")  # not imported for this: it takes seconds
        where = "device " if torch is not None and isinstance(error, torch.OutOfMemoryError) else ""
        said = f"too little {where}memory ({first_line(error)})"
        return InputError(said, "room for the model, a batch and the activations", smaller)
    if isinstance(error, OSError) and error.errno in NO_ROOM:
        return InputError(
            f"no room to write ({error})", "a disk that takes the files", "free some room, or use another"
        )
    return None


class _Sink(io.RawIOBase):
    """A file descriptor to which a write never fails: once it cannot be written, what comes is thrown away."""

    def __init__(self, fd: int):
        self.fd, self.gone, self.lost = fd, False, ""
        self.name = "standard error" if fd == 2 else "standard output"

    def fileno(self) -> int:
        return self.fd

    def isatty(self) -> bool:
        return os.isatty(self.fd)

    def writable(self) -> bool:
        return True

    def write(self, content: Any) -> int:
        """Writes bytes, or any other buffer of them."""
        n = len(memoryview(content).cast("B"))
        while not self.gone:
            try:
                return os.write(self.fd, content)
            except BlockingIOError:  # a terminal that another program has made non-blocking
                time.sleep(0.01)
            except OSError as error:
                self.gone = True
                if error.errno != errno.EPIPE:  # a reader that went away has seen what it wanted
                    self.lost = str(error)
        return n


def _fall_back(error: UnicodeError) -> tuple[str, int]:
    """Letters that an encoding lacks: a plain one that looks alike, or else an escape."""
    assert isinstance(error, UnicodeEncodeError)
    lost = error.object[error.start : error.end]
    return "".join(PLAIN.get(c) or c.encode("ascii", "backslashreplace").decode() for c in lost), error.end


codecs.register_error("streamprobe", _fall_back)


@contextmanager
def _open_streams() -> Iterator[list[_Sink]]:
    """Standard output and error that take any text and never fail; yields what they lead to.

    A stream that was closed at the start leads nowhere, and its number is taken, so that no file gets it by chance.
    Streams that are no files, such as a notebook's, stay.
    """
    before, sinks = (sys.stdout, sys.stderr), []
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
        elif isinstance(stream, io.TextIOWrapper) and isinstance(_raw(stream), io.FileIO):
            sinks.append(sink := _Sink(stream.fileno()))
            setattr(sys, name, _text(stream, sink))
    try:
        yield sinks
    finally:
        for stream in filter(None, (sys.stdout, sys.stderr)):
            stream.flush()
        sys.stdout, sys.stderr = before


def _raw(stream: io.TextIOWrapper) -> object:
    """What lies below the buffer, which `python -u` leaves out."""
    return getattr(stream.buffer, "raw", stream.buffer)


def _text(stream: io.TextIOWrapper, sink: _Sink) -> io.TextIOWrapper:
    """A text stream like `stream` that writes into the sink.

    One without a buffer (`python -u`) is given one that is written out at the end of each line, and of each bar.
    """
    with suppress(OSError):
        stream.flush()
    by_line = stream.line_buffering or stream.write_through
    return io.TextIOWrapper(
        io.BufferedWriter(sink), stream.encoding, "streamprobe", None, by_line, stream.write_through
    )
