"""From scored test tokens to the rows of results.csv: every probe beside what it must beat, and a verdict.

Shapes: N tokens, L layers, K columns, C chains, R resamples.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations, groupby
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from streamprobe.lags import Column
from streamprobe.lifts import lower_bounds
from streamprobe.metrics import Scored, chain_bootstrap, draw_chains, measure, percentiles

FIELDS = (
    "solver,layer,label,target,lag,control,split,auroc,auroc_low,auroc_high,average_precision,average_precision_low,"
    "average_precision_high,lift,lift_low,lift_high,lift_low_corrected,best_control,f1,threshold,f1_at_half,"
    "tpr_at_5fpr,brier,base_rate,n_tokens,n_positive,n_chains,auroc_spread,best_pass,gradient_norm"
).split(",")
BINS = 10  # of a reliability curve
Row = dict[str, Any]


class Part(NamedTuple):
    """The probes of one fit, and how they score the test tokens."""

    solver: str
    layers: list[int | str]  # numbers of layers, and names of controls
    columns: list[Column]
    scored: Scored
    threshold: Tensor  # [L, K] the logit that validation chose
    half: Tensor  # [K] the logit at which the class-weighted probability is one half
    best_pass: Tensor  # [L, K]
    gradient_norm: Tensor  # [L, K]

    def at(self, tokens: Tensor) -> "Part":
        """The same for the tokens [N] where `tokens` is True alone, their chains counted anew from 0."""
        chosen = Scored(*(x[tokens] for x in self.scored))
        return self._replace(scored=chosen._replace(chain=chosen.chain.unique(return_inverse=True)[1]))


class Judged(NamedTuple):
    """A row, and its AUROC in every resample [R] (none where R = 0), paired with those of all other rows."""

    row: Row
    areas: Tensor


def judge(parts: Sequence[Part], resamples: int, seed: int) -> list[Judged]:
    """A row for every probe and control of each solver, with intervals and lifts.

    Probes that differ in their seed alone have one row, that of seed 0, with the spread of them all.
    """
    n_chains = 1 + int(parts[0].scored.chain.max())
    weights = draw_chains(n_chains, resamples, seed)
    judged: list[Judged] = []
    for part in parts:
        judged += _judge_part(part, weights)
    for _, own in _by(judged, itemgetter("solver", "label", "target")):
        _add_lifts(own)
    return judged


def _judge_part(part: Part, weights: Tensor) -> list[Judged]:
    """Rows without their lifts, in the order layer, column."""
    metrics = measure(*part.scored[:3], part.threshold, part.half) | {"brier": brier(part.scored)}
    by_column = [_judge_column(part, k, metrics, weights) for k, column in enumerate(part.columns) if not column.seed]
    return [judged[i] for i in range(len(part.layers)) for judged in by_column]


def _judge_column(part: Part, k: int, metrics: Mapping[str, Tensor], weights: Tensor) -> list[Judged]:
    """The rows of one column, one for each layer; metrics: name -> [L, K]."""
    column, valid = part.columns[k], part.scored.valid[:, k]
    targets, chain = part.scored.targets[valid, k], part.scored.chain[valid]
    areas, precisions = chain_bootstrap(part.scored.scores[valid][:, :, k], targets, chain, weights)
    seeds = [i for i, other in enumerate(part.columns) if other._replace(seed=0) == column]
    n, hits = len(targets), int(targets.sum())
    judged = []
    for i, layer in enumerate(part.layers):
        row: Row = {
            "solver": part.solver, "layer": layer if isinstance(layer, int) else "", "label": column.label,
            "target": column.target, "lag": column.lag, "split": "test",
            "control": column.control or (layer if isinstance(layer, str) else ""),
            **{name: float(values[i, k]) for name, values in metrics.items()},
            **_interval("auroc", areas[:, i]), **_interval("average_precision", precisions[:, i]),
            **dict.fromkeys(("lift", "lift_low", "lift_high", "lift_low_corrected"), math.nan), "best_control": "",
            "base_rate": hits / n if n else math.nan, "n_tokens": n, "n_positive": hits,
            "n_chains": int(chain.unique().numel()),
            "auroc_spread": float(metrics["auroc"][i, seeds].std()) if len(seeds) > 1 else math.nan,
            "best_pass": int(part.best_pass[i, k]), "gradient_norm": float(part.gradient_norm[i, k]),
        }  # fmt: skip
        judged.append(Judged(row, areas[:, i]))
    return judged


def _interval(name: str, resampled: Tensor) -> dict[str, float]:
    low, high = percentiles(resampled).tolist()
    return {f"{name}_low": low, f"{name}_high": high}


def brier(scored: Scored) -> Tensor:
    """Mean squared error [L, K] of the probabilities: Brier (1950)."""
    probability = scored.scores.sigmoid().double()
    error = (probability - scored.targets[:, None].double()).square() * scored.valid[:, None]
    return error.sum(0) / scored.valid.sum(0)


def _by(judged: Iterable[Judged], key: Callable[[Row], Any]) -> list[tuple[Any, list[Judged]]]:
    """The judged grouped by a key of their rows, in the order of that key."""
    ordered = sorted(judged, key=lambda each: key(each.row))
    return [(value, list(own)) for value, own in groupby(ordered, key=lambda each: key(each.row))]


def _add_lifts(family: Sequence[Judged]) -> None:
    """Fills in the lifts of all probes of one solver, label and target, which are looked at together."""
    pairs = [(probe, control) for probe in family for control in _controls_of(probe, family)]
    if not pairs:
        return
    points = torch.tensor([probe.row["auroc"] - control.row["auroc"] for probe, control in pairs], dtype=torch.float64)
    resampled = torch.stack([probe.areas - control.areas for probe, control in pairs], dim=1)  # [R, Q]
    intervals, bounds = percentiles(resampled).tolist(), lower_bounds(points, resampled).tolist()
    for (probe, control), point, (low, high), bound in zip(pairs, points.tolist(), intervals, bounds, strict=True):
        row, name = probe.row, control.row["control"]
        if math.isnan(row["lift"]) or point < row["lift"]:
            row |= {"lift": point, "lift_low": low, "lift_high": high, "best_control": name}
        row["lift_low_corrected"] = (
            bound if math.isnan(row["lift_low_corrected"]) else min(row["lift_low_corrected"], bound)
        )


def _controls_of(probe: Judged, family: Sequence[Judged]) -> list[Judged]:
    """What the probe must beat: controls of its lag, of no layer or of its own; none of a control."""
    row = probe.row
    if row["control"] or math.isnan(row["auroc"]):
        return []
    return [
        other
        for other in family
        if other.row["control"] and other.row["lag"] == row["lag"] and other.row["layer"] in ("", row["layer"])
        and not math.isnan(other.row["auroc"])
    ]  # fmt: skip


def verdicts(judged: Sequence[Judged]) -> list[str]:
    """For each solver, label and target, the largest lag at which a layer is certainly above every control."""
    sentences = []
    for (solver, label, target), own in _by(judged, itemgetter("solver", "label", "target")):
        probes = [each.row for each in own if not each.row["control"] and not math.isnan(each.row["lift"])]
        head = f"{label}, target {target}, solver {solver}: "
        if not probes or all(math.isnan(row["lift_low_corrected"]) for row in probes):
            sentences.append(head + "no verdict, which takes controls and --bootstrap")
            continue
        looked = f"corrected for the {len(probes)} probes looked at"
        clear = [row for row in probes if row["lift_low_corrected"] > 0]
        if not clear:
            sentences.append(head + f"at no lag is a layer certainly above every control ({looked})")
            continue
        far = max(clear, key=lambda row: (row["lag"], row["lift_low_corrected"]))
        sentences.append(
            head + f"lag {far['lag']:+d} is the largest at which a layer is certainly above every control: layer "
            f"{far['layer']}, AUROC {far['auroc']:.3f}, {far['lift']:.3f} above {far['best_control']}, by at least "
            f"{far['lift_low_corrected']:.3f} ({looked})"
        )
    return sentences


def place(row: Row) -> str:
    """Where a row stands in its lag: layer12, embed, permuted layer12."""
    layer = f"layer{int(row['layer']):02d}" if row["layer"] != "" else ""
    return " ".join(filter(None, (row["control"], layer)))


def differences(judged: Sequence[Judged]) -> list[Row]:
    """Paired differences of AUROC with 95% intervals: between layers at the same lag, and lags of the same layer."""
    rows: list[Row] = []
    probes = [each for each in judged if not each.row["control"]]
    for between, other in (("layer", "lag"), ("lag", "layer")):
        for (solver, label, target, at), own in _by(probes, itemgetter("solver", "label", "target", other)):
            for a, b in combinations(sorted(own, key=lambda each: each.row[between]), 2):
                low, high = percentiles(a.areas - b.areas).tolist()
                rows.append(
                    {
                        "solver": solver, "label": label, "target": target, "between": between, "at": at,
                        "a": a.row[between], "b": b.row[between], "difference": a.row["auroc"] - b.row["auroc"],
                        "low": low, "high": high,
                    }
                )  # fmt: skip
    return rows


def by_category(parts: Sequence[Part], categories: Sequence[str], resamples: int, seed: int) -> list[Row]:
    """The rows of `judge` for the tokens of each category alone; categories [C] names that of each test chain.

    None where all chains are of one category.
    """
    rows: list[Row] = []
    names = sorted(set(categories))
    for name in names if len(names) > 1 else ():
        own = torch.tensor([category == name for category in categories])
        own_parts = [part.at(own[part.scored.chain]) for part in parts]
        if len(own_parts[0].scored.chain):
            rows += [{"category": name, **each.row} for each in judge(own_parts, resamples, seed)]
    return rows


def reliability(parts: Sequence[Part]) -> list[Row]:
    """What the probes say and what is true, in BINS bins of equally many test tokens by falling probability."""
    rows: list[Row] = []
    for part in parts:
        for k, column in enumerate(part.columns):
            if column.control or column.seed:
                continue
            valid = part.scored.valid[:, k]
            targets = part.scored.targets[valid, k].double()
            for i, layer in enumerate(part.layers):
                if isinstance(layer, str):
                    continue
                said = part.scored.scores[valid, i, k].sigmoid().double()
                order = said.argsort(descending=True)
                for number, bin in enumerate(order.tensor_split(BINS)):
                    rows.append(
                        {
                            "solver": part.solver, "layer": layer, "label": column.label, "target": column.target,
                            "lag": column.lag, "bin": number, "n_tokens": len(bin),
                            "mean_probability": float(said[bin].mean()), "share_positive": float(targets[bin].mean()),
                        }
                    )  # fmt: skip
    return rows
