"""The backends that a run can log to.  To add one, add a row to TRACKERS of config/schema.py and to OPEN."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from streamprobe.reporting.tracking.base import Backend
from streamprobe.reporting.tracking.tensorboard import TensorBoard
from streamprobe.reporting.tracking.weights_and_biases import WeightsAndBiases, check_wandb


class Opened(NamedTuple):
    """How a backend is checked before anything is read, and opened when training begins."""

    check: Callable[[], None]  # raises InputError where it cannot be used
    open: Callable[[Path, Mapping[str, Any], int | None], Backend]  # the run's folder, its config, first step to purge


OPEN = {
    "tensorboard": Opened(lambda: None, TensorBoard),
    "wandb": Opened(check_wandb, lambda folder, config, purge: WeightsAndBiases(folder, config, purge is not None)),
}


def check_backends(names: Sequence[str]) -> None:
    """Raises InputError where one of the backends (`none` is none) is not installed, or has nowhere to log to."""
    for name in names:
        if name in OPEN:
            OPEN[name].check()


def open_backends(
    names: Sequence[str], folder: Path, config: Mapping[str, Any], purge_step: int | None = None
) -> list[Backend]:
    """The backends of these names for the run in `folder`, whose flat config they show.

    `purge_step` on resume: the first step whose values, which the interrupted run may have logged, are logged again.
    """
    return [OPEN[name].open(folder, config, purge_step) for name in names if name in OPEN]
