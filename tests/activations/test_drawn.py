"""A bounded sample of tokens: unbiased, by each token's own chance, and the same however many ranks draw it."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from on_ranks import on_ranks

from streamprobe.activations.batch import TokenBatch
from streamprobe.activations.drawn import Counts, SampledTokens, sample_tokens
from streamprobe.activations.feed import Feed
from streamprobe.activations.store import Part
from streamprobe.probes.sites import layer_sites
from streamprobe.system.distributed import is_own

N, L, K, D, PARTS = 4000, 2, 3, 5, 8


def tokens(dtype: torch.dtype = torch.bfloat16) -> TokenBatch:
    """Tokens whose first activation is their number, of three columns with few, more and many positives."""
    random = torch.Generator().manual_seed(0)
    acts = torch.randn(N, L, D, generator=random).to(dtype)
    targets = torch.rand(N, K, generator=random) < torch.tensor([0.02, 0.2, 0.9])
    valid = torch.rand(N, K, generator=random) < 0.8
    number = torch.arange(N)
    return TokenBatch(
        acts,
        torch.empty(N, 0),
        targets & valid,
        valid,
        number // 50,
        number % 50,
        number % 4,
        torch.rand(N, generator=random),
    )


TOKENS = tokens()


def feed(folds: bool = False) -> Feed:
    columns = torch.arange(K).repeat(4 if folds else 1)
    of_fold = torch.arange(4).repeat_interleave(K) if folds else None
    return Feed("layers", layer_sites(range(L)), D, lambda batch: batch.acts, columns, folds=of_fold)


def parts() -> Iterator[Part]:
    """The parts of this rank, in chunks of unlike size."""
    for number, rows in enumerate(torch.arange(N).chunk(PARTS)):
        if is_own(number):
            yield Part(number, (TOKENS.rows(own) for own in rows.split(130 + number)))


def counts(asked: Feed) -> Counts:
    _, targets, valid, _ = asked.of(TOKENS)
    return Counts(valid.sum(0), (targets & valid).sum(0))


def drawn(per_class: int = 300, folds: bool = False, shift: float = 0.3) -> SampledTokens:
    asked = feed(folds)
    found = counts(asked)
    weight = (found.valid - found.positive) / found.positive
    return sample_tokens(parts(), asked, found.rates(per_class), positive_weight=weight, shift=shift)


@pytest.mark.parametrize("folds", [False, True])
def test_each_column_has_the_tokens_whose_chance_is_below_the_rate_of_their_class(folds: bool) -> None:
    sample, asked = drawn(folds=folds), feed(folds)
    _, targets, valid, extras = asked.of(TOKENS)
    chance, union = (extras.chance + 0.3).frac(), torch.zeros(N, dtype=torch.bool)
    wanted = []
    for k in range(valid.shape[1]):
        positive, negative = targets[:, k] & valid[:, k], ~targets[:, k] & valid[:, k]
        rates = [min(1.0, 300 / int(each.sum())) for each in (negative, positive)]
        ours = (negative & (chance < rates[0])) | (positive & (chance < rates[1]))
        wanted.append(ours)
        union |= ours
        p = float(negative.sum() / positive.sum())
        weight = torch.where(targets[:, k], p / rates[1], 1 / rates[0])[ours]
        torch.testing.assert_close(sample.columns[k].weight, weight)
        assert torch.equal(sample.columns[k].targets, targets[ours, k])
    assert torch.equal(sample.acts, TOKENS.acts[union]) and sample.acts.dtype == torch.bfloat16
    for column, ours in zip(sample.columns, wanted, strict=True):
        assert torch.equal(sample.acts[column.rows], TOKENS.acts[ours])
    assert sample.most == max(int(ours.sum()) for ours in wanted)


def test_the_sum_of_weights_stands_for_all_tokens_and_fails_without_them() -> None:
    sample, found = drawn(per_class=200), counts(feed())
    negatives = (found.valid - found.positive).double()
    for column, n in zip(sample.columns, negatives.tolist(), strict=True):
        assert abs(float(column.weight.sum()) / (2 * n) - 1) < 0.1
        assert abs(len(column.rows) / (2 * n) - 1) > 0.1


def test_columns_share_most_of_what_is_drawn() -> None:
    sample = drawn()
    assert len(sample.acts) < 0.8 * sum(len(column.rows) for column in sample.columns)


def test_a_class_with_few_tokens_is_taken_whole() -> None:
    sample, asked = drawn(per_class=10**6), feed()
    _, targets, valid, _ = asked.of(TOKENS)
    assert [len(column.rows) for column in sample.columns] == valid.sum(0).tolist()
    assert all((column.weight[~column.targets] == 1).all() for column in sample.columns)


@pytest.mark.parametrize("size", [2, 3, 10])
def test_every_number_of_ranks_draws_the_same(size: int, tmp_path: Path) -> None:
    alone = drawn(folds=True)
    for sample in on_ranks(lambda: drawn(folds=True), size, tmp_path / "ranks"):
        assert torch.equal(sample.acts, alone.acts)
        for ours, theirs in zip(sample.columns, alone.columns, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_ranks_draw_apart_without_a_gather(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def own(given: tuple, counts: object) -> list:
        return list(given)

    monkeypatch.setattr("streamprobe.activations.drawn.gather", own)
    one, other = on_ranks(drawn, 2, tmp_path / "ranks")
    assert len(one.acts) + len(other.acts) == len(drawn().acts) and 0 < len(one.acts) < len(drawn().acts)


def test_another_shift_draws_other_tokens() -> None:
    every: list[Callable[[], SampledTokens]] = [drawn, drawn, lambda: drawn(shift=0.8)]
    one, again, other = (each().columns[1].rows for each in every)
    assert torch.equal(one, again) and not torch.equal(one, other)
