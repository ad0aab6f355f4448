"""How far each probe is above what it must beat, and the sentence that says what may be claimed.

Shapes: R resamples, Q differences that are looked at together.
"""

import math
from collections.abc import Sequence
from operator import itemgetter
from typing import NamedTuple

import torch

from streamprobe.controls.table import CONTROLS
from streamprobe.evaluation.rows import Judged, Row, group_by, intervals_of_differences
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
    """What the probe must beat: controls of its lag, of no layer or of its own, for lifts; none of a control."""
    row = probe.row
    if row["control"] or math.isnan(row["auroc"]):
        return []
    rivals = [other for other in family if other.row["control"] and other.row["layer"] in ("", row["layer"])]
    apart = {name for name, control in CONTROLS.items() if not control.under_lift}
    rivals = [other for other in rivals if other.row["control"] not in apart]
    return [other for other in rivals if other.row["lag"] == row["lag"] and not math.isnan(other.row["auroc"])]


def verdicts(judged: Sequence[Judged]) -> list[str]:
    """For each solver, label and target, the largest lag at which a layer is certainly above every control."""
    return [
        f"{label}, target {target}, solver {solver}: {_verdict(own)}"
        for (solver, label, target), own in group_by(judged, itemgetter("solver", "label", "target"))
    ]


def _verdict(family: Sequence[Judged]) -> str:
    rows = [each.row for each in family if not each.row["control"]]
    looked = [row for row in rows if not math.isnan(row["lift_low_corrected"])]
    controls = sorted((each.row for each in family if each.row["control"]), key=lambda row: row["layer"] != "")
    beaten = ", ".join(dict.fromkeys(row["control"] for row in controls))
    if not looked:
        most = max(row["n_positive_chains"] for row in rows)
        if not beaten:
            return "no verdict without controls"
        if most < LEAST_CHAINS:
            return f"no verdict, since at most {most} test chains hold a positive, and {LEAST_CHAINS} are needed"
        if not any(len(each.areas) for each in family):
            return "no verdict without resamples (--bootstrap)"
        return "no verdict, since no control could be judged at the lags of a probe"
    corrected = f"corrected for the {len(looked)} probes looked at"
    clear = [row for row in looked if row["lift_low_corrected"] > 0]
    if not clear:
        return f"at no lag is a layer certainly above every control ({beaten}; {corrected})"
    far = furthest(clear)
    return (
        f"lag {far['lag']:+d} is the largest at which a layer is certainly above every control ({beaten}): layer "
        f"{far['layer']}, AUROC {far['auroc']:.3f}, {far['lift']:.3f} above {far['best_control']}, by at least "
        f"{far['lift_low_corrected']:.3f} ({corrected})"
    )


def furthest(clear: Sequence[Row]) -> Row:
    """Of the rows of probes that are certainly above every control the one that a verdict names."""
    return max(clear, key=lambda row: (row["lag"], row["lift_low_corrected"]))


def probe_of_verdict(rows: Sequence[Row]) -> Row:
    """The row of the probe that a run's verdict names, given those of its probes without controls.

    Where no probe is certainly above every control: of the lag nearest to 0, and of the first target that has it, the
    one with the highest AUROC.
    """
    clear = [row for row in rows if row["lift_low_corrected"] > 0]
    if clear:
        return furthest(clear)
    nearest = min(rows, key=lambda row: abs(row["lag"]))
    near = [row for row in rows if (row["lag"], row["target"]) == (nearest["lag"], nearest["target"])]
    return max(near, key=lambda row: -1.0 if math.isnan(row["auroc"]) else row["auroc"])
