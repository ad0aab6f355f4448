"""Weights & Biases, through the tracker of accelerate.

What its server is sent may be seen by others: curves, heat maps, verdict and config, but no text of the data, no path
of this machine and no command line.
"""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from streamprobe.errors import InputError, first_line
from streamprobe.reporting.tracking.base import Separation
from streamprobe.reporting.tracking.images import Picture
from streamprobe.reporting.tracking.layout import Category
from streamprobe.system.privacy import clean_text, for_others

PROJECT = "streamprobe"  # unless WANDB_PROJECT names one
SETTINGS = {
    "quiet": True,  # it would print every curve at the end
    "console": "off",  # what is printed shows texts of the data
    "x_disable_meta": True,  # which holds the command line, and in it a URL's secrets
    "x_save_requirements": False,
    "disable_git": True,
    "disable_code": True,
}
FIX = "pip install wandb, or leave it out of --report_to"
OFFLINE = "set WANDB_MODE=offline, or leave it out of --report_to"
RUN = re.compile(r"(?:offline-)?run-\d+_\d+-(.+)")  # the folder of a run of W&B: its time and its id


def check_wandb() -> None:
    """Raises InputError where W&B is not installed, or has no account to log to."""
    spec = find_spec("wandb")
    if spec is None or spec.origin is None:  # a folder called wandb is no package
        raise InputError("report_to wandb, which is not installed", "the package wandb", FIX)
    if os.environ.get("WANDB_MODE") not in ("offline", "disabled"):
        import wandb

        _start(lambda: wandb.login())


class WeightsAndBiases:
    """The backend of W&B; its files are in the folder `wandb` of the run's own."""

    def __init__(self, folder: Path, config: Mapping[str, Any], resumed: bool):
        """Starts a run of W&B, or where `resumed` goes on with the last one of this folder, if it finds one.

        Raises InputError where W&B cannot start.
        """
        from accelerate import PartialState
        from accelerate.tracking import WandBTracker

        PartialState()  # without which accelerate's trackers do not log
        again = {"id": found, "resume": "allow"} if resumed and (found := last_id(folder)) else {}
        project = os.environ.get("WANDB_PROJECT", PROJECT)
        self.tracker = WandBTracker(project, dir=folder, name=folder.resolve().name, settings=SETTINGS, **again)
        self.failure: Exception | None = None
        self.by_epoch: dict[str, Sequence[float]] = {}  # curves that wait for the end, since W&B takes no step back
        _start(self.tracker.start)
        self._log(lambda: self.tracker.store_init_configuration(for_others(config)))

    def _log(self, work: Callable[[], None]) -> None:
        """Does what must not end a run in the middle of a pass; the first thing in its way is kept for `flush`."""
        try:
            work()
        except Exception as error:  # whatever comes from the process that W&B runs beside this one
            self.failure = self.failure or error

    def charts(self, categories: Sequence[Category]) -> None:
        """Nothing: its charts are made in the browser."""

    def points(self, values: Mapping[str, float], step: int) -> None:
        """A point on each of many curves."""
        self._log(lambda: self.tracker.log(dict(values), step))

    def epochs(self, values: Mapping[str, Sequence[float]]) -> None:
        """Curves over epochs, a step each, behind all others."""
        self.by_epoch |= values

    def images(self, pictures: Mapping[str, Picture], step: int) -> None:
        """Heat maps by name."""
        drawn = {name: [Image.open(BytesIO(picture.png)).convert("RGB")] for name, picture in pictures.items()}
        self._log(lambda: self.tracker.log_images(drawn, step))

    def separation(self, found: Separation, step: int) -> None:
        """Nothing: accelerate's trackers have no such charts."""

    def text(self, name: str, text: str) -> None:
        """Nothing: the data's text stays here."""

    def outcome(self, said: str, numbers: Mapping[str, float]) -> None:
        """The verdict as a table of its lines, and the numbers by which runs compare; before it what has waited."""
        for epoch in range(max(map(len, self.by_epoch.values()), default=0)):
            values = {name: own[epoch] for name, own in self.by_epoch.items() if epoch < len(own)}
            self._log(partial(self.tracker.log, values))
        lines = [[line] for line in said.split("\n")]
        self._log(lambda: self.tracker.log_table("verdict", ["line"], lines))
        self._log(lambda: self.tracker.log(dict(numbers)))

    def flush(self) -> None:
        """Raises InputError where something was not logged."""
        if self.failure:
            raise InputError(
                f"report_to wandb, which does not log ({clean_text(first_line(self.failure))})",
                "W&B to take what a run logs",
                "go on by --resume, with another --report_to where that does not help",
            ) from self.failure

    def close(self) -> None:
        """Ends the run of W&B, which waits until its server has everything."""
        self._log(self.tracker.finish)
        self.flush()


def last_id(folder: Path) -> str | None:
    """The id of the last run of W&B that wrote into the folder of this run."""
    found = [match for path in folder.glob("wandb/*run-*") if (match := RUN.fullmatch(path.name))]
    return max(found, key=lambda match: match[0].removeprefix("offline-"))[1] if found else None


def _start(work: Callable[[], object]) -> None:
    """Raises InputError where W&B refuses to."""
    try:
        work()
    except Exception as error:
        raise InputError(
            f"report_to wandb, which does not start ({clean_text(first_line(error))})",
            "an account that it can log to",
            OFFLINE,
        ) from error
