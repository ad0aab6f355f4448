"""Rows of whole texts: against scikit-learn on pooled and repeated texts, ties included; and their intervals."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from builders import sites_of
from scored_samples import KINDS, sample
from sklearn.metrics import roc_auc_score, roc_curve
from torch import Tensor

from streamprobe.evaluation.bootstrap import draw_chains, percentiles
from streamprobe.evaluation.metrics import auroc, rank, tpr_at_fpr
from streamprobe.evaluation.results import ScoredProbes
from streamprobe.evaluation.scores import Scored
from streamprobe.evaluation.texts import (
    METRICS,
    POOLINGS,
    RATES,
    TEXT_FIELDS,
    best_text_rows,
    labels_of_texts,
    resample,
    text_rows,
)
from streamprobe.lags import Column

COLUMNS = [Column("lie", "token", 0), Column("lie", "token", 4), Column("lie", "onset", 0)]
N_TEXTS = 40


def scored(
    layers: Sequence[int | str], seed: int, columns: Sequence[Column] = COLUMNS, *, n_texts: int = N_TEXTS
) -> ScoredProbes:
    """Texts of 1 to 20 tokens, of which each is true or false as a whole, in mixed order; scores with many ties."""
    truth = np.random.default_rng(0)
    lengths, lies = truth.integers(1, 21, n_texts), torch.from_numpy(truth.random(n_texts) < 0.4)
    chain = torch.from_numpy(np.repeat(np.arange(n_texts), lengths))
    token = torch.from_numpy(np.concatenate([np.arange(n) for n in lengths]))
    order = torch.from_numpy(truth.permutation(len(chain)))
    chain, token = chain[order], token[order]
    random = torch.Generator().manual_seed(seed)
    shape = (len(chain), len(layers), len(columns))
    scores = (2 * (torch.randn(shape, generator=random) + 0.3 * lies[chain, None, None])).round()
    ahead = torch.tensor([column.lag for column in columns])
    valid = token[:, None] + ahead < torch.from_numpy(lengths)[chain, None]
    whole = torch.tensor([column.target == "token" for column in columns])
    targets = lies[chain, None] & valid & (whole | (token == 0)[:, None])
    nothing = torch.zeros(shape[1:])
    return ScoredProbes(
        "newton",
        sites_of(layers),
        list(columns),
        Scored(scores, targets, valid, chain, token),
        nothing,
        torch.zeros(len(columns)),
        nothing,
        nothing,
    )


def pooled_by_loop(probes: ScoredProbes, k: int, i: int, pooling: str) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Targets and scores of the texts with a token that is asked, and their numbers."""
    s, texts, y, said = probes.scored, [], [], []
    for text in range(N_TEXTS):
        own = [n for n in range(len(s.chain)) if s.chain[n] == text and s.valid[n, k]]
        if own:
            own.sort(key=lambda n: int(s.token[n]))
            p = [1 / (1 + math.exp(-float(s.scores[n, i, k]))) for n in own]
            texts.append(text)
            y.append(any(bool(s.targets[n, k]) for n in own))
            said.append({"mean": sum(p) / len(p), "max": max(p), "last": p[-1]}[pooling])
    return np.array(y), np.array(said).round(12), texts


def by_sklearn(y: np.ndarray, said: np.ndarray) -> dict[str, float]:
    fpr, tpr, _ = roc_curve(y, said, drop_intermediate=False)
    rates = {name: tpr[fpr <= most + 1e-12].max() for name, most in RATES.items()}
    return {"auroc": roc_auc_score(y, said), **rates}


def rows_of(probes: Sequence[ScoredProbes], resamples: int = 30) -> list[dict]:
    return text_rows(probes, N_TEXTS, resamples, 7)


def test_rows_are_those_of_a_loop_over_texts() -> None:
    """Points and intervals, of every pooling, site and lag; texts too short for a lag are left out."""
    groups = [scored([3, 12], 1), scored(["embed"], 2)]
    rows = iter(rows_of(groups))
    weights = draw_chains(N_TEXTS, 30, 7).numpy()
    for group in groups:
        for k in (0, 1):
            for pooling in POOLINGS:
                for i in range(len(group.sites)):
                    row = next(rows)
                    assert list(row) and set(row) == set(TEXT_FIELDS)
                    site = group.sites[i]
                    assert (row["layer"], row["control"]) == (("", "embed") if site.is_control else (site.layer, ""))
                    assert (row["lag"], row["pooling"]) == (COLUMNS[k].lag, pooling)
                    y, said, texts = pooled_by_loop(group, k, i, pooling)
                    assert (row["n_texts"], row["n_positive"]) == (len(y), y.sum())
                    again = [np.repeat(np.arange(len(y)), w[texts]) for w in weights]
                    drawn = [by_sklearn(y[n], said[n]) for n in again if 0 < y[n].sum() < len(n)]
                    for name, point in by_sklearn(y, said).items():
                        low, high = np.quantile([each[name] for each in drawn], [0.025, 0.975])
                        found = [row[name], row[f"{name}_low"], row[f"{name}_high"]]
                        np.testing.assert_allclose(found, [point, low, high], rtol=0, atol=1e-9)
    assert next(rows, None) is None, "none of the target onset"


def test_rows_fail_to_be_the_loops_without_the_last_token() -> None:
    """Or, with the tokens in mixed order, with the last one that comes."""
    group = scored([3], 1)
    y, said, _ = pooled_by_loop(group, 0, 0, "last")
    s = group.scored
    wrong = np.array([float(s.scores[s.chain == text][-1, 0, 0]) for text in range(N_TEXTS)])
    assert abs(roc_auc_score(y, wrong) - roc_auc_score(y, said)) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_resampled_metrics_are_those_of_repeated_texts(kind: str) -> None:
    scores, targets = sample(kind, 5)
    weights = draw_chains(len(targets), 25, 3)
    for p in range(scores.shape[1]):
        found = resample(scores[:, p], targets, weights)
        for r, row in enumerate(weights):
            n = torch.arange(len(targets)).repeat_interleave(row)
            y, s = targets[n].numpy(), scores[n, p].double().numpy()
            if 0 < y.sum() < len(y):
                for name, value in by_sklearn(y, s).items():
                    assert float(found[name][r]) == pytest.approx(value, abs=1e-9)
            else:
                assert all(found[name][r].isnan() for name in METRICS)


@pytest.mark.parametrize("kind", KINDS)
def test_each_text_drawn_once_gives_the_point_estimates(kind: str) -> None:
    scores, targets = sample(kind, 6)
    ranking = rank(scores, targets)
    points = {"auroc": auroc(ranking)} | {name: tpr_at_fpr(ranking, fpr) for name, fpr in RATES.items()}
    for p in range(scores.shape[1]):
        for name, values in resample(scores[:, p], targets, torch.ones(3, len(targets), dtype=torch.int64)).items():
            assert torch.allclose(values, points[name][p].double().expand(3), rtol=0, atol=1e-12)


def test_resampled_metrics_fail_without_ties_counted_as_ties() -> None:
    scores, targets = sample("many ties", 5)
    broken = scores[:, 0].double() + torch.linspace(0, 1e-6, len(scores), dtype=torch.float64)
    weights = draw_chains(len(targets), 5, 3)
    tied, ranked = (resample(s, targets, weights)["auroc"] for s in (scores[:, 0].double(), broken))
    assert (tied - ranked).abs().max() > 1e-3


# --- which data ---


def as_sections(probes: ScoredProbes) -> ScoredProbes:
    """The same with one token that is not as the rest of its text."""
    targets = probes.scored.targets.clone()
    n = int((targets[:, 0] & (probes.scored.token > 0)).nonzero()[0])
    targets[n, 0] = False
    return probes._replace(scored=probes.scored._replace(targets=targets))


def test_data_with_sections_have_no_rows() -> None:
    probes = scored([3], 1)
    assert labels_of_texts([probes]) == ["lie"]
    assert labels_of_texts([as_sections(probes)]) == [] and rows_of([as_sections(probes)]) == []


def test_texts_of_one_class_have_no_rows() -> None:
    probes = scored([3], 1)
    for targets in (torch.zeros_like(probes.scored.targets), probes.scored.valid):
        same = probes._replace(scored=probes.scored._replace(targets=targets))
        assert rows_of([same]) == []


def test_each_label_is_looked_at_alone() -> None:
    both = [COLUMNS[0]._replace(label="section"), *COLUMNS]
    rows = rows_of([as_sections(scored([3], 1, both))])
    assert {row["label"] for row in rows} == {"lie"} and len(rows) == 2 * len(POOLINGS)


def test_there_are_no_rows_without_probes() -> None:
    assert rows_of([]) == [] and rows_of([scored(["embed"], 1)]) == []


def test_other_seeds_have_no_rows_of_their_own() -> None:
    probes = scored([3], 1, [COLUMNS[0], COLUMNS[0]._replace(seed=1)])
    assert len(rows_of([probes])) == len(POOLINGS)


def test_a_single_positive_text_has_no_interval() -> None:
    probes = scored([3], 1, COLUMNS[:1])
    one = int(probes.scored.chain[probes.scored.targets[:, 0]][0])
    targets = probes.scored.targets & (probes.scored.chain == one)[:, None]
    for row in rows_of([probes._replace(scored=probes.scored._replace(targets=targets))]):
        assert row["n_positive"] == 1 and not math.isnan(row["auroc"])
        assert all(math.isnan(row[f"{name}_{end}"]) for name in METRICS for end in ("low", "high"))


def test_the_best_layer_stands_beside_the_best_control() -> None:
    rows = rows_of([scored([3, 12], 1), scored(["embed"], 2), scored(["position"], 3)], resamples=0)
    best = best_text_rows(rows)
    assert [probe["pooling"] for probe, _ in best] == list(POOLINGS)
    for probe, control in best:
        assert control and probe["lag"] == control["lag"] == 0
        near = [row for row in rows if (row["lag"], row["pooling"]) == (0, probe["pooling"])]
        assert probe["auroc"] == max(row["auroc"] for row in near if not row["control"])
        assert control["auroc"] == max(row["auroc"] for row in near if row["control"])
    assert all(control is None for _, control in best_text_rows(rows_of([scored([3], 1)], resamples=0)))


# --- intervals ---


def coverage(shrink: float = 1.0, runs: int = 150, n: int = 80) -> dict[str, float]:
    """How often the interval of normal scores, one deviation apart, holds the true value."""
    true = {"auroc": 0.760250, "tpr_at_5fpr": 0.259511}  # Phi(1 / sqrt 2), Phi(1 - 1.644854)
    random = torch.Generator().manual_seed(0)
    held = dict.fromkeys(true, 0)
    for run in range(runs):
        targets = torch.arange(n) < n // 2
        scores = torch.randn(n, generator=random, dtype=torch.float64) + targets
        found = resample(scores, targets, draw_chains(n, 200, run))
        for name, value in true.items():
            low, high = percentiles(found[name]).tolist()
            middle, half = (low + high) / 2, shrink * (high - low) / 2
            held[name] += abs(value - middle) <= half
    return {name: count / runs for name, count in held.items()}


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    assert all(0.88 <= share <= 1 for share in coverage().values())


def test_intervals_fail_to_hold_the_truth_without_their_width() -> None:
    assert all(share < 0.8 for share in coverage(shrink=0.4).values())


def test_the_memory_of_many_resamples_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of another size give the same numbers."""
    from streamprobe.evaluation import texts

    scores, targets = sample("many ties", 5)
    weights = draw_chains(len(targets), 25, 3)
    whole = resample(scores[:, 0], targets, weights)
    monkeypatch.setattr(texts, "BLOCK", 4)
    in_blocks: dict[str, Tensor] = resample(scores[:, 0], targets, weights)
    assert all(torch.equal(whole[name].nan_to_num(-1), in_blocks[name].nan_to_num(-1)) for name in METRICS)
