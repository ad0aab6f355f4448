"""From a command line to a finished run."""

import os
import sys
from collections.abc import Sequence

from streamprobe.config import load_config
from streamprobe.errors import InputError

DEFAULT = "configs/demo.yaml"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `run.py`'s command line; returns the exit status: 0, or 2 where the user can mend what went wrong."""
    argv = list(sys.argv[1:] if argv is None else argv) or [DEFAULT]
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # progress bars of the libraries too
    try:
        config = load_config(argv)
        from streamprobe.experiment import run  # after the config: torch and transformers take seconds to import

        run(config)
    except InputError as error:
        print(f"streamprobe: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("streamprobe: interrupted; the same command with --resume goes on after the last pass", file=sys.stderr)
        return 130
    return 0
