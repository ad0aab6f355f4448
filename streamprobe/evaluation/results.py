"""From scored test tokens to the rows of results.csv: every probe beside what it must beat, and a verdict.

Shapes: N tokens, L layers, K columns, C chains, R resamples.
"""

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from streamprobe.activations.batch import TokenBatch
from streamprobe.activations.feed import Feed
from streamprobe.data.tokenize import Chain
from streamprobe.evaluation.bootstrap import chain_bootstrap, draw_chains, percentiles
from streamprobe.evaluation.metrics import measure
from streamprobe.evaluation.rows import NO_LIFT, Judged, Row, group_by, interval_of_difference
from streamprobe.evaluation.scores import Scored, evaluate
from streamprobe.evaluation.verdict import compare_with_controls
from streamprobe.lags import Column
from streamprobe.probes.kept import FinalProbes, KeptProbes
from streamprobe.probes.sites import Site

TOKENS = 4096  # at once, which bounds the memory of what needs float64
BINS = 10  # of a reliability curve


class ScoredProbes(NamedTuple):
    """The probes of one job, and how they score the test tokens."""

    solver: str
    sites: list[Site]
    columns: list[Column]
    scored: Scored
    threshold: Tensor  # [L, K] the logit that validation chose
    half: Tensor  # [K] the logit at which the class-weighted probability is one half
    best_pass: Tensor  # [L, K]
    gradient_norm: Tensor  # [L, K]

    def at(self, tokens: Tensor) -> "ScoredProbes":
        """The same for the tokens [N] where `tokens` is True alone, their chains counted anew from 0."""
        chosen = Scored(*(x[tokens] for x in self.scored))
        _, chain = chosen.chain.unique(return_inverse=True)
        return self._replace(scored=chosen._replace(chain=chain))

    def without(self, controls: Collection[str]) -> "ScoredProbes | None":
        """The same without these controls; None where nothing else is left."""
        if all(site.is_control and site.name in controls for site in self.sites):
            return None
        keep = [k for k, column in enumerate(self.columns) if column.control not in controls]
        scored = self.scored
        chosen = scored._replace(
            scores=scored.scores[:, :, keep], targets=scored.targets[:, keep], valid=scored.valid[:, keep]
        )
        grids = {name: getattr(self, name)[:, keep] for name in ("threshold", "best_pass", "gradient_norm")}
        return self._replace(columns=[self.columns[k] for k in keep], scored=chosen, half=self.half[keep], **grids)

    def real(self) -> list[tuple[int, int]]:
        """The places (l, k) of the probes that are no controls, of the first seed, column by column."""
        columns = [k for k, column in enumerate(self.columns) if not (column.control or column.seed)]
        return [(i, k) for k in columns for i, site in enumerate(self.sites) if not site.is_control]


def score(final: Sequence[FinalProbes], feeds: Sequence[Feed], batches: Iterable[TokenBatch]) -> list[ScoredProbes]:
    """The logits of final probes, each group with its feed, for the tokens of some chains.

    Raises InputError for one that is not finite.
    """
    scored = evaluate([(each.bank, feed) for each, feed in zip(final, feeds, strict=True)], batches)
    found = []
    for each, own in zip(final, scored, strict=True):
        bank = each.bank
        assert bank.threshold is not None, "probes without a threshold"
        known = {"half": each.half, "best_pass": each.best_pass, "gradient_norm": each.gradient_norm}
        found.append(ScoredProbes(each.solver, bank.sites, bank.columns, own, threshold=bank.threshold, **known))
    return found


def judge(probes: Sequence[ScoredProbes], n_chains: int, resamples: int, seed: int) -> list[Judged]:
    """A row for every probe and control of each solver, with intervals over n_chains test chains, and lifts.

    Probes that differ in their seed alone have one row, that of seed 0, with the spread of them all.  Where fewer than
    two chains hold a positive there is no interval.
    """
    weights = draw_chains(n_chains, resamples, seed)
    judged: list[Judged] = []
    for each in probes:
        judged += _judge_probes(each, weights)
    for _, own in group_by(judged, itemgetter("solver", "label", "target")):
        compare_with_controls(own)
    return judged


def _judge_probes(probes: ScoredProbes, weights: Tensor) -> list[Judged]:
    """Rows without their lifts, in the order site, column."""
    scored = probes.scored
    metrics = measure(scored.scores, scored.targets, scored.valid, threshold=probes.threshold, half=probes.half)
    metrics["brier"] = brier(scored)
    first = [k for k, column in enumerate(probes.columns) if not column.seed]
    by_column = [_judge_column(probes, k, metrics, weights) for k in first]
    return [judged[i] for i in range(len(probes.sites)) for judged in by_column]


def _judge_column(probes: ScoredProbes, k: int, metrics: Mapping[str, Tensor], weights: Tensor) -> list[Judged]:
    """The rows of one column, one for each site; metrics: name -> [L, K]."""
    column, valid = probes.columns[k], probes.scored.valid[:, k]
    targets, chain = probes.scored.targets[valid, k], probes.scored.chain[valid]
    n, hits, n_positive_chains = len(targets), int(targets.sum()), int(chain[targets].unique().numel())
    drawn = weights if n_positive_chains > 1 else weights[:0]
    areas, precisions = chain_bootstrap(probes.scored.scores[valid][:, :, k], targets, chain, drawn)
    seeds = [i for i, other in enumerate(probes.columns) if other._replace(seed=0) == column]
    counts = {
        "base_rate": hits / n if n else math.nan,
        "n_tokens": n,
        "n_positive": hits,
        "n_chains": int(chain.unique().numel()),
        "n_positive_chains": n_positive_chains,
    }
    judged = []
    for i, site in enumerate(probes.sites):
        row: Row = {
            **place_fields(probes.solver, site, column),
            **{name: float(values[i, k]) for name, values in metrics.items()},
            **_interval("auroc", areas[:, i]),
            **_interval("average_precision", precisions[:, i]),
            **NO_LIFT,
            **counts,
            "auroc_spread": float(metrics["auroc"][i, seeds].std()) if len(seeds) > 1 else math.nan,
            "best_pass": int(probes.best_pass[i, k]),
            "gradient_norm": float(probes.gradient_norm[i, k]),
        }
        judged.append(Judged(row, areas[:, i]))
    return judged


def place_fields(solver: str, site: Site, column: Column) -> Row:
    """The fields of a row that say which probe or control it is."""
    return {
        "solver": solver,
        "layer": "" if site.is_control else site.layer,
        "label": column.label,
        "target": column.target,
        "lag": column.lag,
        "split": "test",
        "control": site.name if site.is_control else column.control,
    }


def _interval(name: str, resampled: Tensor) -> dict[str, float]:
    low, high = percentiles(resampled).tolist()
    return {f"{name}_low": low, f"{name}_high": high}


def brier(scored: Scored) -> Tensor:
    """Mean squared error [L, K] of the probabilities: Brier (1950)."""
    error_ = torch.zeros(scored.scores.shape[1:], dtype=torch.float64)
    parts = (each.split(TOKENS) for each in (scored.scores, scored.targets, scored.valid))
    for scores, targets, valid in zip(*parts, strict=True):
        error = (scores.sigmoid().double() - targets[:, None].double()).square()
        error_ += (error * valid[:, None]).sum(0)
    return error_ / scored.valid.sum(0)


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
    def rows(self) -> list[Row]:
        """The rows of results.csv."""
        return [each.row for each in self.judged]


def differences(judged: Sequence[Judged]) -> list[Row]:
    """Paired differences of AUROC with 95% intervals: between layers at the same lag, and lags of the same layer."""
    rows: list[Row] = []
    probes = [each for each in judged if not each.row["control"]]
    for between, other in (("layer", "lag"), ("lag", "layer")):
        for (*family, at), own in group_by(probes, itemgetter("solver", "label", "target", other)):
            for a, b in combinations(sorted(own, key=lambda each: each.row[between]), 2):
                low, high = interval_of_difference(a, b)
                rows.append(
                    {
                        **dict(zip(("solver", "label", "target"), family, strict=True)),
                        "between": between,
                        "at": at,
                        "a": a.row[between],
                        "b": b.row[between],
                        "difference": a.row["auroc"] - b.row["auroc"],
                        "low": low,
                        "high": high,
                    }
                )
    return rows


def by_category(probes: Sequence[ScoredProbes], categories: Sequence[str], resamples: int, seed: int) -> list[Row]:
    """The rows of `judge` for the tokens of each category alone; categories [C] names that of each test chain.

    No rows for a category of a single chain, and none at all where all chains are of one category.
    """
    rows: list[Row] = []
    sizes = Counter(categories)
    for name in sorted(name for name, n in sizes.items() if n > 1 and len(sizes) > 1):
        own = torch.tensor([category == name for category in categories])
        chosen = [each.at(own[each.scored.chain]) for each in probes]
        rows += [{"category": name, **each.row} for each in judge(chosen, sizes[name], resamples, seed)]
    return rows


def reliability(probes: Sequence[ScoredProbes]) -> list[Row]:
    """What the probes say and what is true, in BINS bins of equally many test tokens by falling probability."""
    rows: list[Row] = []
    for each in probes:
        for i, k in each.real():
            column, valid = each.columns[k], each.scored.valid[:, k]
            targets = each.scored.targets[valid, k].double()
            said = each.scored.scores[valid, i, k].sigmoid().double()
            for number, bin in enumerate(said.argsort(descending=True).tensor_split(BINS)):
                rows.append(
                    {
                        "solver": each.solver,
                        "layer": each.sites[i].layer,
                        "label": column.label,
                        "target": column.target,
                        "lag": column.lag,
                        "bin": number,
                        "n_tokens": len(bin),
                        "mean_probability": float(said[bin].mean()),
                        "share_positive": float(targets[bin].mean()),
                    }
                )
    return rows
