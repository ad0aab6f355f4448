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
from streamprobe.lags import Column
from streamprobe.probes.linear import LINEAR
from streamprobe.probes.sites import ALL_LAYERS, RESID_POST, Site

FIELDS = (
    "solver,kind,site,layer,label,target,lag,control,split,auroc,auroc_low,auroc_high,average_precision,average_precision_low,"
    "average_precision_high,gain_bits,gain_bits_low,gain_bits_high,gain_bits_low_corrected,gain,gain_low,gain_high,"
    "gain_low_corrected,gain_within,gain_within_low,gain_within_high,gain_within_low_corrected,penalty,"
    "nested_gradient_norm,lift,lift_low,lift_high,lift_low_corrected,best_control,over_linear,over_linear_low,"
    "over_linear_high,over_linear_low_corrected,f1,threshold,f1_at_half,tpr_at_5fpr,brier,base_rate,n_tokens,n_positive,"
    "n_chains,n_positive_chains,auroc_spread,best_pass,gradient_norm"
).split(",")
PLACE = ("solver", "kind", "site", "layer", "label", "target", "lag")  # what names a probe
Row = dict[str, Any]
JOINT_CHAIN = "joint+chain"  # the control that a gain is over
BASELINE_EXACTNESS = 10  # by which its tolerance is smaller than that of what is compared to it
GAINS = ("gain_bits", "gain", "gain_within")  # what a layer adds to the joint control: see `gains`
LEAST_OVER_LINEAR = 5e-4  # of AUROC: linear probes that end elsewhere within their tolerance differ by as much
COMPARED: Row = {  # the fields of comparisons with controls, where there is none
    **{
        f"{name}{end}": math.nan
        for name in (*GAINS, "lift", "over_linear")
        for end in ("", "_low", "_high", "_low_corrected")
    },
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


def place_fields(solver: str, site: Site, column: Column, *, kind: str = LINEAR) -> Row:
    """The fields of a row that say which probe or control it is."""
    return {
        "solver": solver,
        "kind": kind,
        "site": "" if site.is_control else site.point,
        "layer": "" if site.layer is None else site.layer,
        "label": column.label,
        "target": column.target,
        "lag": column.lag,
        "split": "test",
        "control": site.name if site.is_control else column.control,
    }


def is_beyond_linear(row: Row) -> bool:
    """Whether a probe of another kind is certainly above the linear one, by more than training leaves open."""
    return row["kind"] != LINEAR and row["over_linear_low_corrected"] > LEAST_OVER_LINEAR


def place(row: Row) -> str:
    """Where a row stands in its lag: layer12, embed, permuted layer12, attn_out12, mlp64 layer12, concat layers."""
    kind = "" if row["kind"] == LINEAR else row["kind"]
    return " ".join(filter(None, (row["control"], kind, _site(row))))


def reads(row: Row) -> str:
    """The same in a sentence, of what is no control: layer 12, attn_out of layer 12, mlp64 of layer 12, concat of all
    layers.
    """
    return site_title(row) if row["kind"] == LINEAR else f"{row['kind']} of {site_title(row)}"


def site_title(row: Row) -> str:
    """What the probe of a row reads, whatever its kind: layer 12, attn_out of layer 12, all layers."""
    return ALL_LAYERS.title if row["layer"] == "" else Site("", int(row["layer"]), point=row["site"]).title


def site_cell(row: Row) -> str:
    """The same in the column of layers of a table: 12, attn_out12, all; nothing of a control's features."""
    if row["layer"] == "":
        return "" if row["control"] else "all"
    return str(row["layer"]) if row["site"] == RESID_POST else _site(row)


def _site(row: Row) -> str:
    """What a probe reads; nothing where that is a control's features."""
    if row["layer"] == "":
        return "" if row["control"] else ALL_LAYERS.name
    return f"{'layer' if row['site'] == RESID_POST else row['site']}{int(row['layer']):02d}"
