"""What a run logs for TensorBoard.  The step of a curve is the number of training tokens so far, over all passes.

Shapes: N tokens, L layers, K columns.
"""

import math
import os
import socket
import textwrap
import time
from collections.abc import Iterable, Mapping, Sequence
from io import BytesIO
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from streamprobe.evaluation.metrics import rank
from streamprobe.evaluation.scores import Scored
from streamprobe.reporting.tensorboard.layout import layout
from streamprobe.reporting.tensorboard.metric_grid import SCALES, metric_grids
from streamprobe.reporting.tensorboard.tags import ProbeGrid, family, tag
from streamprobe.system.files import unwritable

COMPARED = (
    "model data dtype quantization prompt support unlabelled split labels targets layers lags solvers l2 learning_rate "
    "standardize max_passes seed"
).split()  # the keys of a config by which the hparams tab tells runs apart
WIDTH = 130  # letters in a line of the text tab
BINS = 30  # of a histogram
POINTS = 101  # of a precision-recall curve, at equal steps of recall
SECONDS = 30  # between two times that events are put on disk, which is how often TensorBoard looks
MAPS_TIME = 0.01  # of a run's time that heat maps may take, beside those of the first pass and of the last
NUMBERS = count()  # of this process's event files


class EventFile:
    """A file of events for TensorBoard, written by the thread that makes them.

    What cannot be written, as on a full disk, waits in memory: the run goes on to its checkpoint, and `flush` behind
    that reports it.
    """

    def __init__(self, folder: Path, purge_step: int | None = None):
        """`purge_step` hides what earlier files of the folder hold from that step on."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{next(NUMBERS)}"
        self.path = folder / name
        try:
            self.file = open(self.path, "xb", buffering=0)
        except OSError as error:
            raise unwritable(self.path, error) from error
        self.waiting = BytesIO()
        self.records = RecordWriter(self.waiting)
        self.written = -math.inf
        self._put(Event(file_version="brain.Event:2"))
        if purge_step is not None:
            self._put(Event(step=purge_step, session_log=SessionLog(status=SessionLog.START)))

    def add(self, summary: Any, step: int | None) -> None:
        """One event."""
        from tensorboard.compat.proto.event_pb2 import Event

        self._put(Event(summary=summary, step=step))

    def _put(self, event: Any) -> None:
        event.wall_time = time.time()
        self.records.write(event.SerializeToString())
        if time.monotonic() - self.written > SECONDS:
            self.write()

    def write(self) -> OSError | None:
        """Puts on disk what waits, as far as that goes; returns what was in the way."""
        self.written, failure = time.monotonic(), None
        rest = memoryview(self.waiting.getvalue())
        try:
            while rest:
                rest = rest[self.file.write(rest) :]
        except OSError as error:
            failure = error
        self.waiting.seek(0)
        self.waiting.truncate()
        self.waiting.write(rest)
        return failure

    def flush(self) -> None:
        """Puts everything on disk.  Raises InputError where it does not take it."""
        failure = self.write()
        if failure:
            raise unwritable(self.path, failure) from failure

    def close(self) -> None:
        """Ends the file."""
        self.flush()
        self.file.close()


class Tracker:
    """Shows a run while it trains: curves of every probe under tags that sort, heat maps, and what it ends with."""

    def __init__(self, folder: Path, grids: Sequence[ProbeGrid], purge_step: int | None = None):
        """Writes event files into `folder`; on resume, `purge_step` hides what was logged after the checkpoint."""
        self.grids = metric_grids(grids)
        self.events = EventFile(folder, purge_step)
        self.unmapped: int | None = None  # the step of values that no heat map shows yet
        self.next_maps = -math.inf
        self._add_layout()

    def _add_layout(self) -> None:
        """The layout of the custom scalars; torch's way of writing it knows no closed categories."""
        from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
        from tensorboard.compat.proto.tensor_pb2 import TensorProto

        plugin = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="custom_scalars"))
        message = TensorProto(dtype="DT_STRING", string_val=[layout(self.grids).SerializeToString()])
        one = Summary.Value(tag="custom_scalars__config__", tensor=message, metadata=plugin)
        self.events.add(Summary(value=[one]), None)

    def probes(self, name: str, grid: ProbeGrid, values: Tensor, step: int) -> None:
        """One point on the curve of every probe of a solver; values [L, K], NaN left out."""
        self._points(
            (
                (f"{name}/{tag(grid, site, column)}", value)
                for site, row in zip(grid.sites, values.tolist(), strict=True)
                for column, value in zip(grid.columns, row, strict=True)
            ),
            step,
        )
        for metrics in self.grids if name in SCALES else ():
            metrics.take(name, grid, values)

    def maps(self, step: int) -> None:
        """The best layer and the best permuted control of each lag by the latest values, and heat maps of them all.

        Maps are drawn after the first pass and, in `close`, of the last one; between them when their time allows it.
        """
        for metrics in self.grids:
            self._points(
                (
                    (f"{metric}/{metrics.name}/{name}/lag{lag:+03d}", value)
                    for metric in SCALES
                    for name, values in metrics.highest(metric).items()
                    for lag, value in zip(metrics.lags, values.tolist(), strict=True)
                ),
                step,
            )
        self.unmapped = step
        if time.monotonic() >= self.next_maps:
            self._draw_maps(step)

    def _draw_maps(self, step: int) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        started = time.monotonic()
        for metrics in self.grids:
            for name, drawn in metrics.images().items():
                image = Summary.Image(
                    height=drawn.height, width=drawn.width, colorspace=3, encoded_image_string=drawn.png
                )
                one = Summary.Value(tag=f"heat maps/{metrics.name} {name}", image=image)
                self.events.add(Summary(value=[one]), step)
        self.unmapped, ended = None, time.monotonic()
        self.next_maps = ended + (ended - started) / MAPS_TIME

    def curves(self, grid: ProbeGrid, scored: Scored, auroc: Tensor, step: int) -> None:
        """Precision over recall, and logits of positives and of negatives, of the layer with the best auroc [L, K].

        One of each for every column that is no control; the points of a curve are at equal steps of recall.
        """
        for k, column in enumerate(grid.columns):
            if column.control or column.seed or grid.sites[0].is_control or auroc[:, k].isnan().all():
                continue
            i, valid = int(auroc[:, k].nan_to_num(-1).argmax()), scored.valid[:, k]
            scores, targets = scored.scores[valid, i, k], scored.targets[valid, k]
            name = f"{family(grid, column)}/lag{column.lag:+03d} best layer"
            self._precision_recall(name, scores, targets, step)
            self._logits(f"logits/{name} (0 negatives, 1 positives)", scores.double().numpy(), targets.numpy())

    def _precision_recall(self, name: str, scores: Tensor, targets: Tensor, step: int) -> None:
        from torch.utils.tensorboard.summary import pr_curve_raw

        ranking = rank(scores[:, None], targets)
        at = torch.linspace(ranking.n_positive, 1, POINTS).round().long() - 1
        tp, fp = ranking.tp[at, 0].double(), ranking.fp[at, 0].double()
        tn, fn = ranking.n_negative - fp, ranking.n_positive - tp
        precision, recall = tp / (tp + fp), tp / ranking.n_positive
        counts = (tp, fp, tn, fn, precision, recall)
        self.events.add(pr_curve_raw(f"precision/{name}", *counts, POINTS, None), step)

    def _logits(self, name: str, scores: NDArray[np.float64], targets: NDArray[np.bool_]) -> None:
        """How many of the negatives and of the positives have a logit, as fractions, at the steps 0 and 1.

        TensorBoard draws one step behind the other.
        """
        from torch.utils.tensorboard.summary import histogram_raw

        finite = np.isfinite(scores)
        scores, targets = scores[finite], targets[finite]
        edges = np.histogram_bin_edges(scores, BINS)
        for kind in (0, 1):
            own = scores[targets == bool(kind)]
            counts, _ = np.histogram(own, edges)
            fractions = (counts / max(1, len(own))).tolist()
            sums = own.sum(), np.square(own).sum()
            ends = edges.min(), edges.max()
            self.events.add(histogram_raw(name, *ends, 1, *sums, edges[1:].tolist(), fractions), kind)

    def _points(self, points: Iterable[tuple[str, float]], step: int) -> None:
        """A point on each of many curves, as one event; NaN left out."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value in points if not math.isnan(value)]
        self.events.add(Summary(value=values), step)

    def number(self, name: str, value: float, step: int) -> None:
        """One point on a curve of the whole run."""
        self._points([(name, value)], step)

    def text(self, name: str, text: str) -> None:
        """A page of the text tab, shown as it is but for lines that are too long."""
        from torch.utils.tensorboard.summary import text as text_summary

        wrap = textwrap.TextWrapper(WIDTH, replace_whitespace=False).wrap
        lines = [f"    {shown}" for line in text.split("\n") for shown in wrap(line) or [""]]
        self.events.add(text_summary(name, "\n".join(lines)), None)

    def outcome(self, config: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """The keys of a config that make runs differ beside the numbers they led to, for the hparams tab."""
        from torch.utils.tensorboard.summary import hparams

        keys = {
            name: value if isinstance(value, bool | int | float | str) else " ".join(map(str, value or ["none"]))
            for name, value in config.items()
            if name in COMPARED
        }
        for summary in hparams(keys, dict(metrics)):
            self.events.add(summary, None)
        self._points(metrics.items(), 0)

    def write(self) -> None:
        """Puts on disk what was logged so far, as far as that goes."""
        self.events.write()

    def flush(self) -> None:
        """Puts on disk what was logged so far."""
        self.events.flush()

    def close(self) -> None:
        """Draws the heat maps of the last pass and ends the event file."""
        if self.unmapped is not None:
            self._draw_maps(self.unmapped)
        self.events.close()
