"""The rows of a run's results, one for every probe and control.

Shapes: R resamples.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from streamprobe.evaluation.bootstrap import percentiles

FIELDS = (
    "solver,layer,label,target,lag,control,split,auroc,auroc_low,auroc_high,average_precision,average_precision_low,"
    "average_precision_high,gain_bits,gain_bits_low,gain_bits_high,gain_bits_low_corrected,gain,gain_low,gain_high,"
    "gain_low_corrected,gain_within,gain_within_low,gain_within_high,gain_within_low_corrected,penalty,"
    "nested_gradient_norm,lift,lift_low,lift_high,lift_low_corrected,best_control,f1,threshold,f1_at_half,"
    "tpr_at_5fpr,brier,base_rate,n_tokens,n_positive,n_chains,n_positive_chains,auroc_spread,best_pass,gradient_norm"
).split(",")
Row = dict[str, Any]
JOINT_CHAIN = "joint+chain"  # the control that a gain is over
BASELINE_EXACTNESS = 10  # by which its tolerance is smaller than that of what is compared to it
GAINS = ("gain_bits", "gain", "gain_within")  # what a layer adds to the joint control: see `gains`
COMPARED: Row = {  # the fields of comparisons with controls, where there is none
    **{f"{name}{end}": math.nan for name in (*GAINS, "lift") for end in ("", "_low", "_high", "_low_corrected")},
    "penalty": math.nan,
    "nested_gradient_norm": math.nan,
    "best_control": "",
}


class Judged(NamedTuple):
    """A row, and its AUROC in every resample [R] (none where R = 0), paired with those of all other rows."""

    row: Row
    areas: Tensor


def group_by(judged: Iterable[Judged], key: Callable[[Row], Any]) -> list[tuple[Any, list[Judged]]]:
    """The judged grouped by a key of their rows, in the order of that key."""
    ordered = sorted(judged, key=lambda each: key(each.row))
    return [(value, list(own)) for value, own in groupby(ordered, key=lambda each: key(each.row))]


def intervals_of_differences(pairs: Sequence[tuple[Judged, Judged]]) -> list[tuple[float, float]]:
    """For each pair the 95% interval of the first AUROC less the second; NaN where one of them was not resampled."""
    found = [(math.nan, math.nan)] * len(pairs)
    known = [n for n, (a, b) in enumerate(pairs) if len(a.areas) == len(b.areas) > 0]
    if known:
        resampled = torch.stack([pairs[n][0].areas - pairs[n][1].areas for n in known], dim=1)  # [R, pairs]
        for n, (low, high) in zip(known, percentiles(resampled).tolist(), strict=True):
            found[n] = (low, high)
    return found


def place(row: Row) -> str:
    """Where a row stands in its lag: layer12, embed, permuted layer12."""
    layer = f"layer{int(row['layer']):02d}" if row["layer"] != "" else ""
    return " ".join(filter(None, (row["control"], layer)))
