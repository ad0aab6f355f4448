"""From scored test tokens to the rows of results.csv: every probe beside what it must beat, and a verdict.

Shapes: N tokens, L layers, K columns, C chains, R resamples.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations, groupby
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from streamprobe.evaluation.bootstrap import chain_bootstrap, draw_chains, percentiles
from streamprobe.evaluation.metrics import measure
from streamprobe.evaluation.scores import Scored
from streamprobe.evaluation.significance import LEAST_CHAINS, lower_bounds
from streamprobe.lags import Column

FIELDS = (
    "solver,layer,label,target,lag,control,split,auroc,auroc_low,auroc_high,average_precision,average_precision_low,"
    "average_precision_high,lift,lift_low,lift_high,lift_low_corrected,best_control,f1,threshold,f1_at_half,"
    "tpr_at_5fpr,brier,base_rate,n_tokens,n_positive,n_chains,n_positive_chains,auroc_spread,best_pass,gradient_norm"
).split(",")
TOKENS = 4096  # at once, which bounds the memory of what needs float64
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


def judge(parts: Sequence[Part], n_chains: int, resamples: int, seed: int) -> list[Judged]:
    """A row for every probe and control of each solver, with intervals over n_chains test chains, and lifts.

    Probes that differ in their seed alone have one row, that of seed 0, with the spread of them all.  Where fewer than
    two chains hold a positive there is no interval.
    """
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
    n_positive_chains = int(chain[targets].unique().numel())
    drawn = weights if n_positive_chains > 1 else weights[:0]
    areas, precisions = chain_bootstrap(part.scored.scores[valid][:, :, k], targets, chain, drawn)
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
            "n_chains": int(chain.unique().numel()), "n_positive_chains": n_positive_chains,
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
    error_ = torch.zeros(scored.scores.shape[1:], dtype=torch.float64)
    for scores, targets, valid in zip(*(part.split(TOKENS) for part in scored[:3]), strict=True):
        error = (scores.sigmoid().double() - targets[:, None].double()).square()
        error_ += (error * valid[:, None]).sum(0)
    return error_ / scored.valid.sum(0)


def _by(judged: Iterable[Judged], key: Callable[[Row], Any]) -> list[tuple[Any, list[Judged]]]:
    """The judged grouped by a key of their rows, in the order of that key."""
    ordered = sorted(judged, key=lambda each: key(each.row))
    return [(value, list(own)) for value, own in groupby(ordered, key=lambda each: key(each.row))]


def _add_lifts(family: Sequence[Judged]) -> None:
    """Fills in the lifts of all probes of one solver, label and target, which are looked at together.

    The corrected low end is for probes that can be judged by enough chains.
    """
    pairs = [(probe, control) for probe in family for control in _controls_of(probe, family)]
    for probe, control in pairs:
        row, lift = probe.row, probe.row["auroc"] - control.row["auroc"]
        if math.isnan(row["lift"]) or lift < row["lift"]:
            low, high = _percentiles_of_difference(probe, control)
            row |= {"lift": lift, "lift_low": low, "lift_high": high, "best_control": control.row["control"]}
    counts = [min(probe.row["n_positive_chains"], control.row["n_positive_chains"]) for probe, control in pairs]
    sound = [i for i, n in enumerate(counts) if n >= LEAST_CHAINS and len(pairs[i][0].areas)]
    if not sound:
        return
    points = torch.tensor([pairs[i][0].row["auroc"] - pairs[i][1].row["auroc"] for i in sound], dtype=torch.float64)
    resampled = torch.stack([pairs[i][0].areas - pairs[i][1].areas for i in sound], dim=1)  # [R, Q]
    bounds = lower_bounds(points, resampled, min(counts[i] for i in sound)).tolist()
    for i, bound in zip(sound, bounds, strict=True):
        row = pairs[i][0].row
        row["lift_low_corrected"] = min(bound, math.inf if math.isnan(was := row["lift_low_corrected"]) else was)
    for i in set(range(len(pairs))) - set(sound):
        pairs[i][0].row["lift_low_corrected"] = math.nan  # not above a control that cannot be judged


def _percentiles_of_difference(a: Judged, b: Judged) -> tuple[float, float]:
    """The 95% interval of a's AUROC less b's; NaN where one of them was not resampled."""
    if len(a.areas) != len(b.areas):
        return math.nan, math.nan
    low, high = percentiles(a.areas - b.areas).tolist()
    return low, high


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
    return [
        f"{label}, target {target}, solver {solver}: {_verdict(own)}"
        for (solver, label, target), own in _by(judged, itemgetter("solver", "label", "target"))
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
    far = max(clear, key=lambda row: (row["lag"], row["lift_low_corrected"]))
    return (
        f"lag {far['lag']:+d} is the largest at which a layer is certainly above every control ({beaten}): layer "
        f"{far['layer']}, AUROC {far['auroc']:.3f}, {far['lift']:.3f} above {far['best_control']}, by at least "
        f"{far['lift_low_corrected']:.3f} ({corrected})"
    )


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
                low, high = _percentiles_of_difference(a, b)
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

    No rows for a category of a single chain, and none at all where all chains are of one category.
    """
    rows: list[Row] = []
    sizes = Counter(categories)
    for name in sorted(name for name, n in sizes.items() if n > 1 and len(sizes) > 1):
        own = torch.tensor([category == name for category in categories])
        own_parts = [part.at(own[part.scored.chain]) for part in parts]
        rows += [{"category": name, **each.row} for each in judge(own_parts, sizes[name], resamples, seed)]
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
