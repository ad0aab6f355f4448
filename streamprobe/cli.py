"""From a command line to a finished run."""

import os
import sys
from collections.abc import Sequence

from streamprobe.config.load import load_config
from streamprobe.system.console import guard, shows_progress

SMALLER = "lower --max_batch_tokens or --memory_gb, or use --quantization 8bit or 4bit"
RESUME = "interrupted; the same command with --resume goes on after the last pass"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `run.py`'s command line; returns the exit status: 0, or 2 where the user can fix what went wrong."""
    if not shows_progress():
        os.environ.setdefault("TQDM_DISABLE", "1")  # progress bars of the libraries too
    return guard(lambda: _run(sys.argv[1:] if argv is None else argv), SMALLER, RESUME)


def _run(argv: Sequence[str]) -> None:
    config = load_config(argv)
    from streamprobe.run.pipeline import run

    run(config)
