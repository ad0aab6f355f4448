"""Held-out chains to look into: a few, picked by what a probe got right and wrong, with what each says of a token.

Shapes: N tokens, L layers, K columns, T tokens in a chain.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from streamprobe.data.tokenize import Chain
from streamprobe.evaluation.results import ScoredProbes
from streamprobe.evaluation.rows import PLACE, Row, place_fields
from streamprobe.evaluation.scores import Scored, tokens_of_column
from streamprobe.evaluation.verdict import furthest, is_certain
from streamprobe.lags import UNKNOWN
from streamprobe.probes.linear import LINEAR

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


class Probe(NamedTuple):
    """One probe of a group that was scored together, by the numbers of its layer and column in it."""

    group: ScoredProbes
    layer: int
    column: int

    def place(self) -> dict[str, Any]:
        """What names it, as in a row of results.csv."""
        column = self.group.columns[self.column]
        fields = place_fields(self.group.solver, self.group.sites[self.layer], column, kind=self.group.kind)
        return {name: fields[name] for name in PLACE}

    def threshold(self) -> float | None:
        """The probability from which validation would have it say yes; None where it had no class to choose by."""
        chosen = float(self.group.threshold[self.layer, self.column].sigmoid())
        return None if math.isnan(chosen) else round(chosen, 4)


def reference(rows: Sequence[Row]) -> Row | None:
    """The row of the probe that picks: that of the verdict; else of the largest lift, else of the highest AUROC."""
    certain = [row for row in rows if is_certain(row)]
    if certain:
        return furthest(certain)
    probes = [row for row in rows if not row["control"] and not math.isnan(row["auroc"])]
    lifted = [row for row in probes if not math.isnan(row["lift"])]
    name = "lift" if lifted else "auroc"
    return max(lifted or probes, key=lambda row: row[name], default=None)


def _why(best: Row | None, rows: Sequence[Row]) -> str:
    """What the probe that picks has, of the run's rows."""
    if best is not None and is_certain(best):
        first = furthest([row for row in rows if is_certain(row)])
        return "the verdict" if first == best else "the furthest certain lag of all linear ones"
    return "the highest AUROC" if best is None or math.isnan(best["lift"]) else "the largest lift"


def pick(scores: Tensor, targets: Tensor, chain: Tensor, token: Tensor) -> list[Pick]:
    """The best hits, worst misses and false alarms of a probe, no chain twice.

    scores [N], targets [N], chain [N], token [N] of the tokens at which it is asked.  A hit or miss is a run of
    neighbouring positive tokens: the hits have the highest mean score, the misses the lowest maximum.  A false alarm is
    a negative token with the highest score.
    """
    order = torch.from_numpy(np.lexsort((token.numpy(), chain.numpy())))
    scores, targets, chain, token = (x[order] for x in (scores, targets, chain, token))
    runs = _runs(targets.nonzero()[:, 0].tolist(), chain, token)
    negatives = (~targets).nonzero()[:, 0]
    ranked = {
        "hit": sorted(runs, key=lambda run: -float(scores[run].mean())),
        "miss": sorted(runs, key=lambda run: float(scores[run].max())),
        "false alarm": [[n] for n in negatives[scores[negatives].argsort(descending=True, stable=True)].tolist()],
    }
    picks: list[Pick] = []
    for kind, count in PICKS.items():
        for run in ranked[kind]:
            own, used = int(chain[run].min()), {p.chain for p in picks}
            if sum(p.kind == kind for p in picks) == count:
                break
            if own not in used:
                picks.append(Pick(kind, own, int(token[run].min()), int(token[run].max())))
    return picks


def _runs(positives: Sequence[int], chain: Tensor, token: Tensor) -> list[list[int]]:
    """The numbers of positive tokens, those that are neighbours in a chain together."""
    runs: list[list[int]] = []
    for n in positives:
        if runs and n == runs[-1][-1] + 1 and chain[n] == chain[n - 1] and token[n] == token[n - 1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return runs


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
    letters = np.frombuffer((LEVELS + UNASKED).encode(), np.uint8)
    return letters[steps.where(asked, len(LEVELS)).numpy()].tobytes().decode()


def collect(
    groups: Sequence[ScoredProbes],
    rows: Sequence[Row],
    chains: Sequence[Chain],
    *,
    labels: Sequence[str],
    tokenizer: Any,
) -> dict[str, Any]:
    """What transcripts.json holds.

    `chains` are those that the tokens of `groups` name, their first codes are of `labels`.
    """
    probes = [Probe(group, i, k) for group in groups for i, k in group.real()]
    best = reference([row for row in rows if row["kind"] == LINEAR])
    picks = [] if best is None else _picks(probes, best)
    longest = max(SHORTEST, ROOM // max(1, len(probes) * len(picks)))
    picks = picks[: max(1, ROOM // (max(1, len(probes)) * SHORTEST))]
    return {
        "labels": list(labels),
        "probes": [probe.place() | {"threshold": probe.threshold()} for probe in probes],
        "reference": best and {name: best[name] for name in PLACE},
        "picked_by": _why(best, rows),
        "chains": [
            _excerpt(each, chains[each.chain], groups, n_labels=len(labels), longest=longest, tokenizer=tokenizer)
            for each in picks
        ],
    }


def _picks(probes: Sequence[Probe], best: Row) -> list[Pick]:
    """The picks of the probe whose row is `best`."""
    probe = next(probe for probe in probes if all(best[name] == value for name, value in probe.place().items()))
    asked = tokens_of_column([(probe.group.scored, probe.column)])
    scores, targets, chain, token = (each.cpu() for each in asked)
    return pick(scores[:, probe.layer], targets, chain, token)


def _excerpt(
    why: Pick, chain: Chain, groups: Sequence[ScoredProbes], *, n_labels: int, longest: int, tokenizer: Any
) -> dict[str, Any]:
    """At most `longest` tokens of a chain around the pick."""
    length = len(chain.ids)
    first = max(0, min((why.first + why.last - longest) // 2, length - longest))
    shown = slice(first, min(length, first + longest))
    codes = ["".join("-" if c == UNKNOWN else str(c) for c in row) for row in chain.codes[shown, :n_labels].T.tolist()]
    return {
        "id": chain.id,
        "kind": why.kind,
        "at": [why.first, why.last],
        "first": first,
        "length": length,
        "tokens": pieces(chain.ids.tolist(), tokenizer)[shown],
        "codes": codes,
        "said": [line for group in groups for line in _said(group, why.chain, length, shown)],
    }


def _said(group: ScoredProbes, chain: int, length: int, shown: slice) -> list[str]:
    """What each of the group's probes that are no controls says of the tokens `shown` of a chain of that length."""
    own = Scored(*(each.cpu() for each in group.scored.at(group.scored.chain == chain)))
    lines = []
    for i, k in group.real():
        asked, probability = torch.zeros(length, dtype=torch.bool), torch.zeros(length)
        asked[own.token], probability[own.token] = own.valid[:, k], own.scores[:, i, k].sigmoid()
        lines.append(encode(probability[shown], asked[shown], Probe(group, i, k).threshold()))
    return lines
