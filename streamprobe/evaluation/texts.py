"""Whole texts instead of tokens: rows for data with one label a text, such as deception, toxicity or correctness.

A text's score is the mean, the maximum or the last of the probabilities that a probe gives at its tokens.

Shapes: N tokens, L sites, K columns, C chains, M texts with a token that is asked, R resamples.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from streamprobe.evaluation.bootstrap import BLOCK, draw_chains, percentiles
from streamprobe.evaluation.metrics import auroc, rank, tpr_at_fpr
from streamprobe.evaluation.rows import Row, place_fields
from streamprobe.evaluation.scored_probes import ScoredProbes
from streamprobe.evaluation.scores import Scored, tokens_of_column
from streamprobe.probes.sites import LINEAR

POOLINGS = ("mean", "max", "last")
RATES = {"tpr_at_1fpr": 0.01, "tpr_at_5fpr": 0.05}  # false positive rates
METRICS = ("auroc", *RATES)
TEXT_FIELDS = [
    *("solver", "kind", "site", "layer", "label", "target", "lag", "control", "split", "pooling"),
    *(f"{name}{end}" for name in METRICS for end in ("", "_low", "_high")),
    *("n_texts", "n_positive"),
]


class PooledTexts(NamedTuple):
    """Texts as the L probes of a column see them."""

    scores: dict[str, Tensor]  # by pooling, [M, L] float64
    targets: Tensor  # [M] bool
    chain: Tensor  # [M] int64 in 0 .. C - 1


def text_rows(probes: Sequence[ScoredProbes], n_chains: int, resamples: int, seed: int) -> list[Row]:
    """A row for every probe, control and pooling of the labels that whole texts have, with 95% intervals.

    The same test texts are drawn as by `results.judge`.  No rows for other labels.  Where a class has fewer than two
    texts there is no interval.
    """
    labels = labels_of_texts(probes)
    weights = draw_chains(n_chains, resamples, seed)
    rows: list[Row] = []
    for each in probes if labels else ():
        if each.is_nested:
            continue
        for k, column in enumerate(each.columns):
            if column.label in labels and column.target == "token" and not column.seed:
                rows += _rows_of_column(each, k, weights)
    return rows


def labels_of_texts(probes: Sequence[ScoredProbes]) -> list[str]:
    """The labels of which every text is all inside or all outside, with texts of both kinds, as `token` columns see it.

    The targets of the first probes tell, since all share them.
    """
    group = next((each for each in probes if each.real()), None)
    if group is None:
        return []
    asked: dict[str, list[int]] = {}
    for k, column in enumerate(group.columns):
        if column.target == "token" and not (column.control or column.seed):
            asked.setdefault(column.label, []).append(k)
    return [label for label, ks in asked.items() if all(_is_of_texts(group.scored, k) for k in ks)]


def _is_of_texts(scored: Scored, k: int) -> bool:
    """Whether column k has one target in each chain, and not the same in all of them."""
    valid = scored.valid[:, k]
    if not valid.any():
        return False
    _, index = scored.chain[valid].unique(return_inverse=True)
    share = torch.bincount(index, scored.targets[valid, k].double()) / torch.bincount(index)
    return bool(((share == 0) | (share == 1)).all() and 0 < share.sum() < len(share))


def pool(scored: Scored, k: int) -> PooledTexts:
    """The texts of column k, of the tokens at which it is asked; the last one is that furthest on in its chain."""
    asked = tokens_of_column([(scored, k)])
    said, token = asked.scores.double().sigmoid(), asked.token
    chain, index = asked.chain.unique(return_inverse=True)
    shape = (len(chain), said.shape[1])
    sums = said.new_zeros(shape).index_add_(0, index, said)
    highest = said.new_zeros(shape).scatter_reduce(0, index[:, None].expand_as(said), said, "amax")
    end = token.new_zeros(len(chain)).scatter_reduce(0, index, token, "amax")
    is_last = token == end[index]
    scores = {
        "mean": sums / torch.bincount(index)[:, None],
        "max": highest,
        "last": said.new_zeros(shape).index_copy_(0, index[is_last], said[is_last]),
    }
    targets = torch.zeros(len(chain), dtype=torch.bool, device=chain.device)
    targets[index[asked.targets]] = True
    pooled = {name: values.cpu() for name, values in scores.items()}  # a text is a number: what follows is small
    return PooledTexts(pooled, targets.cpu(), chain.cpu())


def _rows_of_column(probes: ScoredProbes, k: int, weights: Tensor) -> list[Row]:
    """The rows of one column, for each pooling one for each site."""
    column, texts = probes.columns[k], pool(probes.scored, k)
    n, n_positive = len(texts.targets), int(texts.targets.sum())
    drawn = weights[:, texts.chain] if min(n_positive, n - n_positive) > 1 else weights[:0, texts.chain]
    rows: list[Row] = []
    for pooling, scores in texts.scores.items():
        ranking = rank(scores, texts.targets)
        points = {"auroc": auroc(ranking)} | {name: tpr_at_fpr(ranking, fpr) for name, fpr in RATES.items()}
        for i, site in enumerate(probes.sites):
            resampled = resample(scores[:, i], texts.targets, drawn)
            row: Row = {**place_fields(probes.solver, site, column, kind=probes.kind), "pooling": pooling}
            for name, values in points.items():
                low, high = percentiles(resampled[name]).tolist()
                row |= {name: float(values[i]), f"{name}_low": low, f"{name}_high": high}
            rows.append(row | {"n_texts": n, "n_positive": n_positive})
    return rows


def resample(scores: Tensor, targets: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """Each of METRICS over resampled texts: name -> [R] float64, NaN in a resample without both classes.

    scores [M], targets [M] bool, weights [R, M]: how often resample r drew text m.  With texts sorted by falling score,
    everything follows from the positives and negatives drawn down to each of them, ties included.
    """
    falling, order = (-scores).sort(stable=True)
    y = targets[order]
    end = torch.searchsorted(falling, falling, right=True) - 1  # [M] the last text that ties with each
    begin = torch.searchsorted(falling, falling)  # [M] the first one
    blocks = [_resample(block[:, order].double(), y, begin, end) for block in weights.split(BLOCK)]
    return {name: torch.cat([block[name] for block in blocks]) for name in METRICS}


def _resample(w: Tensor, y: Tensor, begin: Tensor, end: Tensor) -> dict[str, Tensor]:
    """The metrics of each resample [R] of sorted texts: w [R, M], y, begin, end [M]."""
    tp, fp = (w * y).cumsum(1), (w * ~y).cumsum(1)
    n_positive, n_negative = tp[:, -1], fp[:, -1]
    usable = (n_positive > 0) & (n_negative > 0)
    ends_fp, begins_fp = fp[:, end], (fp - w * ~y)[:, begin]
    beaten = n_negative[:, None] - (ends_fp + begins_fp) / 2  # negatives below each text, ties counted half
    found = {"auroc": (w * y * beaten).sum(1) / (n_positive * n_negative)}
    for name, fpr in RATES.items():
        allowed = ends_fp <= fpr * n_negative[:, None]
        found[name] = (tp[:, end] * allowed).amax(1) / n_positive
    return {name: values.where(usable, math.nan) for name, values in found.items()}


def best_text_rows(rows: Sequence[Row]) -> list[tuple[Row, Row | None]]:
    """For each solver, label and pooling the linear probe with the highest AUROC, and the best control, if any.

    At the lag nearest to 0: all lags ask the same of a text.
    """
    found: list[tuple[Row, Row | None]] = []
    families = dict.fromkeys((row["solver"], row["label"]) for row in rows)
    for family in families:
        own = [row for row in rows if (row["solver"], row["label"]) == family]
        nearest = min((row["lag"] for row in own), key=lambda lag: (abs(lag), lag))
        for pooling in POOLINGS:
            near = [row for row in own if (row["lag"], row["pooling"], row["kind"]) == (nearest, pooling, LINEAR)]
            probe = max((row for row in near if not row["control"]), key=_by_auroc)
            found.append((probe, max((row for row in near if row["control"]), key=_by_auroc, default=None)))
    return found


def _by_auroc(row: Row) -> float:
    return -1.0 if math.isnan(row["auroc"]) else row["auroc"]
