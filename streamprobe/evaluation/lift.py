"""How far each probe is above the best single control, and above a linear one: columns of the results, of which no
verdict is made.

A layer that knows two things at once may be above each control that knows one of them and foresee nothing: what counts
for that is its gain over all of them together (see `gains`).

Shapes: R resamples, Q differences that are looked at together.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from streamprobe.controls.table import CONTROLS
from streamprobe.evaluation.rows import Judged, Row, intervals_of_differences
from streamprobe.evaluation.significance import LEAST_CHAINS, lower_bounds
from streamprobe.probes.linear import LINEAR


class Comparison(NamedTuple):
    """A probe beside one of those that it must beat."""

    probe: Judged
    control: Judged

    @property
    def lift(self) -> float:
        """AUROC of the probe less that of the other."""
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
    hardest = _compare("lift", [Comparison(probe, other) for probe in family for other in _controls_of(probe, family)])
    for each in hardest:
        each.probe.row["best_control"] = each.control.row["control"]


def compare_with_linear(family: Sequence[Judged], tolerance: float) -> None:
    """Fills in how far the probes of other kinds are above linear ones, `over_linear`; looked at together.

    Where a linear one has not converged there is no corrected low end: what another is above it may be training.
    One that reads all layers is compared with the linear probe of each, and is as far above them as above the best.
    """
    linear = [each for each in family if each.row["kind"] == LINEAR and not each.row["control"]]
    compared = [Comparison(probe, other) for probe in family for other in _linear_ones_of(probe, linear)]
    _compare("over_linear", compared)
    for each in compared:
        norm = each.control.row["gradient_norm"]
        if tolerance < math.inf and not norm <= tolerance:
            each.probe.row["over_linear_low_corrected"] = math.nan


def _compare(name: str, compared: Sequence[Comparison]) -> list[Comparison]:
    """Fills in the fields `name` of probes that are compared; returns for each the one that leaves it least."""
    hardest: dict[int, Comparison] = {}  # of each probe
    for each in compared:
        before = hardest.setdefault(id(each.probe), each)
        if each.lift < before.lift:
            hardest[id(each.probe)] = each
    intervals = intervals_of_differences([(each.probe, each.control) for each in hardest.values()])
    for each, (low, high) in zip(hardest.values(), intervals, strict=True):
        each.probe.row.update({name: each.lift, f"{name}_low": low, f"{name}_high": high})
    _correct(f"{name}_low_corrected", compared)
    return list(hardest.values())


def _correct(name: str, compared: Sequence[Comparison]) -> None:
    """Fills in the corrected low ends, `name`, of probes whose comparisons are looked at together."""
    sound = [each for each in compared if each.is_sound]
    if not sound:
        return
    points = torch.tensor([each.lift for each in sound], dtype=torch.float64)
    resampled = torch.stack([each.probe.areas - each.control.areas for each in sound], dim=1)  # [R, Q]
    bounds = lower_bounds(points, resampled, min(each.n_chains for each in sound)).tolist()
    for each, bound in zip(sound, bounds, strict=True):
        before = each.probe.row[name]
        each.probe.row[name] = min(bound, math.inf if math.isnan(before) else before)
    for each in compared:
        if not each.is_sound:  # not above one that cannot be judged
            each.probe.row[name] = math.nan


def _controls_of(probe: Judged, family: Sequence[Judged]) -> list[Judged]:
    """What the probe must beat: single controls of its lag, of no layer or of what it reads; none of a control."""
    row = probe.row
    if row["control"] or math.isnan(row["auroc"]):
        return []
    single = [other for other in family if (name := other.row["control"]) and CONTROLS[name].under_lift]
    rivals = [other for other in single if other.row["layer"] == "" or _reads(row, other.row)]
    return [other for other in rivals if other.row["lag"] == row["lag"] and not math.isnan(other.row["auroc"])]


def _linear_ones_of(probe: Judged, linear: Sequence[Judged]) -> list[Judged]:
    """The linear probes of the same lag at what the probe reads, where that is of another kind."""
    row = probe.row
    if row["control"] or row["kind"] == LINEAR or math.isnan(row["auroc"]):
        return []
    return [other for other in linear if other.row["lag"] == row["lag"] and _reads(row, other.row)]


def _reads(row: Row, other: Row) -> bool:
    """Whether the probe of a row reads the layer of the other one: its own, or all."""
    return row["layer"] == "" or (row["site"], row["layer"]) == (other["site"], other["layer"])
