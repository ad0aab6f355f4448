"""What a layer adds, against plain loops and scikit-learn; and its intervals against the truth of made-up chains."""

import math

import numpy as np
import pytest
import torch
from nested_samples import as_group, draw, group, rows_of
from sklearn.metrics import log_loss, roc_auc_score
from torch import Tensor

from streamprobe.activations.batch import TokenBatch
from streamprobe.activations.feed import Feed
from streamprobe.evaluation import bootstrap
from streamprobe.evaluation.bootstrap import draw_chains, percentiles
from streamprobe.evaluation.gains import Gains, gains_of_column
from streamprobe.evaluation.results import by_category, differences, judge, reliability, score
from streamprobe.evaluation.rows import COMPARED, GAINS, Row
from streamprobe.evaluation.scored_probes import ScoredProbes
from streamprobe.evaluation.significance import lower_bounds
from streamprobe.evaluation.texts import labels_of_texts, text_rows
from streamprobe.lags import Column
from streamprobe.probes.kept import NESTED, FinalProbes
from streamprobe.probes.linear import ProbeBank
from streamprobe.probes.sites import control_sites, layer_sites

N_CHAINS = 16
COLUMNS = [Column("back", "onset", 4), Column("back", "onset", 8), Column("back", "token", 4)]


@pytest.fixture(scope="module")
def nested() -> ScoredProbes:
    """Two layers and the control at three columns, chains of unlike length, many ties, and tokens that are not valid."""
    random = torch.Generator().manual_seed(0)
    chain = (N_CHAINS * torch.rand(700, generator=random)).long().sort().values
    rate = torch.randn(N_CHAINS, generator=random)[chain]
    targets = torch.rand(700, 3, generator=random) < (rate[:, None] - 1).sigmoid()
    targets[chain == 2] = False  # a chain without a positive
    strength = torch.tensor([0.0, 0.7, 2.0])[:, None]
    scores = rate[:, None, None] - 1 + strength * targets[:, None] + 0.7 * torch.randn(700, 3, 3, generator=random)
    valid = torch.rand(700, 3, generator=random) < 0.9
    return group((4 * scores).round() / 4, targets, chain, columns=COLUMNS, layers=[3, 5], valid=valid)


def tokens(nested: ScoredProbes, i: int, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores, targets and chains of the tokens at which a probe is asked."""
    scores, targets, valid, chain, _ = nested.scored
    v = valid[:, k]
    return scores[v, i, k].double().numpy(), targets[v, k].numpy(), chain[v].numpy()


def within_by_loop(scores: np.ndarray, targets: np.ndarray, chain: np.ndarray) -> float:
    """AUROC within chains, pair by pair."""
    ordered = pairs = 0.0
    for own in np.unique(chain):
        for p in scores[(chain == own) & targets]:
            for q in scores[(chain == own) & ~targets]:
                pairs += 1
                ordered += 1.0 if p > q else 0.5 if p == q else 0.0
    return ordered / pairs


def bits(scores: np.ndarray, targets: np.ndarray) -> float:
    return float(log_loss(targets, 1 / (1 + np.exp(-scores)), labels=[False, True])) / math.log(2)


def by_loop(nested: ScoredProbes, i: int, k: int, weights: np.ndarray) -> np.ndarray:
    """The three gains of site i at column k when each chain is repeated as often as `weights` [C] says."""
    found = []
    for site in (0, i):
        scores, targets, chain = tokens(nested, site, k)
        index = np.concatenate([np.flatnonzero(chain == c) for c, n in enumerate(weights) for _ in range(n)])
        copy = np.concatenate(
            [np.full((chain == c).sum(), 100 * c + r) for c, n in enumerate(weights) for r in range(n)]
        )
        y, s = targets[index], scores[index]
        found.append([-bits(s, y), roc_auc_score(y, s), within_by_loop(s, y, copy)])
    return np.subtract(found[1], found[0])


def test_gains_are_those_of_plain_loops(nested: ScoredProbes) -> None:
    for k in range(3):
        own = gains_of_column(nested, k, draw_chains(N_CHAINS, 2, 0))
        for i in (1, 2):
            np.testing.assert_allclose(own.points[:, i - 1], by_loop(nested, i, k, np.ones(N_CHAINS, int)), atol=1e-9)


def test_each_resample_is_the_gain_of_its_chains(nested: ScoredProbes) -> None:
    """So their intervals are those of a loop that repeats tokens."""
    weights = draw_chains(N_CHAINS, 12, 3)
    own = gains_of_column(nested, 1, weights)
    loop = np.array([by_loop(nested, 2, 1, row) for row in weights.numpy()])  # [R, M]
    np.testing.assert_allclose(own.resampled[..., 1], loop, atol=1e-9)
    ends = np.quantile(loop, [0.025, 0.975], axis=0).T
    np.testing.assert_allclose(percentiles(own.resampled)[:, 1], ends, atol=1e-9)
    others = gains_of_column(nested, 1, weights.roll(1, 1)).resampled  # negative control: other chains
    assert (others - own.resampled).abs().amax((0, 2)).min() > 1e-3


def shift_chains(nested: ScoredProbes) -> ScoredProbes:
    """With a constant added to all scores of a chain, another for each site: a multiple of 1/4, so that ties stay."""
    random = torch.Generator().manual_seed(1)
    shifts = torch.randint(-8, 9, (N_CHAINS, len(nested.sites), len(nested.columns)), generator=random) / 4
    scored = nested.scored
    return nested._replace(scored=scored._replace(scores=scored.scores + shifts[scored.chain]))


def test_what_is_constant_in_a_chain_changes_no_gain_within(nested: ScoredProbes) -> None:
    """Negative control: it changes the other two."""
    weights = draw_chains(N_CHAINS, 20, 0)
    before, after = (gains_of_column(each, 0, weights) for each in (nested, shift_chains(nested)))
    for a, b in ((before.points, after.points), (before.resampled[0], after.resampled[0])):
        torch.testing.assert_close(a[2], b[2], atol=1e-12, rtol=0)
        assert (a[:2] - b[:2]).abs().min() > 1e-4


def test_logits_far_out_are_no_trouble(nested: ScoredProbes) -> None:
    """A wrong logit of 5000 costs 5000 nats, not infinity."""
    scored = nested.scored
    far = nested._replace(scored=scored._replace(scores=1000 * scored.scores))
    own = gains_of_column(far, 0, draw_chains(N_CHAINS, 10, 0))
    (control, targets, _), (layer, *_) = tokens(far, 0, 0), tokens(far, 1, 0)
    losses = [np.logaddexp(0, np.where(targets, -x, x)).mean() / math.log(2) for x in (control, layer)]
    assert float(own.points[0, 0]) == pytest.approx(losses[0] - losses[1]) and own.resampled.isfinite().all()


def test_gains_do_not_depend_on_how_many_probes_are_ranked_at_once(
    nested: ScoredProbes, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = draw_chains(N_CHAINS, 20, 0)
    whole = gains_of_column(nested, 0, weights)
    monkeypatch.setattr(bootstrap, "CELLS", 1)
    for a, b in zip(whole, gains_of_column(nested, 0, weights), strict=True):
        torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), atol=1e-12, rtol=0)


# --- the rows ---


def rows(nested: ScoredProbes, resamples: int = 200, n_chains: int = N_CHAINS) -> list[Row]:
    return [each.row for each in judge([*rows_of(nested), nested], n_chains, resamples, 7)]


def test_nested_probes_fill_the_rows_of_their_layers_and_have_none(nested: ScoredProbes) -> None:
    found = rows(nested)
    assert len(found) == 3 * 3, "two layers and the control at three columns"
    weights = draw_chains(N_CHAINS, 200, 7)
    family = [gains_of_column(nested, k, weights) for k in (0, 1)]  # the column of target token is another family
    for m, name in enumerate(GAINS):
        points = torch.cat([each.points[m] for each in family])
        low = lower_bounds(points, torch.cat([each.resampled[:, m] for each in family], 1), N_CHAINS - 1)
        own = [r for lag in (4, 8) for r in found if (r["target"], r["lag"], r["control"]) == ("onset", lag, "")]
        assert [r[name] for r in own] == points.tolist()
        assert [r[f"{name}_low_corrected"] for r in own] == pytest.approx(low.tolist())
        assert all(r[f"{name}_low_corrected"] < r[f"{name}_low"] < r[name] < r[f"{name}_high"] for r in own)
    assert {r["penalty"] for r in found if not r["control"]} == {1.0}
    controls = [r for r in found if r["control"]]
    gains = [name for name in COMPARED if name.startswith("gain") or name in ("penalty", "nested_gradient_norm")]
    assert controls and all(math.isnan(r[name]) for r in controls for name in gains)


def test_every_other_table_is_as_without_the_nested_probes(nested: ScoredProbes) -> None:
    groups = rows_of(nested)
    alone, beside = (judge(each, N_CHAINS, 50, 7) for each in (groups, [nested, *groups]))
    apart = [[{n: v for n, v in each.row.items() if n not in COMPARED} for each in own] for own in (alone, beside)]
    assert str(apart[0]) == str(apart[1])  # in which nan is nan
    assert str(differences(alone)) == str(differences(beside))
    assert reliability(groups) == reliability([nested, *groups]) and nested.real() == []
    kinds = ["a", "b"] * (N_CHAINS // 2)
    assert len(by_category([nested, *groups], kinds, 20, 7)) == len(by_category(groups, kinds, 20, 7)) > 0


def test_gains_of_a_category_are_of_its_own_chains(nested: ScoredProbes) -> None:
    [row] = [
        r
        for r in by_category([*rows_of(nested), nested], ["a", "b"] * (N_CHAINS // 2), 20, 7)
        if (r["category"], r["layer"], r["target"], r["lag"]) == ("a", 5, "onset", 8)
    ]
    own = by_loop(nested, 2, 1, np.array([1, 0] * (N_CHAINS // 2)))
    assert [row[name] for name in GAINS] == pytest.approx(own.tolist())


def test_whole_texts_have_no_rows_of_nested_probes() -> None:
    random = torch.Generator().manual_seed(0)
    chain = torch.arange(12).repeat_interleave(10)
    targets = (chain < 5)[:, None]
    scores = torch.randn(120, 2, 1, generator=random)
    nested = group(scores, targets, chain, columns=[Column("lie", "token", 4)], layers=[3])
    groups = [nested, *rows_of(nested)]
    assert labels_of_texts(groups) == ["lie"]
    assert len(text_rows(groups, 12, 10, 0)) == 2 * 3, "a layer and a control, pooled in three ways"


def test_without_the_joint_control_there_are_no_nested_probes_either(nested: ScoredProbes) -> None:
    assert nested.without(["joint+chain"]) is None
    fewer = nested.without(["text"])
    assert fewer is not None and fewer.penalty is not None and fewer.penalty.shape == (3, 3)


def test_scoring_hands_on_what_final_probes_read_and_their_penalties() -> None:
    """Nested probes are known by the name of their feed."""
    sites, column = [*control_sites(["joint+chain"]), *layer_sites([3])], Column("back", "onset", 4)
    bank = ProbeBank(sites, [column], torch.ones(2, 1, 4), torch.zeros(2, 1), threshold=torch.zeros(2, 1))
    grid, asked = torch.zeros(2, 1), torch.ones(6, 1, dtype=torch.bool)
    final = FinalProbes("newton", NESTED, bank, torch.zeros(1), grid, grid, grid + 0.1)
    at = torch.zeros(6, dtype=torch.int64)
    batch = TokenBatch(torch.ones(6, 2, 4), torch.zeros(6, 0), asked, asked, at, at, at, at.float())
    feeds = [Feed(name, sites, 4, lambda own: own.acts, torch.tensor([0])) for name in (NESTED, "layers")]
    nested, other = score([final, final._replace(feed="layers", penalty=None)], feeds, [batch])
    assert nested.is_nested and torch.equal(nested.penalty, grid + 0.1) and final.shared == []
    assert not other.is_nested and other.penalty is None


# --- nothing to tell by ---


def test_a_probe_that_is_the_control_has_gains_of_exactly_0(nested: ScoredProbes) -> None:
    """It is one that was looked at, and does not disturb the others."""
    scored = nested.scored
    scores = scored.scores.clone()
    scores[:, 1] = scores[:, 0]
    penalty = torch.tensor([[1.0] * 3, [math.inf] * 3, [1.0] * 3])
    found = rows(nested._replace(scored=scored._replace(scores=scores), penalty=penalty))
    for row in found:
        if row["layer"] == 3:
            numbers = [row[f"{n}{end}"] for n in GAINS for end in ("", "_low", "_high", "_low_corrected")]
            assert numbers == [0.0] * 12 and row["penalty"] == math.inf
        if row["layer"] == 5:
            assert row["gain_bits_low_corrected"] < row["gain_bits_low"] < row["gain_bits"]


def test_few_chains_give_no_corrected_bound(nested: ScoredProbes) -> None:
    """Of 9 chains with a pair there is none within chains, though 12 hold a positive."""
    scored, chain = nested.scored, nested.scored.chain
    targets = torch.rand(len(chain), 3, generator=torch.Generator().manual_seed(3)) < 0.5
    targets[chain < 3] = True
    targets[chain > 11] = False
    few = nested._replace(scored=scored._replace(targets=targets & scored.valid))
    for row in rows(few):
        if not row["control"]:
            assert row["n_positive_chains"] == 12 and not math.isnan(row["gain_within_low"])
            bounds = [row[f"{name}_low_corrected"] for name in GAINS]
            assert [math.isnan(bound) for bound in bounds] == [False, False, True]


@pytest.mark.parametrize(("n", "known"), [(1, (True, True, True)), (0, (True, False, False))])
def test_a_class_that_is_hardly_there_is_nan(nested: ScoredProbes, n: int, known: tuple[bool, ...]) -> None:
    """With positives in one chain alone there is no interval; with none, only bits."""
    scored = nested.scored
    less = nested._replace(scored=scored._replace(targets=scored.targets & (scored.chain < n)[:, None]))
    for row in rows(less):
        if not row["control"]:
            assert tuple(not math.isnan(row[name]) for name in GAINS) == known
            assert all(math.isnan(row[f"{name}{end}"]) for name in GAINS for end in ("_low", "_low_corrected"))


def test_without_a_token_or_a_resample_there_is_nothing(nested: ScoredProbes) -> None:
    nothing = nested.at(nested.scored.chain < 0)
    assert all(math.isnan(row[name]) for row in rows(nothing) for name in GAINS)
    for row in rows(nested, resamples=0):
        if not row["control"]:
            assert not math.isnan(row["gain_bits"]) and math.isnan(row["gain_bits_low"])
            assert math.isnan(row["gain_within_low_corrected"])


# --- intervals hold the truth ---


def truth(n: int = 20_000) -> tuple[float, float]:
    """gain_bits and gain_within of `draw` in a huge sample."""
    logits, targets = draw(np.random.default_rng(0), n)
    losses = np.logaddexp(0, np.where(targets[..., None], -logits, logits)).mean((0, 1)) / math.log(2)
    ordered, pairs = np.zeros(2), 0.0
    for x, y in zip(np.split(logits, 20), np.split(targets, 20), strict=True):
        pair = y[:, :, None] & ~y[:, None, :]  # [n, T, T]
        pairs += pair.sum()
        ordered += ((x[:, :, None] > x[:, None, :]) & pair[..., None]).sum((0, 1, 2))
    within = ordered / pairs
    return float(losses[0] - losses[1]), float(within[1] - within[0])


def intervals(own: Gains) -> Tensor:
    """Those of bits and within chains of the only layer: [2, 2]."""
    return percentiles(own.resampled)[[0, 2], 0]


def test_intervals_cover_the_true_gains() -> None:
    """300 samples of 60 chains.  Negative control: tokens that are resampled as if they were independent."""
    random, true = np.random.default_rng(1), torch.tensor(truth(), dtype=torch.float64)
    by_chain, by_token = torch.zeros(2), 0
    for number in range(300):
        logits, targets = draw(random, 60)
        low, high = intervals(gains_of_column(as_group(logits, targets), 0, draw_chains(60, 200, number))).unbind(1)
        by_chain += (low <= true) & (true <= high)
        if number < 60:
            losses = np.logaddexp(0, np.where(targets[..., None], -logits, logits)) / math.log(2)
            gained = (losses[..., 0] - losses[..., 1]).flatten()
            reach = 1.96 * gained.std() / len(gained) ** 0.5
            by_token += abs(gained.mean() - float(true[0])) <= reach
    assert (by_chain / 300 >= 0.90).all() and (by_chain / 300 <= 0.99).all(), by_chain / 300
    assert by_token / 60 < 0.85, by_token / 60
