"""Linear probes for every layer and every lag, trained while the language model runs."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"
__all__ = ["load_probes", "push_to_hub", "score", "steer", "tap", "watch"]

HOME = {
    "load_probes": "probes.storage",
    "push_to_hub": "tools.hub",
    "score": "tools.score",
    "steer": "model.hooks",
    "tap": "model.hooks",
    "watch": "tools.watch",
}


def __getattr__(name: str) -> Any:
    """The public names, imported when they are first asked for: torch takes seconds, and `run.py --help` needs none."""
    if name in HOME:
        return getattr(import_module(f"streamprobe.{HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
