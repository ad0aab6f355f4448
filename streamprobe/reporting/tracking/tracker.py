"""What a run logs while it trains.  The step of a curve is the number of training tokens so far, over all passes.

Shapes: N tokens, L layers, K columns.
"""

import math
import time
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from torch import Tensor

from streamprobe.evaluation.scores import Scored, tokens_of_column
from streamprobe.probes.base import Probes
from streamprobe.reporting.tracking.base import Backend, Separation
from streamprobe.reporting.tracking.epochs import curves_over_linear
from streamprobe.reporting.tracking.layout import SUMMARISED, layout
from streamprobe.reporting.tracking.metric_grid import SCALES, metric_grids
from streamprobe.reporting.tracking.tags import ProbeGrid, family, place, tag

MAPS_TIME = 0.01  # of a run's time that heat maps may take, beside those of the end
FIRST_MAPS = 60.0  # seconds after which there are some: a run of a minute shows its last ones soon enough


class Tracker:
    """Shows a run while it trains: curves under tags that sort, heat maps, and what it ends with."""

    def __init__(
        self,
        backends: Sequence[Backend],
        grids: Sequence[ProbeGrid],
        *,
        every: bool = False,
        in_epochs: Sequence[str] = (),
    ):
        """Hands all that is logged of the solvers `grids` to each of the backends; none of them: logs nothing.

        Of the probes those that matter have curves: the best layer and the best control of each lag, and the median and
        the largest loss and gradient norm.  `every`: each probe has its own ones, too.  `in_epochs` are the kinds of
        which `epochs` will be told.
        """
        self.backends, self.every = backends, every
        self.shown, self.grids = list(grids), metric_grids(grids)
        self.unmapped: int | None = None  # the step of values that no heat map shows yet
        self.mapped, self.next_maps = 0, time.monotonic() + FIRST_MAPS
        charts = layout(self.grids, every, in_epochs)
        for backend in backends:
            backend.charts(charts)

    def probes(self, name: str, grid: ProbeGrid, values: Tensor, step: int) -> None:
        """A metric of all probes of a solver; values [L, K], NaN left out.  Nothing is shown of other ones."""
        if not any(grid is shown for shown in self.shown):
            return
        if self.every:
            self._points(
                (
                    (f"{name}/{tag(family(grid, column), column.lag, place(site, column))}", value)
                    for site, row in zip(grid.sites, values.tolist(), strict=True)
                    for column, value in zip(grid.columns, row, strict=True)
                ),
                step,
            )
        if name in SUMMARISED and not grid.sites[0].is_control:
            self._summarise(f"{name}/{grid.name}", grid, values, step)
        for metrics in self.grids if name in SCALES else ():
            metrics.take(name, grid, values)

    def _summarise(self, name: str, grid: ProbeGrid, values: Tensor, step: int) -> None:
        """The median and the largest value of the probes that are no controls."""
        own = values.cpu()[:, [not column.control for column in grid.columns]].double().numpy()
        known = own[~np.isnan(own)]
        if known.size:
            largest = float(known.max())
            self._points([(f"{name}/median", float(np.median(known))), (f"{name}/largest", largest)], step)

    def epochs(self, probes: Probes, losses: Tensor) -> None:
        """How kinds of probes that begin at the linear ones go on: see `curves_over_linear`."""
        curves = curves_over_linear(probes, losses, self.every) if self.backends else {}
        for backend in self.backends:
            backend.epochs(curves)

    def compare(self, step: int) -> None:
        """The best layer and the best control of each lag, where there are new values, and heat maps of all values.

        Maps are drawn in `outcome`; before it once a run takes a while, whenever twice as many tokens have been seen,
        if their time allows it.
        """
        if not self.backends:
            return
        fresh = [metrics for metrics in self.grids if metrics.fresh]
        for metrics in fresh:
            metrics.fresh = False
            for metric in SCALES:
                best = metrics.best(metric)
                if self.every:
                    best |= {f"control {name}": values for name, values in metrics.best_relabelled(metric).items()}
                self._points(
                    (
                        (f"{metric}/{tag(metrics.name, lag, name)}", value)
                        for name, values in best.items()
                        for lag, value in zip(metrics.lags, values.tolist(), strict=True)
                    ),
                    step,
                )
        self.unmapped = step if fresh else self.unmapped
        if step >= 2 * self.mapped and time.monotonic() >= self.next_maps:
            self._draw_maps(step)

    def _draw_maps(self, step: int) -> None:
        started = time.monotonic()
        for metrics in self.grids:
            drawn = {f"heat maps/{metrics.name} {name}": picture for name, picture in metrics.images().items()}
            for backend in self.backends:
                backend.images(drawn, step)
        self.unmapped, self.mapped, ended = None, step, time.monotonic()
        self.next_maps = ended + (ended - started) / MAPS_TIME

    def curves(self, grid: ProbeGrid, scored: Scored, auroc: Tensor, step: int) -> None:
        """How the layer with the best auroc [L, K] parts the classes of every column that is no control."""
        for k, column in enumerate(grid.columns):
            if column.control or not column.is_first or grid.sites[0].is_control or auroc[:, k].isnan().all():
                continue
            asked, i = tokens_of_column([(scored, k)]), int(auroc[:, k].nan_to_num(-1).argmax())
            name = tag(family(grid, column), column.lag, "best layer")
            found = Separation(name, asked.scores[:, i].cpu(), asked.targets.cpu())
            for backend in self.backends:
                backend.separation(found, step)

    def _points(self, points: Iterable[tuple[str, float]], step: int) -> None:
        """A point on each of many curves; NaN left out."""
        values = {name: value for name, value in points if not math.isnan(value)}
        for backend in self.backends:
            backend.points(values, step)

    def number(self, name: str, value: float, step: int) -> None:
        """One point on a curve of the whole run."""
        self._points([(name, value)], step)

    def text(self, name: str, text: str) -> None:
        """A page of text."""
        for backend in self.backends:
            backend.text(name, text)

    def outcome(self, said: str, numbers: Mapping[str, float]) -> None:
        """What the run ends with: heat maps of the last pass, the verdict with its table, and the numbers by which runs
        compare.
        """
        if self.unmapped is not None:
            self._draw_maps(self.unmapped)
        for backend in self.backends:
            backend.outcome(said, numbers)

    def flush(self) -> None:
        """Puts on disk what was logged so far.  Raises InputError where something was not logged."""
        for backend in self.backends:
            backend.flush()

    def close(self) -> None:
        """Ends the backends.  Raises InputError as `flush` does."""
        for backend in self.backends:
            backend.close()
