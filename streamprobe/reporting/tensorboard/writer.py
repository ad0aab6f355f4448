"""TensorBoard.  The step of every curve is the number of training tokens seen so far, over all passes.

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
from streamprobe.reporting.tensorboard.heat_map import size
from streamprobe.reporting.tensorboard.layout import SHOWN, Grid, family, layout, make_boards, tag
from streamprobe.system.files import unwritable

COMPARED = (
    "model", "data", "dtype", "quantization", "prompt", "support", "unlabelled", "split", "labels", "targets", "layers",
    "lags", "solvers", "l2", "learning_rate", "standardize", "max_passes", "seed",
)  # fmt: skip
WIDTH = 130  # letters in a line of the text tab
BINS = 30  # of a histogram
POINTS = 101  # of a precision-recall curve, at equal steps of recall
SECONDS = 30  # between two times that events are put on disk, which is how often TensorBoard looks
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
    """Curves of every probe under tags that sort: val_auroc/newton/backtracking/token/layer12/lag+08."""

    def __init__(self, folder: Path, grids: Sequence[Grid], purge_step: int | None = None):
        """Writes event files into `folder`; on resume, `purge_step` hides what was logged after the checkpoint."""
        self.boards = make_boards(grids)
        self.events = EventFile(folder, purge_step)
        self._charts()

    def _charts(self) -> None:
        """The layout of the custom scalars; torch's way of writing it knows no closed categories."""
        from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
        from tensorboard.compat.proto.tensor_pb2 import TensorProto

        plugin = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="custom_scalars"))
        held = TensorProto(dtype="DT_STRING", string_val=[layout(self.boards).SerializeToString()])
        one = Summary.Value(tag="custom_scalars__config__", tensor=held, metadata=plugin)
        self._add(Summary(value=[one]), None)

    def probes(self, name: str, grid: Grid, values: Tensor, step: int) -> None:
        """One point on the curve of every probe of a solver; values [L, K], NaN left out."""
        self._points(
            (
                (f"{name}/{tag(grid, site, column)}", value)
                for site, row in zip(grid.sites, values.tolist(), strict=True)
                for column, value in zip(grid.columns, row, strict=True)
            ),
            step,
        )
        for board in self.boards if name in SHOWN else ():
            board.take(name, grid, values)

    def maps(self, step: int) -> None:
        """Heat maps of the latest values, and the best layer and the best permuted control of each lag."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        for board in self.boards:
            self._points(
                (
                    (f"{metric}/{board.name}/{name}/lag{lag:+03d}", value)
                    for metric in SHOWN
                    for name, values in board.highest(metric).items()
                    for lag, value in zip(board.lags, values.tolist(), strict=True)
                ),
                step,
            )
            for name, png in board.images().items():
                width, height = size(png)
                image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=png)
                one = Summary.Value(tag=f"heat maps/{board.name} {name}", image=image)
                self._add(Summary(value=[one]), step)

    def curves(self, grid: Grid, scored: Scored, auroc: Tensor, step: int) -> None:
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
        self._add(pr_curve_raw(f"precision/{name}", *counts, POINTS, None), step)

    def _logits(self, name: str, scores: NDArray[np.float64], targets: NDArray[np.bool_]) -> None:
        """The shares of negatives and positives by logit, as steps 0 and 1: TensorBoard draws one behind the other."""
        from torch.utils.tensorboard.summary import histogram_raw

        finite = np.isfinite(scores)
        scores, targets = scores[finite], targets[finite]
        edges = np.histogram_bin_edges(scores, BINS)
        for kind in (0, 1):
            own = scores[targets == bool(kind)]
            share = np.histogram(own, edges)[0] / max(1, len(own))
            limits, sums = edges[1:].tolist(), (own.sum(), np.square(own).sum())
            self._add(histogram_raw(name, edges[0], edges[-1], 1, *sums, limits, share.tolist()), kind)

    def _points(self, points: Iterable[tuple[str, float]], step: int) -> None:
        """A point on each of many curves, as one event; NaN left out."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value in points if not math.isnan(value)]
        self._add(Summary(value=values), step)

    def _add(self, summary: Any, step: int | None) -> None:
        self.events.add(summary, step)

    def number(self, name: str, value: float, step: int) -> None:
        """One point on a curve of the whole run."""
        self._points([(name, value)], step)

    def text(self, name: str, text: str) -> None:
        """A page of the text tab, shown as it is but for lines that are too long."""
        from torch.utils.tensorboard.summary import text as text_summary

        lines = [
            part for line in text.split("\n") for part in textwrap.wrap(line, WIDTH, replace_whitespace=False) or [""]
        ]
        self._add(text_summary(name, "\n".join(f"    {line}" for line in lines)), None)

    def outcome(self, config: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """The keys of a config that make runs differ beside the numbers they led to, for the hparams tab."""
        from torch.utils.tensorboard.summary import hparams

        keys = {
            name: value if isinstance(value, bool | int | float | str) else " ".join(map(str, value or ["none"]))
            for name, value in config.items()
            if name in COMPARED
        }
        for summary in hparams(keys, dict(metrics)):
            self._add(summary, None)
        self._points(metrics.items(), 0)

    def write(self) -> None:
        """Puts on disk what was logged so far, as far as that goes."""
        self.events.write()

    def flush(self) -> None:
        """Puts on disk what was logged so far."""
        self.events.flush()

    def close(self) -> None:
        """Ends the event file."""
        self.events.close()
