"""The grid on which scores are ranked, and that every score is on it."""

import numpy as np
import pytest
import torch

from streamprobe.activations.batch import TokenBatch
from streamprobe.activations.feed import Feed
from streamprobe.errors import InputError
from streamprobe.evaluation.metrics import auroc, rank
from streamprobe.evaluation.scores import evaluate, to_grid
from streamprobe.lags import Column
from streamprobe.probes.linear import ProbeBank
from streamprobe.probes.sites import layer_sites


def test_a_score_moves_by_half_a_step_at_most() -> None:
    scores = 8 * torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    moved = to_grid(scores)
    assert moved.dtype == torch.float32
    ulp = np.spacing(scores.abs().max().numpy())
    assert (moved.double() - scores.double()).abs().max() <= 5e-6 + ulp
    torch.testing.assert_close(to_grid(moved), moved, atol=0, rtol=0)  # which stays where it is


def test_equal_steps_are_equal_floats() -> None:
    """Up to 80 of a logit, beyond which float32 has wider steps itself."""
    steps = torch.tensor([0, 1, -1, 7, 123_456, -999_999, 7_999_999], dtype=torch.float64)
    for shift in (-4e-6, 0.0, 4e-6):
        assert torch.equal(to_grid(steps * 1e-5 + shift), (steps / 1e5).float())
    assert len(to_grid(torch.arange(7_999_000, 8_000_000).double() * 1e-5).unique()) == 1000


def test_there_is_no_negative_zero_and_order_is_kept() -> None:
    assert not torch.signbit(to_grid(torch.tensor([-1e-6, 0.0, -0.0, 1e-6]))).any()
    rising = torch.linspace(-300, 300, 100_001)
    assert (to_grid(rising).diff() >= 0).all()
    assert to_grid(torch.tensor([torch.inf, -torch.inf, torch.nan, 1e38])).isfinite().tolist() == [False] * 3 + [True]


def test_scores_that_differ_by_rounding_tie() -> None:
    targets = torch.arange(400) % 3 == 0
    scores = torch.full((400, 1), 0.73) + 1e-7 * torch.randn(400, 1, generator=torch.Generator().manual_seed(1))
    assert float(auroc(rank(to_grid(scores), targets))) == 0.5
    assert float(auroc(rank(scores, targets))) != 0.5  # negative control: as they are


def test_tokens_that_no_column_asks_are_read_and_not_returned() -> None:
    """A probe that looks back hears of them: without them its scores are others."""
    from kind_banks import make_bank

    random = torch.Generator().manual_seed(3)
    columns = [Column("a", "token", 0), Column("a", "token", 4)]
    linear = ProbeBank(layer_sites([0]), columns, torch.randn(1, 2, 5, generator=random), torch.zeros(1, 2))
    feed = Feed("layers", linear.sites, 5, lambda batch: batch.acts, torch.arange(2))
    valid = torch.tensor([[1, 0], [0, 0], [0, 1], [0, 0], [1, 1], [0, 1]]).bool()
    acts, side, place = torch.randn(6, 1, 5, generator=random), torch.zeros(6, 0), torch.arange(6)
    batch = TokenBatch(acts, side, valid, valid, place // 3, place, place * 0, chance=torch.zeros(6))
    some = valid.any(1).nonzero()[:, 0]
    for bank, same in ((linear, True), (make_bank(linear, "fading"), False)):
        every, few = (evaluate([(bank, feed)], [each])[0] for each in (batch, batch.rows(some)))
        assert every.token.tolist() == few.token.tolist() == some.tolist() and torch.equal(every.valid, few.valid)
        assert torch.equal(every.scores, few.scores) == same
        whole = to_grid(torch.cat([bank.scores(acts[:3]), bank.scores(acts[3:])])[some])
        torch.testing.assert_close(every.scores, whole, atol=2e-5, rtol=0)


def test_all_scores_are_on_the_grid() -> None:
    random = torch.Generator().manual_seed(2)
    bank = ProbeBank(
        layer_sites([0, 1]),
        [Column("a", "token", 0)],
        torch.randn(2, 1, 5, generator=random),
        torch.randn(2, 1, generator=random),
    )
    asked = torch.ones(30, 1, dtype=torch.bool)
    batch = TokenBatch(
        torch.randn(30, 2, 5, generator=random),
        torch.zeros(30, 0),
        asked,
        asked,
        torch.zeros(30, dtype=torch.int64),
        torch.arange(30),
        torch.zeros(30, dtype=torch.int64),
        torch.zeros(30),
    )
    feed = Feed("layers", bank.sites, 5, lambda own: own.acts, torch.tensor([0]))
    [own] = evaluate([(bank, feed)], [batch])
    assert torch.equal(own.scores, to_grid(bank.scores(batch.acts))) and own.scores[:, 0, 0].is_contiguous()
    assert not torch.equal(own.scores, bank.scores(batch.acts))  # negative control
    bank.bias[0, 0] = torch.inf
    with pytest.raises(InputError, match="infinite"):
        evaluate([(bank, feed)], [batch])
