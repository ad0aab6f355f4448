"""Where a stream's records come from: data, which rank 0 alone reads, or the model itself, on all ranks."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from streamprobe.config.data_keys import DataConfig
from streamprobe.config.load import RunConfig
from streamprobe.data.problems import Problems
from streamprobe.data.sources import Stream
from streamprobe.data.streams import open_stream
from streamprobe.model.backbone import load_backbone
from streamprobe.run.generated import open_generated, problems_of
from streamprobe.run.inputs import Texts, format_options, open_texts
from streamprobe.system.distributed import is_main, share_bytes


@dataclass(frozen=True)
class Format:
    """How the records of a stream lie in its data, as every rank is told."""

    name: str
    shown: str
    keys: Mapping[str, Any]  # of the config, which say so

    def __str__(self) -> str:
        return self.shown


@dataclass(frozen=True)
class Opened:
    """A stream whose format is known."""

    found: Format
    stream: Any = None  # a `Stream`, on the ranks that read it
    problems: Problems | None = None  # where the model writes


@dataclass(frozen=True)
class Records:
    """Where records come from, and what they are read with."""

    config: RunConfig  # with what the data and the model settle
    texts: Texts  # without records
    stream: Stream | None  # None on ranks that are told what came
    writer: Any = None  # the whole model, where it writes


def open_records(config: RunConfig, stopped: Callable[[], bool]) -> Records:
    """Opens the stream of a config; `stopped` ends it.  Raises InputError for data that are none."""
    stream = config.stream
    if stream.source != "generate":
        texts, settled, opened = open_texts(
            config, lambda data: _open_data(data, wait_seconds=stream.wait_seconds, stopped=stopped)
        )
        return Records(settled, texts, opened.stream)
    texts, settled, opened = open_texts(config, _open_problems)
    assert opened.problems is not None
    writer = load_backbone(config.model.model, None, **config.model.loading)
    written = open_generated(settled, opened.problems, texts.tokenizer, writer, stopped=stopped)
    return Records(settled, texts, written, writer)


def _open_data(data: DataConfig, *, wait_seconds: float | None, stopped: Callable[[], bool]) -> Opened:
    """Opens data on rank 0, which tells the others of their format."""
    if is_main():
        stream = open_stream(
            data.data,
            data.asked,
            format_options(data),
            split=data.data_split,
            config=data.data_config,
            wait_seconds=wait_seconds,
            stopped=stopped,
        )
        found = stream.found
        share_bytes(json.dumps([found.name, str(found), found.keys]).encode())
        return Opened(Format(found.name, str(found), found.keys), stream)
    return Opened(Format(*json.loads(share_bytes(b""))))


def _open_problems(data: DataConfig) -> Opened:
    """Reads the problems that the model is to answer."""
    problems = problems_of(data)
    name = "messages" if problems.is_chat else "text"
    shown = f"answers of the model to problems in {problems.problem_column!r}"
    return Opened(Format(name, shown, problems.keys), problems=problems)
