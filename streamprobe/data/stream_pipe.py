"""Rows of JSON lines from standard input, which can be read but once, and may be silent for long."""

import io
import os
import select
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any
from zlib import crc32

from streamprobe.data.file_types import parse_lines
from streamprobe.data.stream_rows import StreamRow, Waiting
from streamprobe.errors import InputError

NAME = "stdin"
CHUNK = 1 << 16  # bytes that are read at once


class PipeRows:
    """The rows of standard input, as they come."""

    kind = "standard input"

    def __init__(self, waiting: Waiting):
        """Raises InputError where standard input is closed."""
        self.waiting = waiting
        if sys.stdin is None:
            raise InputError("data - where standard input is closed", "JSON lines from it", "pipe them in")

    def rows(self) -> Iterator[StreamRow]:
        """All rows, from the first; to be asked for once."""
        lines = _Counted(self._lines())
        for entry in parse_lines(lines):
            place = {"line": entry.last, "check": lines.check}
            yield StreamRow(entry.row, f"{NAME}:{entry.first}", NAME, place, entry.reason)

    def resume(
        self, places: Mapping[str, Mapping[str, Any]], _at: str, rest: Iterator[StreamRow]
    ) -> Iterator[StreamRow]:
        """What comes behind the lines that were given before, which are piped in again and passed over."""
        if NAME not in places:
            return rest
        place = places[NAME]
        fix = "pipe in the same lines again from the first, or begin a new run"
        last = 0
        for row in rest:
            last = row.place["line"]
            if last >= place["line"]:
                if dict(row.place) != dict(place):
                    got = f"standard input, whose first {place['line']:,} lines are others than before"
                    raise InputError(got, "those that were read before", fix)
                return rest
        if self.waiting.stopped():
            return iter(())
        raise InputError(f"standard input of {last:,} lines", f"the {place['line']:,} that were read before", fix)

    def _lines(self) -> Iterator[bytes]:
        """The lines with their ends; of the last one, which may have none, all that came unless it was stopped."""
        pieces: list[bytes] = []
        for chunk in self._chunks():
            *ends, left = chunk.split(b"\n")
            for end in ends:
                yield b"".join((*pieces, end, b"\n"))
                pieces.clear()
            if left:
                pieces.append(left)
        if pieces and not self.waiting.stopped():
            yield b"".join(pieces)

    def _chunks(self) -> Iterator[bytes]:
        """What comes, as it comes, until it is closed or nothing has come for too long."""
        try:
            number = sys.stdin.fileno()
        except io.UnsupportedOperation:  # no file: it is never silent
            yield from iter(lambda: sys.stdin.buffer.read(CHUNK), b"")
            return
        while True:
            ready, _, _ = select.select([number], [], [], 0 if self.waiting.since is None else self.waiting.pause())
            if ready:
                self.waiting.came()
                chunk = os.read(number, CHUNK)
                if not chunk:
                    return
                yield chunk
            elif not self.waiting.goes_on():
                return


class _Counted:
    """Lines, and a checksum of all that have passed."""

    def __init__(self, lines: Iterable[bytes]):
        self.lines, self.check = lines, 0

    def __iter__(self) -> Iterator[bytes]:
        for line in self.lines:
            self.check = crc32(line, self.check)
            yield line
