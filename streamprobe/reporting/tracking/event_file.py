"""A file of events for TensorBoard that loses nothing to a full disk."""

import math
import os
import socket
import time
from io import BytesIO
from itertools import count
from pathlib import Path
from typing import Any

from streamprobe.system.files import unwritable

SECONDS = 30  # between two times that events are put on disk, which is how often TensorBoard looks
NUMBERS = count()  # of this process's event files


def _second_behind(folder: Path) -> int:
    """Now, or the first second behind those of the folder's other files: TensorBoard reads them by their names."""
    seconds = [path.name.split(".")[3] for path in folder.glob("events.out.tfevents.*")]
    return max([int(time.time()), *(int(second) + 1 for second in seconds if second.isdecimal())])


class EventFile:
    """A file of events for TensorBoard, written by the thread that makes them.

    What cannot be written, as on a full disk, waits in memory until `flush` reports it, at the end of a pass.
    """

    def __init__(self, folder: Path, purge_step: int | None = None):
        """`purge_step` hides what earlier files of the folder hold from that step on."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        own = f"{socket.gethostname()}.{os.getpid()}.{next(NUMBERS):06d}"
        name = f"events.out.tfevents.{_second_behind(folder):010d}.{own}"
        self.path = folder / name
        try:
            self.file = open(self.path, "xb", buffering=0)
        except OSError as error:
            raise unwritable(self.path, error) from error
        self.waiting = BytesIO()
        self.records = RecordWriter(self.waiting)
        self.written = -math.inf
        self._put(Event(file_version="brain.Event:2"))
        if purge_step is not None:
            self._put(Event(step=purge_step, session_log=SessionLog(status=SessionLog.START)))

    def add(self, summary: Any, step: int | None) -> None:
        """One event."""
        from tensorboard.compat.proto.event_pb2 import Event

        self._put(Event(summary=summary, step=step))

    def _put(self, event: Any) -> None:
        event.wall_time = time.time()
        self.records.write(event.SerializeToString())
        if time.monotonic() - self.written > SECONDS:
            self.write()

    def write(self) -> OSError | None:
        """Puts on disk what waits, as far as that goes; returns what was in the way."""
        self.written, failure = time.monotonic(), None
        rest = memoryview(self.waiting.getvalue())
        try:
            while rest:
                rest = rest[self.file.write(rest) :]
        except OSError as error:
            failure = error
        self.waiting.seek(0)
        self.waiting.truncate()
        self.waiting.write(rest)
        return failure

    def flush(self) -> None:
        """Puts everything on disk.  Raises InputError where it does not take it."""
        failure = self.write()
        if failure:
            raise unwritable(self.path, failure) from failure

    def close(self) -> None:
        """Ends the file."""
        self.flush()
        self.file.close()
