"""Held-out chains to read: a few, picked by what a probe got right and wrong, with what every probe says of each token.

Shapes: N tokens, L layers, K columns, T tokens in a chain.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from streamprobe.data.tokenize import Chain
from streamprobe.evaluation.results import ScoredProbes
from streamprobe.evaluation.rows import Row
from streamprobe.lags import UNKNOWN

LEVELS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz+-"  # of the square root of a probability
UNASKED = "."  # a token at which the probe is not asked
PICKS = {"hit": 4, "miss": 3, "false alarm": 3}
ROOM = 600_000  # probabilities in all; excerpts get shorter where there are more
SHORTEST = 40  # tokens of an excerpt


class Pick(NamedTuple):
    """Why a chain is shown: a hit, a miss or a false alarm of the reference probe at these tokens."""

    kind: str
    chain: int
    first: int
    last: int


def reference(rows: Sequence[Row]) -> Row | None:
    """The probe that picks: the one with the largest lift, or without lifts with the highest AUROC; NaN left out."""
    probes = [row for row in rows if not row["control"] and row["auroc"] == row["auroc"]]
    lifted = [row for row in probes if row["lift"] == row["lift"]]
    name = "lift" if lifted else "auroc"
    return max(lifted or probes, key=lambda row: row[name], default=None)


def pick(scores: Tensor, targets: Tensor, chain: Tensor, token: Tensor) -> list[Pick]:
    """The best hits, worst misses and false alarms of a probe, no chain twice.

    scores [N], targets [N], chain [N], token [N] of the tokens at which it is asked.  A hit or miss is a run of
    neighbouring positive tokens: the hits have the highest mean score, the misses the lowest maximum.  A false alarm is
    a negative token with the highest score.
    """
    order = torch.from_numpy(np.lexsort((token.numpy(), chain.numpy())))
    scores, targets, chain, token = (x[order] for x in (scores, targets, chain, token))
    runs: list[list[int]] = []
    for n in targets.nonzero()[:, 0].tolist():
        if runs and n == runs[-1][-1] + 1 and chain[n] == chain[n - 1] and token[n] == token[n - 1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    quiet = (~targets).nonzero()[:, 0]
    loudest = quiet[scores[quiet].argsort(descending=True, stable=True)].tolist()
    ranked = {
        "hit": sorted(runs, key=lambda run: -float(scores[run].mean())),
        "miss": sorted(runs, key=lambda run: float(scores[run].max())),
        "false alarm": [[n] for n in loudest],
    }
    picks: list[Pick] = []
    for kind, count in PICKS.items():
        for run in ranked[kind]:
            own, used = int(chain[run[0]]), {p.chain for p in picks}
            if sum(p.kind == kind for p in picks) == count:
                break
            if own not in used:
                picks.append(Pick(kind, own, int(token[run[0]]), int(token[run[-1]])))
    return picks


def pieces(ids: Sequence[int], tokenizer: Any) -> list[str]:
    """The text of each token, such that they join to the whole; a character of several tokens is its last one's."""
    texts, before, read = [], 0, 0
    for i in range(len(ids)):
        known, now = (tokenizer.decode(ids[before:end], clean_up_tokenization_spaces=False) for end in (read, i + 1))
        if now.endswith("\ufffd") and i + 1 < len(ids):
            texts.append("")
            continue
        texts.append(now[len(known) :])
        before, read = read, i + 1
    return texts


def encode(probability: Tensor, asked: Tensor, threshold: float | None) -> str:
    """A character a token: the square root of probability [T] in 63 steps, UNASKED where asked [T] is False.

    No step is on the other side of the threshold than its probability.
    """
    top = len(LEVELS) - 1
    steps = (probability.sqrt() * top).round().long()
    if threshold is not None:
        shown, true = (steps / top).square() >= threshold, probability >= threshold
        steps = (steps + (true & ~shown).long() - (shown & ~true).long()).clamp(0, top)
    return "".join(LEVELS[n] if a else UNASKED for n, a in zip(steps.tolist(), asked.tolist(), strict=True))


def collect(
    parts: Sequence[ScoredProbes], rows: Sequence[Row], chains: Sequence[Chain], labels: Sequence[str], tokenizer: Any
) -> dict[str, Any]:
    """What transcripts.json holds; `chains` are those that the parts' tokens name, their first codes of `labels`."""
    real = [(part, i, k) for part in parts for i, k in part.real()]
    best = reference(rows)
    picks = [] if best is None else _picks(real, best)
    longest = max(SHORTEST, ROOM // max(1, len(real) * len(picks)))
    picks = picks[: max(1, ROOM // (max(1, len(real)) * SHORTEST))]
    named = ("solver", "layer", "label", "target", "lag")
    return {
        "labels": list(labels),
        "probes": [
            {"solver": p.solver, "layer": p.sites[i].layer, "label": c.label, "target": c.target, "lag": c.lag,
             "threshold": _number(p.threshold[i, k].sigmoid())}
            for p, i, k in real for c in [p.columns[k]]
        ],
        "reference": best and {name: best[name] for name in named},
        "picked_by": "the highest AUROC" if best is None or best["lift"] != best["lift"] else "the largest lift",
        "chains": [_excerpt(each, chains[each.chain], real, len(labels), longest, tokenizer) for each in picks],
    }  # fmt: skip


def _picks(real: Sequence[tuple[ScoredProbes, int, int]], best: Row) -> list[Pick]:
    named = {name: best[name] for name in ("label", "target", "lag")}
    part, i, k = next(
        (p, i, k) for p, i, k in real
        if p.solver == best["solver"] and p.sites[i].layer == best["layer"]
        and named == {name: getattr(p.columns[k], name) for name in named}
    )  # fmt: skip
    scored, valid = part.scored, part.scored.valid[:, k]
    return pick(scored.scores[valid, i, k], scored.targets[valid, k], scored.chain[valid], scored.token[valid])


def _number(x: Tensor) -> float | None:
    return None if x.isnan() else round(float(x), 4)


def _excerpt(
    why: Pick, chain: Chain, real: Sequence[tuple[ScoredProbes, int, int]], n_labels: int, longest: int, tokenizer: Any
) -> dict[str, Any]:
    """At most `longest` tokens of a chain around the pick."""
    length = len(chain.ids)
    first = max(0, min((why.first + why.last - longest) // 2, length - longest))
    shown = slice(first, min(length, first + longest))
    codes = ["".join("-" if c == UNKNOWN else str(c) for c in row) for row in chain.codes[shown, :n_labels].T.tolist()]
    said = []
    for part, i, k in real:
        own = part.scored.chain == why.chain
        place, asked = part.scored.token[own], torch.zeros(length, dtype=torch.bool)
        probability = torch.zeros(length)
        asked[place], probability[place] = part.scored.valid[own, k], part.scored.scores[own, i, k].sigmoid()
        said.append(encode(probability[shown], asked[shown], _number(part.threshold[i, k].sigmoid())))
    return {
        "id": chain.id, "kind": why.kind, "at": [why.first, why.last], "first": first, "length": length,
        "tokens": pieces(chain.ids.tolist(), tokenizer)[shown], "codes": codes, "said": said,
    }  # fmt: skip
