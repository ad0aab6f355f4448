"""Lifts, intervals, verdicts: against plain loops with scikit-learn, and against the truth of made-up sources."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from builders import sites_of
from scipy.stats import t
from sklearn.metrics import brier_score_loss, roc_auc_score
from torch import Tensor

from streamprobe.evaluation import bootstrap
from streamprobe.evaluation.bootstrap import chain_bootstrap, draw_chains, percentiles
from streamprobe.evaluation.results import BINS, ScoredProbes, by_category, differences, judge, reliability
from streamprobe.evaluation.rows import COMPARED, FIELDS, Judged
from streamprobe.evaluation.scores import Scored
from streamprobe.evaluation.significance import lower_bounds
from streamprobe.evaluation.verdict import verdicts
from streamprobe.lags import Column

N_CHAINS, LENGTH = 24, 40
LAGS = (0, 8)


def source(seed: int, n_chains: int = N_CHAINS, length: int = LENGTH) -> tuple[Tensor, Tensor]:
    """Targets [N] of chains with rates of their own, and the chain of each token."""
    random = np.random.default_rng(seed)
    rates = random.beta(2, 6, n_chains)
    targets = random.random((n_chains, length)) < rates[:, None]
    return torch.from_numpy(targets.flatten()), torch.arange(n_chains).repeat_interleave(length)


def part(
    name: str,
    layers: Sequence[int | str],
    columns: Sequence[Column],
    targets: Tensor,
    chain: Tensor,
    strength: Tensor,
    seed: int,
) -> ScoredProbes:
    """Scores that see the target with a strength [L, K] each, and noise that a chain's tokens share in part."""
    random = torch.Generator().manual_seed(seed)
    shape = (len(targets), len(layers), len(columns))
    shared = torch.randn((1 + int(chain.max()), *shape[1:]), generator=random)
    noise = torch.randn(shape, generator=random) + shared[chain]
    y = targets[:, None].expand(-1, len(columns))
    scores = noise + strength * y[:, None].float()
    valid = (torch.rand(len(targets), generator=torch.Generator().manual_seed(9)) < 0.9)[:, None].expand_as(y)
    nothing = torch.zeros(shape[1:])
    return ScoredProbes(
        name,
        sites_of(layers),
        list(columns),
        Scored(scores, y & valid, valid, chain, chain),
        nothing,
        torch.zeros(len(columns)),
        nothing,
        nothing,
    )


@pytest.fixture(scope="module")
def parts() -> list[ScoredProbes]:
    """Two layers of which one sees much at lag 0, permuted twins that see nothing, and two controls."""
    targets, chain = source(0)
    real = [Column("back", "token", lag) for lag in LAGS]
    twins = [column._replace(control="permuted") for column in real]
    strength = torch.tensor([[0.5, 0.2, 0.0, 0.0], [2.5, 0.2, 0.0, 0.0]])
    return [
        part("newton", [3, 5], [*real, *twins], targets, chain, strength, 1),
        part("newton", ["embed"], real, targets, chain, torch.tensor([[0.4, 0.1]]), 2),
        part("newton", ["persistence"], real[1:], targets, chain, torch.tensor([[0.3]]), 3),
    ]


@pytest.fixture(scope="module")
def judged(parts: list[ScoredProbes]) -> list[Judged]:
    return judge(parts, N_CHAINS, 100, 7)


def assert_alike(judged: Sequence[Judged], others: Sequence[Judged]) -> None:
    """The same rows, but for rounding and for what compares them with others."""
    for each, other in zip(judged, others, strict=True):
        assert each.row.keys() == other.row.keys() and torch.equal(each.areas, other.areas)
        for name, value in each.row.items():
            if name not in COMPARED and isinstance(value, float):
                assert value == pytest.approx(other.row[name], rel=0, abs=1e-6, nan_ok=True), name
            elif name not in COMPARED:
                assert value == other.row[name], name


def test_probes_are_judged_alike_alone_and_beside_others(parts: list[ScoredProbes], judged: list[Judged]) -> None:
    """All probes of a column are ranked together."""
    assert_alike([each for alone in parts for each in judge([alone], N_CHAINS, 100, 7)], judged)


def test_judging_does_not_depend_on_how_large_a_table_is(
    parts: list[ScoredProbes], judged: list[Judged], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bootstrap, "CELLS", 1)
    assert_alike(judge(parts, N_CHAINS, 100, 7), judged)


def test_judging_together_fails_without_the_same_tokens(parts: list[ScoredProbes]) -> None:
    scored = parts[1].scored
    other = parts[1]._replace(scored=scored._replace(valid=scored.valid.roll(1, 0)))
    with pytest.raises(AssertionError, match="a column asks all the same"):
        judge([parts[0], other], N_CHAINS, 100, 7)


def find(judged: Sequence[Judged], layer: object, lag: int, control: str = "") -> dict[str, object]:
    [row] = [
        each.row
        for each in judged
        if (each.row["layer"], each.row["lag"], each.row["control"]) == (layer, lag, control)
    ]
    return row


def scored(parts: Sequence[ScoredProbes], number: int, i: int, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores, targets and chains of one probe's valid tokens."""
    scores, targets, valid, chain, _ = parts[number].scored
    v = valid[:, k]
    return scores[v, i, k].numpy(), targets[v, k].numpy(), chain[v].numpy()


def test_a_row_for_every_probe_and_control(judged: list[Judged]) -> None:
    assert len(judged) == 2 * 4 + 2 + 1 and all(set(FIELDS) == set(each.row) for each in judged)
    assert [each.row["layer"] for each in judged] == [3, 3, 3, 3, 5, 5, 5, 5, "", "", ""]


def test_the_lift_is_over_the_best_control_of_its_lag(parts: list[ScoredProbes], judged: list[Judged]) -> None:
    area = {
        name: roc_auc_score(*reversed(scored(parts, *where)[:2]))
        for name, where in {
            "probe": (0, 1, 1),
            "permuted": (0, 1, 3),
            "other layer's": (0, 0, 3),
            "embed": (1, 0, 1),
            "persistence": (2, 0, 0),
        }.items()
    }
    row = find(judged, 5, 8)
    best = max(("permuted", "embed", "persistence"), key=area.__getitem__)
    assert row["best_control"] == best and row["lift"] == pytest.approx(area["probe"] - area[best])
    assert find(judged, 5, 0)["best_control"] in ("embed", "permuted"), "persistence has no column at lag 0"
    assert all(math.isnan(each.row["lift"]) and not each.row["best_control"] for each in judged if each.row["control"])


def lift_by_loop(
    parts: Sequence[ScoredProbes], control: tuple[int, int, int], weights: Tensor, other: Tensor
) -> np.ndarray:
    """The 95% interval of (layer 5, lag 8) over a control, token by token; `other` are the control's own weights."""
    lifts = []
    for rows in zip(weights.numpy(), other.numpy(), strict=True):
        areas = []
        for where, row in zip(((0, 1, 1), control), rows, strict=True):
            scores, targets, chain = scored(parts, *where)
            index = np.repeat(np.arange(len(chain)), row[chain])
            areas.append(roc_auc_score(targets[index], scores[index]))
        lifts.append(areas[0] - areas[1])
    return np.quantile(lifts, [0.025, 0.975])


def test_the_interval_of_a_lift_is_that_of_a_paired_loop(parts: list[ScoredProbes], judged: list[Judged]) -> None:
    row = find(judged, 5, 8)
    control = {"embed": (1, 0, 1), "persistence": (2, 0, 0), "permuted": (0, 1, 3)}[str(row["best_control"])]
    weights = draw_chains(N_CHAINS, 100, 7)
    ours = np.array([row["lift_low"], row["lift_high"]])
    np.testing.assert_allclose(ours, lift_by_loop(parts, control, weights, weights), atol=1e-6)
    unpaired = lift_by_loop(parts, control, weights, draw_chains(N_CHAINS, 100, 8))  # negative control
    assert np.abs(ours - unpaired).max() > 1e-3


def test_differences_are_paired_too(parts: list[ScoredProbes], judged: list[Judged]) -> None:
    rows = differences(judged)
    assert len(rows) == 2 + 2  # the layers at each lag, the lags of each layer
    [row] = [r for r in rows if r["between"] == "layer" and r["lag"] == 8]
    areas = []
    for weights in draw_chains(N_CHAINS, 100, 7).numpy():
        each = []
        for i in (0, 1):
            scores, targets, chain = scored(parts, 0, i, 1)
            index = np.repeat(np.arange(len(chain)), weights[chain])
            each.append(roc_auc_score(targets[index], scores[index]))
        areas.append(each[0] - each[1])
    np.testing.assert_allclose([row["low"], row["high"]], np.quantile(areas, [0.025, 0.975]), atol=1e-6)
    assert (row["a"], row["b"]) == (3, 5)


def test_a_corrected_lift_is_above_0_where_one_is_certain(judged: list[Judged]) -> None:
    assert find(judged, 5, 0)["lift_low_corrected"] > 0 > find(judged, 5, 8)["lift_low_corrected"]
    assert all(
        each.row["lift_low_corrected"] <= each.row["lift_low"] + 0.02 for each in judged if not each.row["control"]
    )


def test_a_lift_is_over_single_controls_alone(parts: list[ScoredProbes], judged: list[Judged]) -> None:
    """Negative control: under another name the joint control, which sees all, is the best one."""
    joint = parts[1]._replace(scored=parts[1].scored._replace(scores=parts[1].scored.targets[:, None].float()))
    lifts = {
        name: [each.row["lift"] for each in judge([*parts, joint._replace(sites=sites_of([name]))], N_CHAINS, 0, 7)[:8]]
        for name in ("joint", "joint+chain", "text")
    }
    expected = [each.row["lift"] for each in judged[:8]]
    assert str(lifts["joint"]) == str(lifts["joint+chain"]) == str(expected) != str(lifts["text"])


def test_lift_makes_no_verdict(judged: list[Judged]) -> None:
    [sentence] = verdicts(judged, 1e-3)
    assert sentence == (
        "back: no verdict on a token inside back, since the control joint+chain was not trained (--controls) [newton]"
    )


# --- corrected for how many probes are looked at ---


def null_family(seed: int, n: int = 60, looks: int = 40) -> tuple[Tensor, Tensor]:
    """Means [Q] of n draws about 0, some of them alike, and their means in 400 resamples [R, Q]."""
    random = np.random.default_rng(seed)
    draws = random.standard_normal((n, looks)) + 0.7 * random.standard_normal((n, 1))
    weights = random.multinomial(n, np.full(n, 1 / n), size=400)
    return torch.from_numpy(draws.mean(0)), torch.from_numpy(weights @ draws / n)


def test_false_alarms_of_a_whole_family_are_as_rare_as_promised() -> None:
    """200 families of 40 looks at nothing: about 2.5% hold a false alarm; without correction most would."""
    alarms = alone = 0
    for seed in range(200):
        points, resampled = null_family(seed)
        alarms += bool((lower_bounds(points, resampled, 60) > 0).any())
        alone += bool((percentiles(resampled)[:, 0] > 0).any())
    assert alarms <= 14  # 5 expected; 14 or more with a chance below 0.001
    assert alone > 40  # negative control


def test_one_look_is_an_ordinary_interval_and_a_fixed_difference_has_none() -> None:
    points, resampled = null_family(1, looks=1)
    low = points - t.ppf(0.975, 59) * (60 / 59) ** 0.5 * resampled.std(0)
    assert torch.allclose(lower_bounds(points, resampled, 60), low, atol=0.04)
    assert torch.equal(lower_bounds(torch.tensor([0.5]), torch.full((10, 1), 0.5), 60), torch.tensor([0.5]))
    assert lower_bounds(points, resampled[:0], 60).isnan().all()
    resampled[:150] = math.nan  # some resamples lack a class
    assert torch.allclose(lower_bounds(points, resampled, 60), low, atol=0.08)
    resampled[150:250] = math.nan
    assert lower_bounds(points, resampled, 60).isnan().all()


@pytest.mark.parametrize(("n_chains", "n_positive"), [(20, 20), (60, 12)])
def test_false_alarms_are_rare_with_few_chains_too(n_chains: int, n_positive: int) -> None:
    """200 families whose probes and control are noise that a chain's tokens share: 2.5% are promised."""
    columns = [Column("back", "token", lag) for lag in LAGS]
    chain = torch.arange(n_chains).repeat_interleave(20)
    targets = (chain < n_positive) & (torch.arange(len(chain)) % 20 >= 15)
    alarms = 0
    for seed in range(200):
        parts = [
            part("newton", layers, columns, targets, chain, torch.zeros(len(layers), 2), 1000 * seed + number)
            for number, layers in enumerate(([3, 5], ["embed"]))
        ]
        rows = [each.row for each in judge(parts, n_chains, 200, seed)]
        alarms += any(row["lift_low_corrected"] > 0 for row in rows)
    assert alarms <= 14  # 5 expected; 14 or more with a chance below 0.001


def test_nothing_is_claimed_from_a_few_chains(parts: list[ScoredProbes]) -> None:
    """A probe that is right in all of three chains with a positive: no corrected bound."""
    few = [each.at(each.scored.chain < 3) for each in parts]
    judged = judge(few, 3, 100, 7)
    assert all(math.isnan(each.row["lift_low_corrected"]) for each in judged)
    one = judge([each.at(each.scored.chain < 1) for each in parts], 1, 100, 7)
    assert all(math.isnan(each.row["auroc_low"]) and not math.isnan(each.row["auroc"]) for each in one)
    assert all(math.isnan(row["low"]) for row in differences(one))


def test_a_split_without_a_valid_token_is_nan(parts: list[ScoredProbes]) -> None:
    nothing = judge([each.at(each.scored.chain < 0) for each in parts], N_CHAINS, 20, 7)
    assert all(math.isnan(each.row["auroc"]) and each.row["n_tokens"] == 0 for each in nothing)
    assert "no verdict" in verdicts(nothing, 1e-3)[0]


def test_intervals_cover_the_true_auroc() -> None:
    """300 samples of 40 chains whose tokens share rates and noise; the truth is that of a sample of 20,000 chains.

    Negative control: intervals that resample tokens, as if they were independent, miss it far more often.
    """

    def draw(random: np.random.Generator, n: int) -> tuple[Tensor, Tensor, Tensor]:
        targets = random.random((n, 30)) < random.beta(1.5, 4, (n, 1))
        scores = targets + random.standard_normal((n, 30)) + random.standard_normal((n, 1))
        return (
            torch.from_numpy(scores.flatten())[:, None].float(),
            torch.from_numpy(targets.flatten()),
            torch.arange(n).repeat_interleave(30),
        )

    random = np.random.default_rng(0)
    scores, targets, _ = draw(random, 20_000)
    truth = roc_auc_score(targets.numpy(), scores[:, 0].numpy())
    by_chain = by_token = 0
    for number in range(300):
        scores, targets, chain = draw(random, 40)
        low, high = percentiles(chain_bootstrap(scores, targets, chain, draw_chains(40, 200, number))[0])[0].tolist()
        by_chain += low <= truth <= high
        if number < 40:
            tokens = torch.arange(len(targets))
            areas, _ = chain_bootstrap(scores, targets, tokens, draw_chains(len(targets), 100, number))
            low, high = percentiles(areas)[0].tolist()
            by_token += low <= truth <= high
    assert 0.90 <= by_chain / 300 <= 0.99
    assert by_token / 40 < 0.85


# --- where it comes from, and what a probability means ---


def test_a_category_is_judged_by_its_own_tokens(parts: list[ScoredProbes]) -> None:
    kinds = ["a" if i % 3 else "b" for i in range(N_CHAINS)]
    rows = by_category(parts, kinds, 50, 7)
    [row] = [r for r in rows if (r["category"], r["layer"], r["lag"], r["control"]) == ("b", 5, 0, "")]
    scores, targets, chain = scored(parts, 0, 1, 0)
    own = np.array([kinds[c] == "b" for c in chain])
    assert row["auroc"] == pytest.approx(roc_auc_score(targets[own], scores[own]))
    assert row["n_tokens"] == own.sum() and row["n_chains"] == 8
    assert row["auroc_low"] < row["auroc"] < row["auroc_high"] and not math.isnan(row["lift"])
    assert row["auroc"] != pytest.approx(roc_auc_score(targets, scores))  # negative control
    assert by_category(parts, ["a"] * N_CHAINS, 50, 7) == []
    assert by_category(parts, [str(i) for i in range(N_CHAINS)], 50, 7) == [], "ids that are no categories"


def test_brier_and_reliability_are_those_of_the_probabilities(parts: list[ScoredProbes], judged: list[Judged]) -> None:
    scores, targets, _ = scored(parts, 0, 1, 0)
    said = 1 / (1 + np.exp(-scores.astype(np.float64)))
    assert find(judged, 5, 0)["brier"] == pytest.approx(brier_score_loss(targets, said))
    bins = [r for r in reliability(parts) if (r["layer"], r["lag"]) == (5, 0)]
    assert len(bins) == BINS and sum(r["n_tokens"] for r in bins) == len(targets)
    chunks = np.array_split(np.argsort(-said, kind="stable"), BINS)
    np.testing.assert_allclose([r["share_positive"] for r in bins], [targets[c].mean() for c in chunks], atol=0.02)
    np.testing.assert_allclose([r["mean_probability"] for r in bins], [said[c].mean() for c in chunks], atol=1e-6)
    assert len(reliability(parts)) == 2 * 2 * BINS, "probes, and no controls"


def test_seeds_have_one_row_with_their_spread() -> None:
    targets, chain = source(1)
    columns = [Column("back", "token", 0), *(Column("back", "token", 0, "", seed) for seed in (1, 2))]
    three = part("adam", [3], columns, targets, chain, torch.ones(1, 3), 4)
    [only] = judge([three], N_CHAINS, 20, 0)
    areas = [roc_auc_score(*reversed(scored([three], 0, 0, k)[:2])) for k in range(3)]
    assert only.row["auroc"] == pytest.approx(areas[0])
    assert only.row["auroc_spread"] == pytest.approx(np.std(areas, ddof=1)) and np.std(areas) > 0
    assert math.isnan(
        judge(
            [three.at(chain >= 0)._replace(columns=[c._replace(lag=k) for k, c in enumerate([columns[0]] * 3)])],
            N_CHAINS,
            0,
            0,
        )[0].row["auroc_spread"]
    )


def test_the_rows_of_categories_keep_the_order_of_their_columns(parts: list[ScoredProbes]) -> None:
    """Readers may count columns."""
    first, *_ = by_category(parts, ["a", "b"] * (N_CHAINS // 2), 10, 0)
    assert list(first)[:8] == ["category", "solver", "kind", "site", "layer", "label", "target", "lag"]
