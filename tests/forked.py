"""Command lines run in processes of their own, which share what this one has imported and so start at once."""

import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from streamprobe.cli import train as main

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


def _child(argv: Sequence[str], out: int, err: int, prepare: Callable[[], Any]) -> None:
    os.dup2(out, 1)
    os.dup2(err, 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
    prepare()
    status = main(argv)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def nothing() -> None:
    """No preparation."""


def forked(
    *argvs: Sequence[str], prepare: Callable[[], Any] = nothing, each: Sequence[Callable[[], Any]] = ()
) -> list[Done]:
    """Runs the command lines at once, each in its own process, where `prepare` is called first, or its own of `each`.

    What they print must fit into a pipe (64 kB).
    """
    pipes = [(os.pipe(), os.pipe()) for _ in argvs]
    children = [
        FORK.Process(target=_child, args=(argv, out[1], err[1], own))
        for argv, own, (out, err) in zip(argvs, each or [prepare] * len(argvs), pipes, strict=True)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join(120)
        if child.is_alive():
            child.kill()
            raise AssertionError("a run that does not end")
    return [
        Done(child.exitcode or 0, _text(*out), _text(*err)) for child, (out, err) in zip(children, pipes, strict=True)
    ]


def _text(read: int, write: int) -> str:
    os.close(write)
    with open(read, encoding="utf-8") as pipe:
        return pipe.read()
