"""What every stream of rows is made of: a row with its place, a reader of such rows, and the wait for more of them."""

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

from streamprobe.system.console import say

LOOK = 1.0  # seconds between two looks for more, at most
QUIET = 5.0  # seconds without a row before waiting is said, at most


class StreamRow(NamedTuple):
    """A row as it comes, or what is wrong where one should be, and how to go on behind it."""

    row: Mapping[str, Any] | None
    name: str  # what it is called where it has no id, such as `shard-3.jsonl:17`
    origin: str  # the file, or other source, that gave it
    place: Mapping[str, Any]  # where that stands behind it, as JSON takes it
    reason: str = ""  # why there is no row


class RowReader(Protocol):
    """Rows without an end, from one kind of source."""

    kind: str  # of source, as a state names it

    def rows(self) -> Iterator[StreamRow]:
        """All rows, from the first."""
        ...

    def resume(
        self, places: Mapping[str, Mapping[str, Any]], at: str, rest: Iterator[StreamRow]
    ) -> Iterator[StreamRow]:
        """The rows behind these places, each the last one of its origin; the very last one was of the origin `at`.

        `rest` is what `rows` still gives, for a source that can be read but once.  Raises InputError where what was
        read is gone, or is not what it was.
        """
        ...


class Waiting:
    """The patience with a source that has run dry: how long, until when, and the word that says so once a drought.

    Call `goes_on` each time that there is nothing, look again after at most `pause` seconds, and say `came` of a row.
    """

    def __init__(self, shown: str, seconds: float | None, stopped: Callable[[], bool]):
        """`shown` names the source; `seconds` None waits for ever; `stopped` is asked at each look."""
        self.shown, self.seconds, self.stopped = shown, seconds, stopped
        self.quiet = QUIET if seconds is None else min(QUIET, seconds / 2)
        self.since: float | None = None  # when the drought began, on the clock of `time.monotonic`
        self.said = False

    def goes_on(self) -> bool:
        """Whether to look again; not once it is stopped, or has been dry for so long."""
        now = time.monotonic()
        self.since = now if self.since is None else self.since
        if self.stopped() or (self.seconds is not None and now - self.since >= self.seconds):
            return False
        if not self.said and now - self.since >= self.quiet:
            self.said = True
            limit = "" if self.seconds is None else f", {self.seconds:g} s at most"
            say(f"data      waiting for more of {self.shown}{limit}")
        return True

    def pause(self) -> float:
        """Seconds until the next look."""
        return LOOK if self.seconds is None else min(LOOK, self.seconds / 4)

    def came(self) -> None:
        """Something came: the drought, if there was one, is over."""
        self.since, self.said = None, False
