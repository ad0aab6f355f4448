"""What a layer adds to the joint control: how much better the two together predict than the control does alone.

A nested probe reads the joint control's features and a layer.  What it says better than the control alone is known to
the layer and not to the control (conditional probing: Hewitt et al. 2021, arXiv 2109.09234).  It is measured in three
ways: `gain_bits`, the mean log-loss of the control less that of the nested probe, in bits a token; `gain`, the
difference of AUROC; and `gain_within`, the difference of AUROC within chains, which is the fraction of the pairs of a
positive and a negative token of the same chain that are in the right order, so that what is constant in a chain
cancels.  All of it on chains that trained neither: on those that did, a test of nested AUROCs is invalid (Demler et al.
2012).  Where nothing is gained the usual error of a difference of nested scores goes to 0, and no test of it holds (a
degenerate null: Williamson et al. 2022); here that ends in a nested probe that is the control itself, of which the
gains are exactly 0.

Shapes: n tokens of a column, L layers, P probes (the control, then the layers), K columns, C chains, H chains that hold
a positive, R resamples, M = 3 measures (GAINS, in their order).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from streamprobe.evaluation.bootstrap import percentiles, probes_at_once, rank_chains, resample_areas
from streamprobe.evaluation.metrics import auroc
from streamprobe.evaluation.rows import GAINS, PLACE, Judged, Row, place_fields
from streamprobe.evaluation.scored_probes import ScoredProbes
from streamprobe.evaluation.scores import ColumnTokens, tokens_of_column
from streamprobe.evaluation.significance import LEAST_CHAINS, lower_bounds


class Gains(NamedTuple):
    """What L layers add to the control at one column."""

    points: Tensor  # [M, L] float64, NaN where there is nothing to tell by
    resampled: Tensor  # [R, M, L] the same in each resample
    n_chains: list[int]  # [M] test chains by which each is judged


class _Sums(NamedTuple):
    """What the gains of P probes are differences of."""

    bits: Tensor  # [P, C] log-loss of all tokens of a chain
    ordered: Tensor  # [P, C] pairs of a positive and a negative of the chain in the right order, ties counted half
    area: Tensor  # [P]
    areas: Tensor  # [R, P] in each resample


def add_gains(judged: Sequence[Judged], nested: Sequence[ScoredProbes], weights: Tensor) -> None:
    """Fills in the gains of the rows of all probes that nested ones (the control first) read beside the control.

    `nested` are the groups of one solver, one a kind.  Gains are NaN where a nested probe was not trained far enough
    for a penalty to be chosen.
    weights [R, C]: how often each resample draws each chain.  The corrected low ends hold for all kinds, layers and
    lags of a label and target together, as far as these can be judged by LEAST_CHAINS chains.
    """
    rows = {tuple(each.row[name] for name in PLACE): each.row for each in judged if not each.row["control"]}
    families: dict[tuple[str, str], list[tuple[ScoredProbes, int]]] = {}
    for each in nested:
        for k, column in enumerate(each.columns):
            families.setdefault((column.label, column.target), []).append((each, k))
    for places in families.values():
        found = [gains_of_column(each, k, weights) for each, k in places]
        for (each, k), own, low in zip(places, found, _correct(found), strict=True):
            intervals = percentiles(own.resampled)  # [M, L, 2]
            for i, site in enumerate(each.sites[1:]):
                fields = place_fields(each.solver, site, each.columns[k], kind=each.kind)
                about = _about(each, i + 1, k)
                known = math.nan if each.penalty is not None and math.isnan(about["penalty"]) else 1.0
                place = tuple(fields[name] for name in PLACE)
                rows[place] |= _fields(own.points[:, i] * known, intervals[:, i] * known, low[:, i] * known) | about


def _fields(points: Tensor, intervals: Tensor, low: Tensor) -> Row:
    """The fields of a row that hold a layer's gains: points [M], intervals [M, 2], corrected low ends [M]."""
    row: Row = {}
    each = zip(GAINS, points.tolist(), intervals.tolist(), low.tolist(), strict=True)
    for name, point, (start, end), corrected in each:
        row |= {name: point, f"{name}_low": start, f"{name}_high": end, f"{name}_low_corrected": corrected}
    return row


def _about(nested: ScoredProbes, i: int, k: int) -> Row:
    """The fields of a row that say how the nested probe of site i was trained."""
    penalty = math.nan if nested.penalty is None else float(nested.penalty[i, k])
    return {"penalty": penalty, "nested_gradient_norm": float(nested.gradient_norm[i, k])}


def _correct(found: Sequence[Gains]) -> list[Tensor]:
    """The corrected low ends [M, L] of the gains at each column; NaN where too few chains tell of one."""
    low = [torch.full_like(each.points, math.nan) for each in found]
    for m in range(len(GAINS)):
        sound = [j for j, each in enumerate(found) if each.n_chains[m] >= LEAST_CHAINS]
        if not sound:
            continue
        points = torch.cat([found[j].points[m] for j in sound])
        resampled = torch.cat([found[j].resampled[:, m] for j in sound], 1)  # [R, columns x layers]
        bounds = lower_bounds(points, resampled, min(found[j].n_chains[m] for j in sound))
        for j, own in zip(sound, bounds.split([low[j].shape[1] for j in sound]), strict=True):
            low[j][m] = own
    return low


def gains_of_column(nested: ScoredProbes, k: int, weights: Tensor) -> Gains:
    """What each layer adds to the control at column k, and the same in resamples whose weights are [R, C].

    Where fewer than two chains bear on a gain, its resamples are NaN.
    """
    asked = tokens_of_column([(nested.scored, k)])
    weights = weights.to(asked.scores.device).double()
    positive, negative = (_tokens(asked.chain[own], weights.shape[1]) for own in (asked.targets, ~asked.targets))
    sums, counts = _sum(asked, weights), [positive + negative, positive * negative]
    whole = _measure(sums, sums.area[None], counts=counts, weights=weights.new_ones(1, weights.shape[1]))
    drawn = _measure(sums, sums.areas, counts=counts, weights=weights)
    same = _is_control(nested, k).to(weights.device)
    points, resampled = (_less_control(each, same).cpu() for each in (whole, drawn))
    n_chains = [int(each.count_nonzero()) for each in (positive, positive, counts[1])]
    resampled[:, torch.tensor(n_chains) < 2] = math.nan
    return Gains(points[0], resampled, n_chains)


def _sum(asked: ColumnTokens, weights: Tensor) -> _Sums:
    """The sums of all probes of a column, of as many at once as memory is meant for."""
    at_once = probes_at_once(weights.shape[1], int(asked.targets.sum()))
    found = [_sum_some(asked._replace(scores=own.T), weights) for own in asked.scores.T.split(at_once)]
    bits, ordered, area, areas = zip(*found, strict=True)
    return _Sums(torch.cat(bits), torch.cat(ordered), torch.cat(area), torch.cat(areas, 1))


def _sum_some(asked: ColumnTokens, weights: Tensor) -> _Sums:
    """The sums of a few probes."""
    logits = asked.scores.T.double()  # [P, n]
    losses = -logsigmoid(logits.where(asked.targets, -logits)) / math.log(2)
    bits = losses.new_zeros(len(losses), weights.shape[1]).index_add_(1, asked.chain, losses)
    ranking, table = rank_chains(asked.scores, asked.targets, asked.chain, weights.shape[1])
    held = torch.arange(len(table.holders), device=table.holders.device)
    ordered = torch.zeros_like(bits).index_copy_(1, table.holders, table.pairs[:, table.holders, held])
    return _Sums(bits, ordered, auroc(ranking), resample_areas(table, weights))


def _tokens(chain: Tensor, n_chains: int) -> Tensor:
    """How many of the tokens of chain [n] each chain has: [C] float64."""
    return chain.bincount(minlength=n_chains).double()


def _measure(sums: _Sums, areas: Tensor, *, counts: Sequence[Tensor], weights: Tensor) -> Tensor:
    """The measures of P probes in each resample, the more the better: [R, M, P].

    areas [R, P]; counts: tokens and pairs of each chain, [C] each.  Two of them are ratios of sums over chains, so that
    a resample of chains takes two matrix products.
    """
    tokens, pairs = counts
    return torch.stack([-_mean(sums.bits, tokens, weights), areas, _mean(sums.ordered, pairs, weights)], 1)


def _mean(sums: Tensor, counts: Tensor, weights: Tensor) -> Tensor:
    """The mean over what is counted, in each resample: sums [P, C], counts [C], weights [R, C] -> [R, P].

    NaN where nothing is counted.
    """
    n = weights @ counts
    return (weights @ sums.T) / n.where(n > 0, math.nan)[:, None]


def _is_control(nested: ScoredProbes, k: int) -> Tensor:
    """Whether each layer's probe is the control itself, since validation would have nothing of the layer: [L] bool."""
    if nested.penalty is None:
        return torch.zeros(len(nested.sites) - 1, dtype=torch.bool)
    return nested.penalty[1:, k].isinf()


def _less_control(measures: Tensor, same: Tensor) -> Tensor:
    """Measures [R, M, P] of the layers less those of the control, [R, M, L]; exactly 0 where `same` [L] is True."""
    gained = measures[..., 1:] - measures[..., :1]
    return torch.where(same & ~gained.isnan(), 0, gained)
