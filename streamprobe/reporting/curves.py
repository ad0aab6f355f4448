"""What every probe says of the test tokens, in few numbers: its precision-recall curve, its hits and its errors.

Shapes: N tokens, P probes of a column (its layers), M positives, S points of a curve.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from streamprobe.evaluation.metrics import Ranking, rank
from streamprobe.evaluation.results import ScoredProbes
from streamprobe.evaluation.scores import ColumnTokens, tokens_of_column
from streamprobe.reporting.transcripts import Probe

POINTS = 50  # of a curve, at most
ROOM = 20_000  # points in all; curves have fewer where there are more probes, but at least
FEWEST = 8
COUNTS = ("tp", "fp", "fn", "tn")  # at the threshold that validation chose


def collect(groups: Sequence[ScoredProbes]) -> list[dict[str, Any]]:
    """What curves.json holds: for every probe that is no control its place, its curve and its counts.

    `recall` rises by equal steps as far as the positives allow; `precision` is that of the highest threshold which
    reaches it.  Both are empty without a positive, and the counts are null without a threshold.
    """
    n_probes = sum(len(group.real()) for group in groups)
    points = max(FEWEST, min(POINTS, ROOM // max(1, n_probes)))
    return [each for group in groups for k in group.real_columns() for each in _of_column(group, k, points)]


def _of_column(group: ScoredProbes, k: int, points: int) -> list[dict[str, Any]]:
    """The layers of a group at one column."""
    layers = [i for i, site in enumerate(group.sites) if not site.is_control]
    if not layers:
        return []
    asked = tokens_of_column([(group.scored, k)])
    asked = asked._replace(scores=asked.scores[:, layers])
    recall, precision = curve(rank(asked.scores, asked.targets), points)
    return [
        {
            **Probe(group, i, k).place(),
            "recall": _rounded(recall[p]),
            "precision": _rounded(precision[p]),
            **dict(zip(COUNTS, _confusion(asked, p, float(group.threshold[i, k])), strict=True)),
        }
        for p, i in enumerate(layers)
    ]


def curve(ranking: Ranking, points: int) -> tuple[Tensor, Tensor]:
    """Recall and precision [P, S] at S positives, evenly from the highest score to the lowest; S = 0 without any.

    Both are of the threshold at that positive's score, so that those of equal scores share a point.
    """
    m = ranking.n_positive
    chosen = torch.linspace(0, m - 1, min(points, m)).round().long().to(ranking.tp.device)
    tp, fp = ranking.tp[:, chosen].double(), ranking.fp[:, chosen].double()
    return tp / max(1, m), tp / (tp + fp)


def _confusion(asked: ColumnTokens, p: int, threshold: float) -> Sequence[int | None]:
    """The COUNTS of a probe that says yes from a threshold on; None each where it has none."""
    if math.isnan(threshold):
        return [None] * len(COUNTS)
    said, true = asked.scores[:, p] >= threshold, asked.targets
    return [int(tokens.sum()) for tokens in (said & true, said & ~true, ~said & true, ~said & ~true)]


def _rounded(values: Tensor) -> list[float]:
    return [round(value, 4) for value in values.tolist()]
