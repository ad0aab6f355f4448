"""What accelerate's tracker and ours ask of W&B, with the same names: everything that it is given becomes a line of JSON."""

import json
import os
from pathlib import Path
from typing import Any

run: Any = None  # the one that was started last
config: Any = None


class Error(Exception):
    """As W&B's own."""


class Image:
    """An image that has a size."""

    def __init__(self, image: Any):
        self.size = image.size


class Table:
    """Rows under columns."""

    def __init__(self, columns: Any, data: Any, dataframe: Any = None):
        self.columns, self.data = columns, data


class Run:
    """A run whose steps must rise: a lower one is not logged, as with W&B."""

    def __init__(self, folder: Path, keys: dict[str, Any]):
        self.id, self.step = keys.get("id") or f"id{len(list(folder.glob('*run-*')))}", 0
        self.path = folder / f"offline-run-20260101_00000{len(list(folder.glob('*run-*')))}-{self.id}" / "log.jsonl"
        self.path.parent.mkdir(parents=True)
        self.put("init", keys)

    def put(self, kind: str, value: Any) -> None:
        """A line."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps([kind, value], default=lambda made: vars(made)) + "\n")

    def log(self, values: dict[str, Any], step: int | None = None) -> None:
        """Values at a step, or at the next one."""
        if os.environ.get("STUB_FAILS"):
            raise BrokenPipeError("W&B is gone")
        if step is not None and step < self.step:
            self.put("ignored", values)
            return
        self.put("log", [step, values])
        self.step = self.step + 1 if step is None else step

    def update(self, values: dict[str, Any], allow_val_change: bool) -> None:
        """The keys of the run."""
        self.put("config", values)

    def finish(self) -> None:
        """The end."""
        self.put("finish", None)


def login() -> bool:
    """Refuses without a key."""
    if not os.environ.get("WANDB_API_KEY"):
        raise Error("No API key configured. Use `wandb login` to log in.")
    return True


def init(*, dir: Path, **keys: Any) -> Run:
    """Starts a run in the folder `dir`."""
    global run, config
    run = config = Run(Path(dir) / "wandb", keys)
    return run
