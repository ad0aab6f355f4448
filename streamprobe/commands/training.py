"""`streamprobe train` and `demo`: the probes of a config are trained."""

from collections.abc import Sequence
from dataclasses import replace

from streamprobe.config.load import load_config
from streamprobe.errors import InputError
from streamprobe.system.distributed import joined
from streamprobe.system.launch import was_restarted
from streamprobe.system.shipped import shipped_configs
from streamprobe.system.start import no_collections
from streamprobe.system.workers import in_workers


def train(argv: Sequence[str], command: str) -> None:
    """Trains the probes of a config; `command` is what was typed before `argv`."""
    _train(argv, f"{command} [CONFIG]")


def demo(argv: Sequence[str]) -> None:
    """Trains the probes of the demo, with the keys of `argv`."""
    if argv and not argv[0].startswith("-"):
        raise InputError(f"{argv[0]!r}", "keys alone", f"streamprobe train {argv[0]}, for another config")
    _train([str(shipped_configs()["demo"]), *argv], "streamprobe demo")


def _train(argv: Sequence[str], command: str) -> None:
    """Trains what a command line says, together with other processes where a launcher has started some."""
    with joined():
        with no_collections():
            config = load_config(argv, command)
            from streamprobe.model.served import follow
            from streamprobe.run.pipeline import run
            from streamprobe.run.streaming.loop import run_stream

        if was_restarted():
            config = replace(config, output=replace(config.output, resume=True))
        with in_workers(config.model.tp_size) as leads:
            if leads:
                (run_stream if config.stream.streaming else run)(config)
            else:
                follow()
