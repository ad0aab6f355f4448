"""What ends every pass: what is noted and printed of it, and a checkpoint."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from streamprobe.errors import InputError
from streamprobe.reporting.tracking.tracker import Tracker
from streamprobe.run.checkpoint import Checkpoint, Checkpoints, Unwritten
from streamprobe.run.jobs import describe_progress, states_of
from streamprobe.run.memory_plan import Kept
from streamprobe.run.provenance import peak_memory
from streamprobe.solvers.nested import NestedSolver
from streamprobe.system.console import say
from streamprobe.trainer import Done, Job

QUIET = 1.0  # seconds between two lines of passes, at least


@dataclass
class PassEnd:
    """What is done at the end of every pass, when the trainer calls it: two curves, a line, and a checkpoint.

    A line is printed once a second at most, and that of the last pass always.
    """

    checkpoints: Checkpoints | Unwritten
    facts: dict[str, Any]
    kept: Kept
    jobs: Sequence[Job]
    tracker: Tracker
    device: torch.device
    begun: Done  # how far training had come when this process began
    lap: float = field(default_factory=time.perf_counter)
    line: str = ""  # of the last pass, as long as it is not printed
    printed: float = -math.inf  # when a line was

    def __post_init__(self) -> None:
        self.newest = self.snapshot(self.begun)

    def __call__(self, done: Done) -> None:
        """Notes what a pass took, and puts its curves on disk before a checkpoint that a resumed run goes on from."""
        seconds, self.lap = time.perf_counter() - self.lap, time.perf_counter()
        self.tracker.number("progress/tokens_per_second", done.tokens / done.passes / seconds, done.tokens)
        self.tracker.number("progress/memory_gb", peak_memory(self.device) / 1e9, done.tokens)
        self.line = f"pass {done.passes:<4}{seconds:>8.1f} s   {describe_progress(self.jobs)}"
        if self.lap - self.printed >= QUIET:
            self.print_line()
        if all(job.solver.resumable for job in self.jobs):
            self.newest = self.snapshot(done)
        try:
            self.tracker.flush()
        except InputError:  # which ends the run
            self.finish()
            raise
        self.checkpoints.offer(self.newest)

    def snapshot(self, done: Done) -> Checkpoint:
        """The run as it stands after a pass, sharing no memory with what trains on."""
        return Checkpoint(states_of(self.jobs), self.facts, done.passes, done.tokens, self.kept)

    def keep(self, done: Done, name: str, nested: NestedSolver) -> None:
        """Takes up nested probes that are final beside what they began with; others begin anew in a resumed run."""
        if nested.final and self.newest.passes == done.passes:
            self.newest = self.newest._replace(states=self.newest.states | {name: nested.state()})

    def print_line(self) -> None:
        """Prints the line of the last pass, once: passes over what is kept may take a hundredth of a second."""
        if self.line:
            say(self.line)
            self.line, self.printed = "", time.perf_counter()

    def finish(self) -> None:
        """Returns when the run is on disk as it stood when it could last be resumed."""
        self.print_line()
        self.checkpoints.write(self.newest)
        self.checkpoints.wait()
