"""A reservoir: a fair sample of chains that does not depend on their order."""

import random

import pytest
import torch

from streamprobe.data.reservoir import OF_TOKENS, Reservoir, pack_chains, unpack_chains
from streamprobe.data.splits import number_of, split_of
from streamprobe.data.tokenize import Chain


def make_chain(row, n=None, sections=2):
    g = torch.Generator().manual_seed(row)
    n = n or int(torch.randint(5, 40, (), generator=g))
    return Chain(
        f"chain {row}",
        torch.randint(0, 99, (n,), generator=g),
        torch.randint(-1, 3, (n, 2), generator=g, dtype=torch.int8),
        torch.rand(n, generator=g) < 0.8,
        start=2,
        category="é",
        row=row,
        sections=torch.randint(-1, 3, (n, sections), generator=g, dtype=torch.int8),
        sentence_end=torch.rand(n, generator=g) < 0.1,
    )


def number(chain):
    return number_of(chain.id, seed=0, purpose="reservoir")


def same(a, b):
    about = all(getattr(a, name) == getattr(b, name) for name in ("id", "row", "start", "category", "marker", "fold"))
    return about and all(torch.equal(getattr(a, name), getattr(b, name)) for name in OF_TOKENS)


CHAINS = [make_chain(row) for row in range(200)]


def filled(chains, most=700):
    reservoir = Reservoir(most)
    for chain in chains:
        reservoir.add(chain, number(chain))
    return reservoir


def test_what_is_kept_is_the_chains_with_the_least_numbers_that_fit():
    order, tokens, expected = sorted(CHAINS, key=number), 0, []
    for chain in order:
        tokens += len(chain.ids)
        if tokens > 700:
            break
        expected.append(chain.row)
    assert [chain.row for chain in filled(CHAINS).chains] == sorted(expected)
    assert not filled(CHAINS).holds_all and filled(CHAINS, 10**6).holds_all


def test_what_is_kept_does_not_depend_on_the_order():
    first = [chain.row for chain in filled(CHAINS).chains]
    for seed in range(20):
        shuffled = random.Random(seed).sample(CHAINS, len(CHAINS))
        assert [chain.row for chain in filled(shuffled).chains] == first


def test_its_least_are_what_a_smaller_one_keeps():
    kept = filled(CHAINS)
    for most in (0, 100, 350, 700, 10_000):
        smaller = Reservoir(min(most, 700))
        for chain in CHAINS:
            smaller.add(chain, number(chain))
        assert [chain.row for chain in kept.least(most)] == [chain.row for chain in smaller.chains]


def test_that_order_matters_to_one_that_lets_the_last_ones_go():
    """A negative control: one that forgets which number it has let go takes up what does not belong there."""

    class Forgetful(Reservoir):
        def add(self, chain, number):
            self.least_gone = 2**63
            super().add(chain, number)

    kept = set()
    for seed in range(20):
        reservoir = Forgetful(700)
        for chain in random.Random(seed).sample(CHAINS, len(CHAINS)):
            reservoir.add(chain, number(chain))
        kept.add(tuple(chain.row for chain in reservoir.chains))
    assert len(kept) > 1


def test_every_chain_is_as_likely_to_be_kept():
    kept = torch.zeros(60)
    chains = [make_chain(row, n=10) for row in range(60)]
    for seed in range(400):
        reservoir = Reservoir(200)
        for chain in chains:
            reservoir.add(chain, number_of(chain.id, seed=seed, purpose="reservoir"))
        kept[[chain.row for chain in reservoir.chains]] += 1
    assert kept.sum() == 400 * 20 and kept.min() > 85 and kept.max() < 190  # 133 expected, deviation 9.4


@pytest.mark.parametrize("sections", [0, 2])
def test_chains_come_back_as_they_were(sections):
    chains = [make_chain(row, sections=sections) for row in range(9)]
    assert all(map(same, unpack_chains(pack_chains(chains)), chains))
    assert unpack_chains(pack_chains([])) == []


def test_a_reservoir_that_is_loaded_goes_on_as_if_nothing_had_been():
    half = filled(CHAINS[:100])
    other = Reservoir(1)
    other.load(half.state())
    for chain in CHAINS[100:]:
        half.add(chain, number(chain))
        other.add(chain, number(chain))
    assert all(map(same, half.chains, other.chains)) and len(half.chains) == len(other.chains)
    assert (half.tokens, half.least_gone) == (other.tokens, other.least_gone)


def test_splits_by_hash_have_their_shares_and_know_nothing_but_the_name():
    names = [f"problem {i}" for i in range(20_000)]
    splits = [split_of(name, test_share=0.2, validation_share=0.1, seed=1) for name in names]
    counts = {name: splits.count(name) / len(names) for name in ("test", "validation", "train")}
    assert counts == pytest.approx({"test": 0.2, "validation": 0.08, "train": 0.72}, abs=0.012)
    assert splits == [split_of(name, test_share=0.2, validation_share=0.1, seed=1) for name in names]
    other = [split_of(name, test_share=0.2, validation_share=0.1, seed=2) for name in names]
    both = sum(a == b == "test" for a, b in zip(splits, other, strict=True)) / len(names)
    assert both == pytest.approx(0.04, abs=0.008)
