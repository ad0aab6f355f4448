"""From scored test tokens to the rows of results.csv: every probe beside what it must beat, and a verdict.

Shapes: N tokens, L layers, K columns, C chains, R resamples.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from streamprobe.activations.batch import TokenBatch
from streamprobe.activations.feed import Feed
from streamprobe.data.tokenize import Chain
from streamprobe.evaluation.bootstrap import draw_chains, percentiles, probes_at_once, rank_chains, resample
from streamprobe.evaluation.gains import add_gains
from streamprobe.evaluation.lift import compare_with_controls, compare_with_linear
from streamprobe.evaluation.metrics import auroc, brier, point_metrics, rank
from streamprobe.evaluation.rows import (
    COMPARED,
    PLACE,
    Judged,
    Row,
    group_by,
    intervals_of_differences,
    place_fields,
)
from streamprobe.evaluation.scored_probes import ScoredProbes
from streamprobe.evaluation.scores import ColumnTokens, evaluate, tokens_of_column
from streamprobe.evaluation.sorting import sort_carrying
from streamprobe.lags import Column
from streamprobe.probes.base import Probes
from streamprobe.probes.kept import JUDGED_BY, FinalProbes, KeptProbes
from streamprobe.probes.linear import LINEAR

BINS = 10  # of a reliability curve


def score(
    final: Sequence[FinalProbes],
    feeds: Sequence[Feed],
    batches: Iterable[TokenBatch],
    *,
    of_folds: Sequence[Probes] | None = None,
) -> list[ScoredProbes]:
    """The logits of final probes, each group with its feed, for the tokens of some chains, on rank 0.

    `of_folds`: the probes of each fold that are scored in place of the final ones, which are means of them.
    Raises InputError for one that is not finite.
    """
    banks = [each.bank for each in final] if of_folds is None else of_folds
    scored = evaluate(list(zip(banks, feeds, strict=True)), batches, held_out=of_folds is not None, rank=0)
    found = []
    for each, own in zip(final, scored, strict=True):
        bank = each.bank
        assert bank.threshold is not None, "probes without a threshold"
        known = {name: getattr(each, name) for name in (*JUDGED_BY, "feed", "penalty", "of_kind")}
        known["kind"] = known.pop("of_kind")
        found.append(ScoredProbes(each.solver, bank.sites, bank.columns, own, threshold=bank.threshold, **known))
    return found


def judge(
    probes: Sequence[ScoredProbes], n_chains: int, resamples: int, seed: int, *, tolerance: float = math.inf
) -> list[Judged]:
    """A row for every probe and control of each solver, with intervals over n_chains test chains, gains and lifts.

    Nested probes have no rows of their own: they give the gains in those of their layers.
    Probes that differ in their seed alone have one row, that of seed 0, with the spread of them all.  Where fewer than
    two chains hold a positive there is no interval.  Nothing is certainly above a linear probe whose gradient norm is
    not at most `tolerance`.
    """
    weights = draw_chains(n_chains, resamples, seed)
    found: dict[tuple[int, int, int], Judged] = {}
    alone = [each for each in probes if not each.is_nested]
    for places in _places_of_columns(alone):
        found |= _judge_column(alone, places, weights)
    judged = [found[place] for place in sorted(found)]
    for _, own in group_by(judged, itemgetter("solver", "label", "target")):
        compare_with_controls(own)
        compare_with_linear(own, tolerance)
    for solver in dict.fromkeys(each.solver for each in probes):
        add_gains(judged, [each for each in probes if each.is_nested and each.solver == solver], weights)
    return judged


def _places_of_columns(probes: Sequence[ScoredProbes]) -> list[list[tuple[int, int]]]:
    """Where each column of the first seed stands: (number of the probes, number in these) for all that are asked it."""
    places: dict[Column, list[tuple[int, int]]] = {}
    for number, each in enumerate(probes):
        for k, column in enumerate(each.columns):
            if not column.seed:
                places.setdefault(column, []).append((number, k))
    return list(places.values())


def _judge_column(
    probes: Sequence[ScoredProbes], places: Sequence[tuple[int, int]], weights: Tensor
) -> dict[tuple[int, int, int], Judged]:
    """The rows of one column, not compared yet, by number of the probes, of the site, and of the column in these."""
    asked = tokens_of_column([(probes[number].scored, k) for number, k in places])
    threshold = torch.cat([probes[number].threshold[:, k] for number, k in places])
    half = torch.cat([probes[number].half[k].expand(len(probes[number].sites)) for number, k in places])
    counts = _count(asked)
    at_once = probes_at_once(weights.shape[1], counts["n_positive"])
    some = zip(*(each.split(at_once) for each in (asked.scores.T, threshold, half)), strict=True)
    measured = [_measure(asked._replace(scores=own.T), weights, threshold=cut, half=at) for own, cut, at in some]
    names = list(measured[0].numbers)
    by_probe = torch.cat([torch.stack(list(each.numbers.values()), 1) for each in measured]).tolist()
    areas = torch.cat([each.areas for each in measured], 1).T.cpu()
    where = [(number, i, k) for number, k in places for i in range(len(probes[number].sites))]
    found = {}
    for (number, i, k), values, own in zip(where, by_probe, areas, strict=True):
        each = probes[number]
        row: Row = {
            **place_fields(each.solver, each.sites[i], each.columns[k], kind=each.kind),
            **dict(zip(names, values, strict=True)),
            **COMPARED,
            **counts,
            "auroc_spread": _spread(each, i, k),
            "best_pass": int(each.best_pass[i, k]),
            "gradient_norm": float(each.gradient_norm[i, k]),
        }
        found[number, i, k] = Judged(row, own)
    return found


class Measured(NamedTuple):
    """The numbers of P probes of a column."""

    numbers: dict[str, Tensor]  # by field of a row, [P] float64
    areas: Tensor  # [R, P] AUROC in every resample


def _measure(asked: ColumnTokens, weights: Tensor, *, threshold: Tensor, half: Tensor) -> Measured:
    """The metrics of probes that cut at threshold [P] and half [P], and their intervals in resamples [R, C]."""
    weights = weights.to(asked.scores.device)
    ranking, table = rank_chains(asked.scores, asked.targets, asked.chain, weights.shape[1])
    areas, precisions = resample(table, weights if len(table.holders) > 1 else weights[:0])
    points = point_metrics(ranking, threshold=threshold.to(weights.device), half=half) | {"brier": brier(ranking)}
    low, high = percentiles(torch.stack([areas, precisions], 1)).unbind(-1)  # [2, P] each
    intervals = {
        f"{name}_{end}": values[row]
        for row, name in enumerate(("auroc", "average_precision"))
        for end, values in (("low", low), ("high", high))
    }
    return Measured(points | intervals, areas)


def _count(asked: ColumnTokens) -> dict[str, Any]:
    """The fields of a row that count tokens and chains."""
    n, hits = len(asked.targets), int(asked.targets.sum())
    return {
        "base_rate": hits / n if n else math.nan,
        "n_tokens": n,
        "n_positive": hits,
        "n_chains": int(asked.chain.bincount().count_nonzero()),
        "n_positive_chains": int(asked.chain[asked.targets].bincount().count_nonzero()),
    }


def _spread(probes: ScoredProbes, i: int, k: int) -> float:
    """The standard deviation of the AUROC at site i over the seeds of column k; NaN where there is only one."""
    scored, column = probes.scored, probes.columns[k]
    others = [j for j, other in enumerate(probes.columns) if other.seed and other._replace(seed=0) == column]
    if not others:
        return math.nan
    areas = [
        auroc(rank(scored.scores[:, i : i + 1, j], scored.targets[:, j], scored.valid[:, j])) for j in [k, *others]
    ]
    return float(torch.cat(areas).std())


@dataclass(frozen=True)
class TestResults:
    """All that is known at the end of a run: what each of its files is made of (see `reporting.files`)."""

    __test__ = False  # pytest would take it for a class of tests
    folder: Path
    probes: Sequence[ScoredProbes]
    judged: Sequence[Judged]
    kept: KeptProbes
    chains: Sequence[Chain]  # C of the test split, by the number that scored tokens give
    labels: Sequence[str]  # those that are probed: the first of the chains' codes
    tokenizer: Any
    facts: Mapping[str, Any]  # what defines the numbers of the run
    described: Mapping[str, Any]  # counts of the data, verdicts and preflight
    cost: Callable[[], Mapping[str, Any]]  # what the run has taken up to the call
    resamples: int
    seed: int  # of the resamples
    texts: Sequence[Row] = ()  # whole texts, where the data have one label a text: see `evaluation.texts`

    @property
    def linear(self) -> list[ScoredProbes]:
        """The linear probes, the controls, and what is nested of these: what every token can be shown of."""
        return [each for each in self.probes if each.kind == LINEAR]

    @property
    def rows(self) -> list[Row]:
        """The rows of results.csv."""
        return [each.row for each in self.judged]


def differences(judged: Sequence[Judged]) -> list[Row]:
    """Paired differences of AUROC with 95% intervals of probes that differ in layer, lag, site or kind alone.

    Those of probes that read all layers stand beside no layer.
    """
    pairs: list[tuple[Judged, Judged]] = []
    places: list[Row] = []
    probes = [each for each in judged if not each.row["control"]]
    for between in ("layer", "lag", "kind", "site"):
        names = [name for name in PLACE if name != between]
        for _, own in group_by(probes, partial(_place_but, between)):
            named = {name: own[0].row[name] for name in names} | {between: ""}
            for a, b in combinations(own, 2):
                pairs.append((a, b))
                places.append({"between": between, **named, "a": a.row[between], "b": b.row[between]})
    return [
        {**place, "difference": a.row["auroc"] - b.row["auroc"], "low": low, "high": high}
        for place, (a, b), (low, high) in zip(places, pairs, intervals_of_differences(pairs), strict=True)
    ]


def _place_but(left_out: str, row: Row) -> list[Any]:
    """The place of a row but for one field, such that a layer and none compare."""
    return [-1 if row[name] == "" else row[name] for name in PLACE if name != left_out]


def by_category(probes: Sequence[ScoredProbes], categories: Sequence[str], resamples: int, seed: int) -> list[Row]:
    """The rows of `judge` for the tokens of each category alone; categories [C] names that of each test chain.

    No rows for a category of a single chain, and none at all where all chains are of one category.
    """
    rows: list[Row] = []
    sizes = Counter(categories)
    for name in sorted(name for name, n in sizes.items() if n > 1 and len(sizes) > 1):
        own = torch.tensor([category == name for category in categories])
        chosen = [each.at(own.to(each.scored.chain.device)[each.scored.chain]) for each in probes]
        rows += [{"category": name, **each.row} for each in judge(chosen, sizes[name], resamples, seed)]
    return rows


def reliability(probes: Sequence[ScoredProbes]) -> list[Row]:
    """What the probes say and what is true, in BINS bins of equally many test tokens by falling probability."""
    return [
        row for each in probes if each.real() for k in each.real_columns() for row in _reliability_of_column(each, k)
    ]


def _reliability_of_column(probes: ScoredProbes, k: int) -> list[Row]:
    """The rows of the layers at one column."""
    column, asked = probes.columns[k], tokens_of_column([(probes.scored, k)])
    layers = [i for i, site in enumerate(probes.sites) if not site.is_control]
    rising, order = sort_carrying(asked.scores.T[layers], torch.arange(len(asked.chain), device=asked.chain.device))
    said, true = rising.flip(1).sigmoid().double(), asked.targets[order.flip(1)].double()  # [l, n]
    rows: list[Row] = []
    bins = list(zip(said.tensor_split(BINS, 1), true.tensor_split(BINS, 1), strict=True))
    means = torch.stack([torch.stack([each.mean(1) for each in bin], 1) for bin in bins], 1).tolist()  # [l, BINS, 2]
    for layer, own in zip(layers, means, strict=True):
        for number, (probability, share) in enumerate(own):
            rows.append(
                {
                    "solver": probes.solver,
                    "kind": probes.kind,
                    "site": probes.sites[layer].point,
                    "layer": probes.sites[layer].layer,
                    "label": column.label,
                    "target": column.target,
                    "lag": column.lag,
                    "bin": number,
                    "n_tokens": bins[number][0].shape[1],
                    "mean_probability": probability,
                    "share_positive": share,
                }
            )
    return rows
