"""Ctrl-C and SIGTERM that end a stream in its own time, instead of at once."""

import os
import signal
import threading
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any

from streamprobe.system.distributed import is_main, least

SIGNS = (signal.SIGINT, signal.SIGTERM)
WORD = b"\nstopping  what is under way is ended, then the last report is made; once more to stop at once\n"


class Stopping:
    """Whether someone has asked this process to end, as a context manager: the first sign asks, the next one acts.

    Outside of the main thread, where no sign arrives, nobody asks.
    """

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Stopping":
        if threading.current_thread() is threading.main_thread():
            self._before = {sign: signal.signal(sign, self._ask) for sign in SIGNS}
        return self

    def _ask(self, sign: int, frame: FrameType | None) -> None:
        self.asked = True
        self._restore()
        if is_main():
            with suppress(OSError):
                os.write(2, WORD)  # which, unlike print, may be called in the middle of itself

    def _restore(self) -> None:
        while self._before:
            sign, handler = self._before.popitem()
            signal.signal(sign, handler)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._restore()

    def anywhere(self) -> bool:
        """Whether any rank was asked: all ranks call it together."""
        return least(-int(self.asked)) < 0
