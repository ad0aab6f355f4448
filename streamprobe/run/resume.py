"""Going on with a run that was interrupted: its checkpoint, and whether this launch would be the same run."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Any, NamedTuple

from streamprobe.config.load import RunConfig
from streamprobe.config.schema import LAUNCH_KEYS
from streamprobe.errors import InputError
from streamprobe.run.checkpoint import STATE, Checkpoint, load_run
from streamprobe.run.folder import holds_results
from streamprobe.run.provenance import read_config
from streamprobe.system.console import say
from streamprobe.system.distributed import is_main, share_bytes, world
from streamprobe.system.files import reason, write_atomic
from streamprobe.system.privacy import without_secrets

FREE = (*LAUNCH_KEYS, "config", "git_commit", "device")  # facts that may differ; the config's keys are compared first


class Earlier(NamedTuple):
    """What an interrupted run has left, as far as it came."""

    checkpoint: Checkpoint | None = None
    keys: Mapping[str, Any] = MappingProxyType({})  # of its config, where it wrote one


NOTHING = Earlier()


def find_shared_earlier(config: RunConfig, folder: Path) -> tuple[Earlier, RunConfig]:
    """As `find_earlier`, on every rank, of what lies in the folder of rank 0."""
    if world().size == 1:
        return find_earlier(config, folder)
    with TemporaryDirectory() as copy:
        for name in (STATE, "config.yaml"):
            path = folder / name
            content = share_bytes(_read(path) if is_main() and path.is_file() else b"")
            if content and not is_main():
                write_atomic(Path(copy, name), content)
        return find_earlier(config, folder if is_main() else Path(copy))


def _read(path: Path) -> bytes:
    """The bytes of a file of the earlier run.  Raises InputError where it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(
            f"{path}, which cannot be read ({reason(error)})", "a file of the run that is to go on", "put it back"
        ) from error


def find_earlier(config: RunConfig, folder: Path) -> tuple[Earlier, RunConfig]:
    """What the run in `folder` has left, and the config with the day that its chat template wrote.

    Raises InputError where that run is another one, or is finished and its checkpoint is gone: it would be replaced.
    """
    checkpoint = load_run(folder)
    if not checkpoint and holds_results(folder):
        raise InputError(
            f"--resume in {folder}, which holds results but no {STATE}",
            "a checkpoint to go on from",
            "put it back, or start a new run without --resume in another folder",
        )
    then: Mapping[str, Any] = {}
    if checkpoint or (folder / "config.yaml").exists():
        then = checkpoint.facts["config"] if checkpoint else read_config(folder)
        day = config.data.chat_date or then.get("chat_date")
        config = replace(config, data=replace(config.data, chat_date=day))
        now = without_secrets(config.flat())
        if not all(isinstance(layer, int) for layer in config.probes.layers):
            del now["layers"]  # which they are is known once the model's config is
        check_same_run({name: value for name, value in now.items() if name not in config.data.open_keys}, then)
    if not checkpoint:
        say(f"nothing to resume in {folder}: starting at the first pass")
    return Earlier(checkpoint, then), config


def check_same_run(now: Mapping[str, Any], then: Mapping[str, Any]) -> None:
    """Raises InputError for a key or fact whose change would make the resumed run another one."""
    for name, value in now.items():
        if name not in FREE and value != then.get(name):
            raise InputError(
                f"--resume with {name} {value}",
                f"{then.get(name)}, as the run began",
                "give the same, or start a new run without --resume",
            )
