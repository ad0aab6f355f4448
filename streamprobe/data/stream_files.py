"""Rows of files one by one: of JSON lines, which may grow, and of compressed lines and parquet, which are whole.

What a file has given is a `Place`, so that a later reader goes on behind it, in a file of plain lines by a seek.
"""

import os
import re
import time
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO, NamedTuple
from zlib import crc32

from streamprobe.data.file_types import FILE_TYPES, JSON_LINES, open_file, parse_lines, parse_name
from streamprobe.data.files import check_file, choose_files, is_many, list_files
from streamprobe.data.stream_rows import StreamRow, Waiting
from streamprobe.errors import InputError

SPAN = 1024  # bytes at both ends of what was read by which a file is known again
MAGIC = re.compile(r"[*?[]")  # with which the part of a glob begins that stands for many names


class Place(NamedTuple):
    """How far a file has been read."""

    line: int  # lines, or rows of a parquet file
    byte: int = 0  # bytes up to there; of a file that is whole all that it has
    check: int = 0  # `checksum` of these bytes
    end: bool = False  # whether it cannot be read any further


class FileRows:
    """The rows of a file, or of a folder or glob of files in sorted order.

    Without an end to wait for, each file is read to its own.  Else files are looked at again for lines that were
    written and for files that are new, until nothing has come for as long as `waiting` has patience; only then a last
    line is given that does not end.
    """

    kind = "files"

    def __init__(self, data: str, waiting: Waiting):
        """`data` is a path, folder or glob.  Raises InputError where there is no file, or files of several types."""
        self.data, self.waiting, self.many = data, waiting, is_many(data)
        if not self.many:
            check_file(data)
        first = choose_files(data).paths[0] if self.many else data
        self.type = FILE_TYPES[parse_name(first).suffix]
        self.base = _base_of(data)

    def rows(self) -> Iterator[StreamRow]:
        """All rows, from the first."""
        return self._rows(_Read({}, set()))

    def resume(
        self, places: Mapping[str, Mapping[str, Any]], at: str, _rest: Iterator[StreamRow]
    ) -> Iterator[StreamRow]:
        """The rows behind these places: first what is left of the file `at`."""
        found = {name: Place(**place) for name, place in places.items()}
        for name, place in found.items():
            if not place.end:
                self._check(name, place)
        ended = {name for name, place in found.items() if place.end or (name != at and not self._grows(name))}
        return self._rows(_Read(found, ended, at))

    def _rows(self, read: "_Read") -> Iterator[StreamRow]:
        """The rows behind what is `read` already."""
        while self.waiting.seconds:
            came = False
            for row in self._look(read, final=False):
                self.waiting.came()
                came = True
                yield row
            if not came and not self.waiting.goes_on():
                break
            if not came:
                time.sleep(self.waiting.pause())
        if not (self.waiting.seconds and self.waiting.stopped()):
            yield from self._look(read, final=True)

    def _look(self, read: "_Read", *, final: bool) -> Iterator[StreamRow]:
        """What files have to give now; `final`: a line that does not end, too."""
        for path in sorted(self._paths(), key=lambda path: self._name(path) != read.first):
            name = self._name(path)
            if name in read.ended:
                continue
            rows = self._lines(path, name, read, final=final) if self._grows(name) else self._whole(path, name, read)
            try:
                for row in rows:
                    read.places[name] = Place(**row.place)
                    yield row
            except InputError:
                raise
            except (OSError, ValueError, NotImplementedError):
                yield self._unreadable(name, read)

    def _lines(self, path: str, name: str, read: "_Read", *, final: bool) -> Iterator[StreamRow]:
        """The rows of plain lines that a file has to give behind its place."""
        place = read.places.get(name, Place(0))
        if os.path.getsize(path) == place.byte:
            return
        self._check(name, place)
        with open_file(path, "") as file:
            lines = _Lines(file, place, final=final)
            for entry in parse_lines(lines, place.line):
                stands = Place(entry.last, lines.byte, lines.check())
                yield StreamRow(entry.row, f"{name}:{entry.first}", name, stands._asdict(), entry.reason)

    def _whole(self, path: str, name: str, read: "_Read") -> Iterator[StreamRow]:
        """The rows of a compressed file, or a parquet file, behind its place; then it has ended."""
        assert self.type.entries is not None
        before, size = read.places.get(name, Place(0)), os.path.getsize(path)
        with open(path, "rb") as file:
            check = checksum(file, size)
        with open_file(path, parse_name(path).compression) as file:
            for entry in self.type.entries(file, before.line):
                numbers = f"{entry.first}-{entry.last}" if entry.last > entry.first else entry.first
                stands = Place(entry.last, size, check)
                yield StreamRow(entry.row, f"{name}:{numbers}", name, stands._asdict(), entry.reason)
        read.ended.add(name)

    def _unreadable(self, name: str, read: "_Read") -> StreamRow:
        """What is given once, in place of all that is left of a file that cannot be read any further."""
        read.ended.add(name)
        before = read.places.get(name, Place(0))
        place = before._replace(line=before.line + 1, end=True)
        where = f"{name}:{place.line}" if before.line else name
        return StreamRow(None, where, name, place._asdict(), "where a file cannot be read")

    def _paths(self) -> list[str]:
        """The files of the type that is read, as far as they are there now."""
        paths = list_files(self.data).once if self.many else [self.data]
        return [path for path in paths if FILE_TYPES.get(parse_name(path).suffix) is self.type and os.path.isfile(path)]

    def _name(self, path: str) -> str:
        """What a file is called, wherever the folder lies."""
        return os.path.relpath(path, self.base).replace(os.sep, "/")

    def _grows(self, name: str) -> bool:
        """Whether a file holds plain lines, to which more may be written."""
        return self.type is JSON_LINES and not parse_name(name).compression

    def _check(self, name: str, place: Place) -> None:
        """Raises InputError where a file is not the one that was read up to this place."""
        path = os.path.join(self.base, name)
        fix = "put back the file as it was, or begin a new run"
        try:
            size = os.path.getsize(path)
            with open(path, "rb") as file:
                same = checksum(file, place.byte) == place.check
        except OSError:
            raise InputError(f"data {path}, which is gone", "the file that was read before", fix) from None
        if size < place.byte:
            got = f"data {path} of {size:,} bytes, of which {place.byte:,} have been read"
            raise InputError(got, "a file that has grown at most", fix)
        if not same or (size != place.byte and not self._grows(name)):
            raise InputError(f"data {path}, which is another file than before", "the one that was read before", fix)


class _Read:
    """What has been read of all files."""

    def __init__(self, places: dict[str, Place], ended: set[str], first: str = ""):
        self.places, self.ended, self.first = places, ended, first  # how far, which to the end, and which goes on first


class _Lines:
    """The lines of a file behind a place, and the place behind the last one of them."""

    def __init__(self, file: BinaryIO, place: Place, *, final: bool):
        """What is left of a line of which a part was given without its end is passed over; it has its number."""
        self.file, self.final, self.byte = file, final, place.byte
        self.head, self.tail = _ends(file, place.byte)
        if self.tail and not self.tail.endswith(b"\n"):
            self._pass(file.readline())

    def __iter__(self) -> Iterator[bytes]:
        while line := self.file.readline():
            if not (self.final or line.endswith(b"\n")):
                return
            self._pass(line)
            yield line

    def _pass(self, line: bytes) -> None:
        self.byte += len(line)
        if len(self.head) < SPAN:
            self.head = (self.head + line)[:SPAN]
        self.tail = (self.tail + line[-SPAN:])[-SPAN:]

    def check(self) -> int:
        """The `checksum` of the file up to here."""
        return crc32(self.tail, crc32(self.head))


def checksum(file: BinaryIO, byte: int) -> int:
    """A number by which the first `byte` bytes of a file are known again: of the first and the last SPAN of them."""
    head, tail = _ends(file, byte)
    return crc32(tail, crc32(head))


def _ends(file: BinaryIO, byte: int) -> tuple[bytes, bytes]:
    """The first and the last SPAN bytes of the first `byte` bytes, behind which the file then stands."""
    file.seek(0)
    head = file.read(min(byte, SPAN))
    file.seek(max(0, byte - SPAN))
    return head, file.read(min(byte, SPAN))


def _base_of(data: str) -> str:
    """The folder from which files are named: the one given, or that of a file; of a glob what its signs stand below."""
    if os.path.isdir(data):
        return data
    plain = data if os.path.lexists(data) else MAGIC.split(data)[0]
    return os.path.dirname(plain) or "."
