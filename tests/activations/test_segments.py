"""Segments of chains: what they hold, which are drawn, and that the number of processes makes no difference."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from on_ranks import on_ranks

from streamprobe.activations import segments as module
from streamprobe.activations.batch import TokenBatch
from streamprobe.activations.feed import Feed
from streamprobe.activations.segments import HALO, OWN, Segments, sample_segments
from streamprobe.activations.store import Part
from streamprobe.probes.sites import layer_sites
from streamprobe.system.distributed import is_own

L, K, D, N_PARTS = 2, 3, 4, 5
CPU = torch.device("cpu")
LENGTHS = [256, 1, 700, 255, 257, 320, 64, 1500, 30, 512, 513, 90, 260, 40]
P = torch.tensor([3.0, 1.0, 20.0])


def tokens(lengths: list[int] = LENGTHS, seed: int = 0) -> TokenBatch:
    """Chains one behind the other, with gaps between the places of their tokens; the activations tell which is which."""
    random = torch.Generator().manual_seed(seed)
    n = sum(lengths)
    chain = torch.repeat_interleave(torch.arange(len(lengths)) + 10, torch.tensor(lengths))
    token = torch.cat([5 + torch.cumsum(torch.rand(m, generator=random) < 0.9, 0) + torch.arange(m) for m in lengths])
    acts = torch.stack([chain, token], 1).repeat(1, D // 2)[:, None] * torch.arange(1, L + 1)[:, None]
    valid = (torch.rand(n, K, generator=random) < 0.7) & (chain % 5 != 0)[:, None]
    targets = valid & (torch.rand(n, K, generator=random) < torch.tensor([0.1, 0.001, 0.0005]))
    chance = torch.rand(n, generator=random)
    return TokenBatch(acts.double(), torch.zeros(n, 0), targets, valid, chain, token, chain % 2, chance)


def feed(folds: int = 1) -> Feed:
    asked = torch.arange(K).repeat(folds)
    of_folds = torch.arange(folds).repeat_interleave(K) if folds > 1 else None
    return Feed("layers", layer_sites(list(range(L))), D, lambda batch: batch.acts, asked, folds=of_folds)


def parts(all_tokens: TokenBatch, chunk: int = 171) -> Iterator[Part]:
    """This process's parts: chains dealt out in turn, each part's tokens in chunks of so many."""
    for number in range(N_PARTS):
        if is_own(number):
            own = all_tokens.rows((all_tokens.chain % N_PARTS == number).nonzero()[:, 0])
            rows = range(0, len(own.chain), chunk)
            yield Part(number, (own.rows(slice(start, start + chunk)) for start in rows))


def sample(all_tokens: TokenBatch | None = None, *, most: int = 100, folds: int = 1, chunk: int = 171) -> Segments:
    every = tokens() if all_tokens is None else all_tokens
    p = P.repeat(folds)
    return sample_segments(parts(every, chunk), feed(folds), p, dtype=torch.float64, device=CPU, most=most)


def test_every_asked_token_is_own_to_one_segment() -> None:
    found, every = sample(), tokens()
    own = found.acts[found.own][:, 0, :2].tolist()
    asked = every.valid.any(1)
    wanted = torch.stack([every.chain, every.token], 1)[asked].double().tolist()
    assert len({tuple(place) for place in own}) == len(own)
    assert {tuple(place) for place in wanted} <= {tuple(place) for place in own}
    assert found.own.sum(1).max() == OWN and found.halo.sum(1).max() == HALO
    assert int((found.weight > 0).sum()) == int(every.valid.sum())


def test_weights_and_targets_are_those_of_the_tokens() -> None:
    found, every = sample(folds=2), tokens()
    place = {pair: i for i, pair in enumerate(zip(every.chain.tolist(), every.token.tolist(), strict=True))}
    acts = found.acts[found.own][:, 0, :2].long().tolist()
    rows = torch.tensor([place[chain, token] for chain, token in acts])
    _, targets, valid, _ = feed(2).of(every)
    expected = valid * torch.where(targets & valid, P.repeat(2), 1.0)
    assert found.weight[found.own].equal(expected[rows])
    assert found.targets[found.own].equal((targets & valid)[rows])
    assert not found.weight[~found.own].any() and not found.targets[~found.own].any()
    assert (valid != every.valid.repeat(1, 2)).any()  # a column is not asked about its own fold


def test_a_halo_is_the_tokens_before() -> None:
    found, every = sample(), tokens()
    for s in range(len(found.chain)):
        chain = every.token[every.chain == found.chain[s]]
        first = int((chain == found.token[s]).nonzero())
        n_halo, n_own = int(found.halo[s].sum()), int(found.own[s].sum())
        assert first % OWN == 0 and n_halo == min(first, HALO) and n_own == min(OWN, len(chain) - first)
        assert found.halo[s, :n_halo].all() and found.own[s, n_halo : n_halo + n_own].all()
        assert found.acts[s, : n_halo + n_own, 0, 1].equal(chain[first - n_halo : first + n_own].double())
        assert not found.acts[s, n_halo + n_own :].any()


@pytest.mark.parametrize("chunk", [1, 7, 256, 100_000])
def test_chunks_of_any_size_give_the_same_segments(chunk: int) -> None:
    few = tokens(LENGTHS[1:6])
    assert all(a.equal(b) for a, b in zip(sample(few, chunk=chunk), sample(few), strict=True))


def test_segments_fail_without_a_chains_tokens_in_one_piece() -> None:
    every = tokens([5, 5, 5])
    mixed = every.rows(torch.tensor([0, 5, 1]))
    with pytest.raises(AssertionError, match="one behind the other"):
        sample_segments([Part(0, iter([mixed]))], feed(), P, dtype=torch.float64, device=CPU)


def many() -> TokenBatch:
    """Short chains, of which few have a positive."""
    every = tokens(np.random.default_rng(1).integers(3, 40, 900).tolist(), seed=1)
    return every._replace(targets=every.targets & (every.chain % 7 == 0)[:, None])


def test_a_bounded_sample_has_more_of_what_is_rare_and_stands_for_all() -> None:
    every, most = many(), 160
    whole, found = sample(every, most=10_000), sample(every, most=most)
    assert len(found.chain) == most < len(whole.chain) / 4
    positive = [each.targets.any(2).any(1) for each in (whole, found)]
    n_rare = int(positive[0].sum())
    assert most / 3 < n_rare and int(positive[1].sum()) == min(most // 2, n_rare)
    rates = torch.where(positive[1], positive[1].sum() / n_rare, (most - positive[1].sum()) / (~positive[0]).sum())
    where = {chain: s for s, chain in enumerate(whole.chain.tolist())}
    same = [where[chain] for chain in found.chain.tolist()]
    torch.testing.assert_close(found.weight, whole.weight[same] / rates[:, None, None])
    estimated, exact = found.weight.sum(), whole.weight.sum()
    assert abs(estimated / exact - 1) < 0.15
    assert found.weight.sum() * len(same) / len(where) < 0.9 * exact  # negative control: as if all rates were one


def test_those_of_smallest_chance_are_drawn() -> None:
    every = many()
    whole, found = sample(every, most=10_000), sample(every, most=100)
    begin = torch.cat([torch.tensor([True]), every.chain.diff() != 0])
    chance = dict(zip(every.chain[begin].tolist(), every.chance[begin].tolist(), strict=True))
    for kind in (True, False):
        own = [
            [c for c, t in zip(s.chain.tolist(), s.targets, strict=True) if bool(t.any()) == kind]
            for s in (whole, found)
        ]
        assert set(own[1]) == set(sorted(own[0], key=chance.__getitem__)[: len(own[1])]) and len(own[1]) > 20


@pytest.mark.parametrize("size", [2, 3, 7])
@pytest.mark.parametrize("most", [120, 10_000])
def test_every_number_of_processes_draws_the_same(size: int, most: int, tmp_path: Path) -> None:
    every = many()
    alone = sample(every, most=most)
    for found in on_ranks(lambda: sample(every, most=most), size, tmp_path / "ranks"):
        assert all(a.equal(b) for a, b in zip(found, alone, strict=True))


def test_processes_draw_apart_without_a_gather(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    every = many()
    monkeypatch.setattr(module, "gather", lambda given, counts: list(given))
    one, other = on_ranks(lambda: sample(every, most=10_000), 2, tmp_path / "ranks")
    assert 0 < len(one.chain) < len(other.chain) + len(one.chain) == len(sample(every, most=10_000).chain)
