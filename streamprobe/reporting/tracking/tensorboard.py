"""TensorBoard, by an event file in the run's folder.

Shapes: N tokens.
"""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from streamprobe.evaluation.metrics import rank
from streamprobe.reporting.tracking.base import Separation
from streamprobe.reporting.tracking.event_file import EventFile
from streamprobe.reporting.tracking.images import Picture
from streamprobe.reporting.tracking.layout import Category

COMPARED = (
    "model data dtype quantization prompt support unlabelled split labels targets layers sites hookpoints lags kinds "
    "solvers l2 learning_rate standardize max_passes seed"
).split()  # the keys of a config by which the hparams tab tells runs apart
WIDTH = 130  # letters in a line of the text tab
BINS = 30  # of a histogram
POINTS = 101  # of a precision-recall curve, at equal steps of recall


class TensorBoard:
    """The backend of TensorBoard."""

    def __init__(self, folder: Path, config: Mapping[str, Any], purge_step: int | None = None):
        """Writes an event file into `folder`; on resume, `purge_step` hides what was logged after the checkpoint."""
        self.config = config
        self.events = EventFile(folder, purge_step)

    def charts(self, categories: Sequence[Category]) -> None:
        """The layout of the Custom Scalars tab; torch's way of writing it knows no closed categories."""
        from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
        from tensorboard.compat.proto.tensor_pb2 import TensorProto
        from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

        layout = Layout()
        for category in categories:
            made = layout.category.add(title=category.title, closed=not category.is_open)
            for title, curves in category.charts.items():
                made.chart.add(title=title).multiline.tag.append(curves)
        plugin = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="custom_scalars"))
        message = TensorProto(dtype="DT_STRING", string_val=[layout.SerializeToString()])
        one = Summary.Value(tag="custom_scalars__config__", tensor=message, metadata=plugin)
        self.events.add(Summary(value=[one]), None)

    def points(self, values: Mapping[str, float], step: int) -> None:
        """A point on each of many curves, as one event."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        points = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self.events.add(Summary(value=points), step)

    def epochs(self, values: Mapping[str, Sequence[float]]) -> None:
        """Curves whose steps are epochs."""
        for epoch, own in enumerate(zip(*values.values(), strict=True)):
            self.points(dict(zip(values, own, strict=True)), epoch)

    def images(self, pictures: Mapping[str, Picture], step: int) -> None:
        """The Images tab."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        for name, drawn in pictures.items():
            image = Summary.Image(height=drawn.height, width=drawn.width, colorspace=3, encoded_image_string=drawn.png)
            self.events.add(Summary(value=[Summary.Value(tag=name, image=image)]), step)

    def separation(self, found: Separation, step: int) -> None:
        """Precision over recall, and histograms of the logits of both classes."""
        name, scores, targets = found
        self._precision_recall(name, scores, targets, step)
        self._logits(f"logits/{name} (0 negatives, 1 positives)", scores.double().numpy(), targets.numpy())

    def _precision_recall(self, name: str, scores: Tensor, targets: Tensor, step: int) -> None:
        """The points of the curve are at equal steps of recall."""
        from torch.utils.tensorboard.summary import pr_curve_raw

        ranking = rank(scores[:, None], targets)
        at = torch.linspace(ranking.n_positive, 1, POINTS).round().long() - 1
        tp, fp = ranking.tp[0, at].double(), ranking.fp[0, at].double()
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

    def text(self, name: str, text: str) -> None:
        """A page of the text tab, shown as it is but for lines that are too long."""
        from torch.utils.tensorboard.summary import text as text_summary

        wrap = textwrap.TextWrapper(WIDTH, replace_whitespace=False).wrap
        lines = [f"    {shown}" for line in text.split("\n") for shown in wrap(line) or [""]]
        self.events.add(text_summary(name, "\n".join(lines)), None)

    def outcome(self, said: str, numbers: Mapping[str, float]) -> None:
        """The first page of the text tab; the keys that make runs differ beside the numbers, for the hparams tab."""
        from torch.utils.tensorboard.summary import hparams

        self.text("1 verdict", said)
        keys = {
            name: value if isinstance(value, bool | int | float | str) else " ".join(map(str, value or ["none"]))
            for name, value in self.config.items()
            if name in COMPARED
        }
        for summary in hparams(keys, dict(numbers)):
            self.events.add(summary, None)
        self.points(numbers, 0)

    def flush(self) -> None:
        """Puts on disk what was logged so far.  Raises InputError where it does not take it."""
        self.events.flush()

    def close(self) -> None:
        """Ends the event file."""
        self.events.close()
