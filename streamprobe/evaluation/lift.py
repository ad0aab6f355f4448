"""How far each probe is above the best single control: a column of the results, of which no verdict is made.

A layer that knows two things at once may be above each control that knows one of them and foresee nothing: what counts
for that is its gain over all of them together (see `gains`).

Shapes: R resamples, Q differences that are looked at together.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from streamprobe.controls.table import CONTROLS
from streamprobe.evaluation.rows import Judged, intervals_of_differences
from streamprobe.evaluation.significance import LEAST_CHAINS, lower_bounds


class Comparison(NamedTuple):
    """A probe beside one of the controls that it must beat."""

    probe: Judged
    control: Judged

    @property
    def lift(self) -> float:
        """AUROC of the probe less that of the control."""
        return self.probe.row["auroc"] - self.control.row["auroc"]

    @property
    def n_chains(self) -> int:
        """Test chains with a positive by which both are judged."""
        return min(each.row["n_positive_chains"] for each in self)

    @property
    def is_sound(self) -> bool:
        """Whether resampling its chains tells of chance."""
        return self.n_chains >= LEAST_CHAINS and len(self.probe.areas) > 0


def compare_with_controls(family: Sequence[Judged]) -> None:
    """Fills in the lifts of all probes of one solver, label and target, which are looked at together.

    The corrected low end is for probes that can be judged by enough chains.
    """
    compared = [Comparison(probe, control) for probe in family for control in _controls_of(probe, family)]
    hardest: dict[int, Comparison] = {}  # of each probe, the control that leaves it the least lift
    for each in compared:
        before = hardest.setdefault(id(each.probe), each)
        if each.lift < before.lift:
            hardest[id(each.probe)] = each
    intervals = intervals_of_differences([(each.probe, each.control) for each in hardest.values()])
    for each, (low, high) in zip(hardest.values(), intervals, strict=True):
        lift = {"lift": each.lift, "lift_low": low, "lift_high": high, "best_control": each.control.row["control"]}
        each.probe.row.update(lift)
    sound = [each for each in compared if each.is_sound]
    if not sound:
        return
    points = torch.tensor([each.lift for each in sound], dtype=torch.float64)
    resampled = torch.stack([each.probe.areas - each.control.areas for each in sound], dim=1)  # [R, Q]
    bounds = lower_bounds(points, resampled, min(each.n_chains for each in sound)).tolist()
    for each, bound in zip(sound, bounds, strict=True):
        before = each.probe.row["lift_low_corrected"]
        each.probe.row["lift_low_corrected"] = min(bound, math.inf if math.isnan(before) else before)
    for each in compared:
        if not each.is_sound:  # not above a control that cannot be judged
            each.probe.row["lift_low_corrected"] = math.nan


def _controls_of(probe: Judged, family: Sequence[Judged]) -> list[Judged]:
    """What the probe must beat: single controls of its lag, of no layer or of its own; none of a control."""
    row = probe.row
    if row["control"] or math.isnan(row["auroc"]):
        return []
    single = [other for other in family if (name := other.row["control"]) and CONTROLS[name].under_lift]
    rivals = [other for other in single if other.row["layer"] in ("", row["layer"])]
    return [other for other in rivals if other.row["lag"] == row["lag"] and not math.isnan(other.row["auroc"])]
