"""Command lines run in processes of their own, which share what this one has imported and so start at once."""

import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from streamprobe.cli import main

FORK = multiprocessing.get_context("fork")


class Done(NamedTuple):
    status: int  # negative: the signal that ended it
    out: str
    err: str

    @property
    def line(self) -> str:
        """What was reported; fails unless it is one line, with status 2."""
        assert self.status == 2 and "Traceback" not in self.out, (self.status, self.out, self.err)
        assert self.err.startswith("streamprobe: ") and self.err.count("\n") == 1, self.err
        return self.err


def _child(argv: Sequence[str], log: Path, prepare: Callable[[], Any]) -> None:
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(log.with_suffix(f".{name}"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
    prepare()
    status = main(argv)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def nothing() -> None:
    """No preparation."""


def forked(*argvs: Sequence[str], logs: Path, prepare: Callable[[], Any] = nothing) -> list[Done]:
    """Runs the command lines at once, each in its own process, where `prepare` is called first.

    What they print goes to files in the folder `logs`.
    """
    paths = [logs / f"{number}.log" for number in range(len(argvs))]
    children = [
        FORK.Process(target=_child, args=(argv, path, prepare)) for argv, path in zip(argvs, paths, strict=True)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join(120)
        if child.is_alive():
            child.kill()
            raise AssertionError("a run that does not end")
    texts = [[path.with_suffix(f".{name}").read_text() for name in ("out", "err")] for path in paths]
    return [Done(child.exitcode or 0, *text) for child, text in zip(children, texts, strict=True)]
