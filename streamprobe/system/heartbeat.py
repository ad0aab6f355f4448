"""Signs of life of the members of a group of processes, which tell who is gone where the others would wait for ever.

They are kept in a store of torch.distributed, which all members reach: a beat every second, with how often the member
has taken part in what all do together.
"""

import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from streamprobe.errors import InputError

BEAT = 1.0  # seconds between two signs of life of a member
SILENT = 40.0  # seconds without one after which a member is taken for dead, though no connection has broken
HEARD = 2.5 * BEAT  # seconds after which all members know that another has ended all
GRACE = 15.0  # seconds that a member has to end by itself once another has ended all
UNSPOKEN = "the same command with --resume goes on from the last checkpoint"


class Heartbeat:
    """The signs of life of one member, and what it knows of the others'."""

    def __init__(self, store: Any, member: int, size: int, host: str):
        """`member` of `size`, on the machine `host`; member 0 looks for all others, and these for it."""
        self.store, self.member, self.size = store, member, size
        self.calls: float = 0  # how often this member has taken part in what all do together; not a number: it does not
        self.last_words: Callable[[], None] = lambda: None  # what is still to be done where no exception can end it
        self.done = threading.Event()
        self.ended = 0.0  # when this member heard that another has ended all
        self.hosts: dict[int, str] = {}  # of members whose signs of life were seen, for when the store is gone
        self.store.set(f"host/{member}", host)
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def stop(self, left: bool) -> None:
        """Ends the signs of life; `left`: this member's part is done, and nobody is to wait for it."""
        self.done.set()
        if left:
            with suppress(RuntimeError):  # the process that holds the store may be gone: it was done, too
                self.store.set(f"left/{self.member}", "")
        if self.thread is not threading.current_thread():
            self.thread.join(5 * BEAT)  # which is in the library, and must not be as the interpreter ends

    def claim(self) -> bool:
        """Whether this is the member that says why all end: the first one that asks.

        It stays until the others have heard that, and so does member 0, for the store may go with it.
        """
        try:
            first = self.store.compare_set("ended", "", str(self.member)).decode() == str(self.member)
        except RuntimeError:  # the process that holds the store is gone: all that are left may speak
            return not self.ended
        if first or self.member == 0:
            time.sleep(HEARD)
        return first

    def _run(self) -> None:
        """Gives signs of life and looks for those of others."""
        watched = range(1, self.size) if self.member == 0 else [0]
        seen = {member: ("", time.monotonic()) for member in watched}
        number = 0
        while not self.done.wait(BEAT):
            number, now = number + 1, time.monotonic()
            try:
                self.store.set(f"beat/{self.member}", f"{number} {self.calls}")
                self.ended = self.ended or now * self.store.check(["ended"])
                for member in list(seen):
                    if self.store.check([f"left/{member}"]):
                        del seen[member]
                    elif (beat := self._last(member)) != seen[member][0]:
                        seen[member] = beat, now
            except RuntimeError:  # the process that holds the store is gone
                seen = seen or {0: ("", now)}
            silent = [member for member, (_, last) in seen.items() if now - last > SILENT]
            if silent or (self.ended and now - self.ended > GRACE):
                self._end_here(silent)

    def _end_here(self, silent: list[int]) -> None:
        """Ends this process, whose main thread may wait for ever for one that is gone."""
        try:
            if silent and self.claim():
                sys.stderr.write(f"streamprobe: {self._silence(silent)}\n")
                sys.stderr.flush()
            self.last_words()
        finally:
            os._exit(2)

    def _last(self, member: int) -> str:
        """The last beat of another member; nothing where there is none."""
        if not self.store.check([f"beat/{member}"]):
            return ""
        if member not in self.hosts:
            self.hosts[member] = self.store.get(f"host/{member}").decode()
        return self.store.get(f"beat/{member}").decode()

    def _beats(self) -> dict[int, str]:
        """The last beats of the others that still have to do."""
        others = [member for member in range(self.size) if member != self.member]
        return {member: self._last(member) for member in others if not self.store.check([f"left/{member}"])}

    def missing(self, said: str, seconds: float) -> InputError | None:
        """What is said where all could not do something together, as a library `said`: who is gone, or is late.

        `seconds`: how long the others are waited for.  None where nobody is.
        """
        try:
            before = self._beats()
            time.sleep(4 * BEAT)
            after = self._beats()
        except RuntimeError:
            return self._silence([0])
        silent = [member for member in after if after[member] == before.get(member)]
        if silent:
            return self._silence(silent)
        late = [member for member, beat in after.items() if beat and float(beat.split()[1]) < self.calls]
        if not late:
            return None
        expected = f"every rank there within {seconds:g} s"
        return InputError(
            f"{self._named(late)}, which did not come to what all ranks do together ({said})",
            expected,
            f"see what keeps it; {UNSPOKEN}",
        )

    def _silence(self, members: list[int]) -> InputError:
        """What is said of members that are gone."""
        return InputError(
            f"{self._named(members)}, which has ended without a word (killed, or its machine is gone)",
            "every rank to the end of the run",
            UNSPOKEN,
        )

    def _named(self, members: list[int]) -> str:
        """Some of the members, with the machines that they run on."""
        names = [f"{member} on {self.hosts.get(member, 'an unknown machine')}" for member in members[:4]]
        more = ", ..." if len(members) > 4 else ""
        return f"rank {', '.join(names)}{more} of {self.size}"
