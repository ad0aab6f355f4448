"""Runs that are killed after a pass, as by kill -9."""

import math
import os
import signal
from collections.abc import Callable

from streamprobe.run.pipeline import PassEnd
from streamprobe.trainer import Done


def killed_after(number: int, saved: int) -> Callable[[], None]:
    """Lets a process die after pass `number`, with the checkpoint of pass `saved` on disk, or of the last before it."""

    def prepare() -> None:
        end = PassEnd.__call__

        def deadly(self: PassEnd, done: Done) -> None:
            self.checkpoints.seconds = 0.0 if done.passes <= saved else math.inf
            end(self, done)
            self.checkpoints.wait()
            if done.passes == number:
                os.kill(os.getpid(), signal.SIGKILL)

        PassEnd.__call__ = deadly  # type: ignore[method-assign]  # in a process of its own

    return prepare
