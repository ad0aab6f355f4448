"""`streamprobe train` and `demo`: the probes of a config are trained."""

from collections.abc import Sequence

from streamprobe.config.load import load_config
from streamprobe.errors import InputError
from streamprobe.system.shipped import shipped_configs
from streamprobe.system.start import no_collections


def train(argv: Sequence[str], command: str) -> None:
    """Trains the probes of a config; `command` is what was typed before `argv`."""
    with no_collections():
        config = load_config(argv, f"{command} [CONFIG]")
        from streamprobe.run.pipeline import run

    run(config)


def demo(argv: Sequence[str]) -> None:
    """Trains the probes of the demo, with the keys of `argv`."""
    if argv and not argv[0].startswith("-"):
        raise InputError(f"{argv[0]!r}", "keys alone", f"streamprobe train {argv[0]}, for another config")
    with no_collections():
        config = load_config([str(shipped_configs()["demo"]), *argv], "streamprobe demo")
        from streamprobe.run.pipeline import run

    run(config)
