"""Bounded room for activations: every token once a pass, well mixed, within the memory that was planned."""

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor
from trips import chunks, trip_of

from streamprobe.activations import store as module
from streamprobe.activations.batch import TokenBatch
from streamprobe.activations.shards import Trip
from streamprobe.activations.store import ActivationMemory, Sizes

CPU = torch.device("cpu")


def joined(batches: list[TokenBatch]) -> TokenBatch:
    """All batches as one."""
    return TokenBatch(*(torch.cat(column) for column in zip(*batches, strict=True)))


# --- the activation memory ---

SIZES = Sizes(2, 3, 2, 1, torch.float32)
N_CHAINS = 40


def source(seed: int = 0) -> list[TokenBatch]:
    """One trip over 40 chains of 5 to 30 tokens, in batches of a few chains; every token has a number of its own."""
    rng = np.random.default_rng(1)
    lengths = rng.integers(5, 31, N_CHAINS)
    firsts = np.cumsum(lengths) - lengths
    batches = []
    for part in np.array_split(np.random.default_rng(seed).permutation(N_CHAINS), 11):
        number = torch.from_numpy(np.concatenate([np.arange(firsts[i], firsts[i] + lengths[i]) for i in part]))
        chain = torch.from_numpy(np.repeat(part, lengths[part]))
        batches.append(token_batch(number, chain))
    return batches


def whole() -> Trip:
    """The same as a trip."""
    return trip_of(source())


def token_batch(number: Tensor, chain: Tensor) -> TokenBatch:
    """Tokens whose activations, targets and validity all tell their number."""
    acts = number[:, None, None] + torch.tensor([[0, 0.25, 0.5], [0.125, 0.375, 0.625]])
    bits = torch.stack([number % 2 == 0, number % 3 == 0], dim=1)
    return TokenBatch(acts, -number[:, None].float(), bits, ~bits, chain, number + 1, chain % 5, number.float() / 1e4)


CHAIN_OF = {int(n): int(c) for b in source() for n, c in zip(b.acts[:, 0, 0], b.chain, strict=True)}
N_TOKENS = len(CHAIN_OF)


def numbers(batches: list[TokenBatch]) -> list[int]:
    """The tokens' numbers, in order; asserts that each one still has its own labels and chain."""
    got = joined(batches)
    number = got.acts[:, 0, 0].long()
    whole = token_batch(number, torch.tensor([CHAIN_OF[n] for n in number.tolist()]))
    assert all(torch.equal(a, b) for a, b in zip(got, whole, strict=True))
    return number.tolist()


def memory(keep: bool, rows: int | None = None) -> ActivationMemory:
    return ActivationMemory(rows or (N_TOKENS if keep else 100), keep, SIZES, CPU)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Less is mixed and handed on at once, so that few tokens do."""
    monkeypatch.setattr(module, "MIXING_TOKENS", 128)
    monkeypatch.setattr(module, "CHUNK_TOKENS", 32)


@pytest.mark.parametrize("multiple", [1, 7, 16, 50])
@pytest.mark.parametrize(("keep", "rows"), [(True, None), (False, 100), (False, 128), (False, 300), (False, 5000)])
@pytest.mark.usefixtures("small")
def test_each_pass_yields_each_token_once(keep, rows, multiple):
    store, calls, passes = memory(keep, rows), [], []
    for seed in range(4):

        def trip(seed: int = seed) -> Trip:
            calls.append(seed)
            return trip_of(source(seed))

        found = chunks(store.shuffled(trip, multiple, seed))
        sizes = [len(chunk.chain) for chunk in found]
        assert all(size % multiple == 0 for size in sizes[:-1])
        assert max(sizes) <= max(32, multiple)
        passes.append(numbers(found))
        assert sorted(passes[-1]) == list(range(N_TOKENS))
    assert calls == ([0] if keep else [0, 1, 2, 3])
    assert len({tuple(p) for p in passes}) == 4


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.usefixtures("small")
def test_a_pass_depends_on_its_seed_only(keep):
    def order(seed: int) -> list[int]:
        store = memory(keep)
        chunks(store.shuffled(whole, 8, 99))
        return numbers(chunks(store.shuffled(whole, 8, seed)))

    assert order(3) == order(3) != order(4)


@pytest.mark.parametrize("rows", [64, 100, 128, 500])
@pytest.mark.usefixtures("small")
def test_the_pool_never_holds_more_than_its_rows(rows):
    """What was read and not yet handed out is in the pool, bar the batch at hand; nothing is ever larger than it."""
    store = memory(False, rows)
    read = handed = most = 0

    def trip() -> Trip:
        batches = source()

        def reading(wanted: Sequence[Sequence[int]]) -> Iterator[TokenBatch]:
            nonlocal read
            for [i] in wanted:
                read += len(batches[i].chain)
                yield batches[i]

        return Trip([[[i] for i in range(len(batches))]], reading)

    largest = 2 * max(len(batch.chain) for batch in source())  # the batch at hand, and the next one
    for part in store.shuffled(trip, 8, 0):
        for chunk in part.chunks:
            most = max(most, read - handed)
            handed += len(chunk.chain)
            assert {len(x) for x in store.pool} == {rows}
    assert handed == N_TOKENS
    assert most <= min(rows, module.MIXING_TOKENS) + largest
    assert most > min(rows, module.MIXING_TOKENS) // 2  # and it is made use of


@pytest.mark.usefixtures("small")
def test_no_chunk_is_empty():
    """Two pools full of tokens, each handed out at once, leave nothing for the end of the pass."""
    batch = token_batch(torch.arange(64), torch.zeros(64, dtype=torch.int64))
    store = ActivationMemory(32, False, SIZES, CPU)
    assert [len(c.chain) for c in chunks(store.shuffled(lambda: trip_of([batch]), 32, 0))] == [32, 32]
    assert chunks(store.shuffled(lambda: trip_of([]), 32, 0)) == []


@pytest.mark.usefixtures("small")
def test_chunks_are_copies():
    """What was handed out is not overwritten by later tokens of the pool."""
    store, kept, now = memory(False), [], []
    for part in store.shuffled(whole, 8, 0):
        for chunk in part.chunks:
            kept.append(chunk)
            now.append(TokenBatch(*(x.clone() for x in chunk)))
    assert numbers(kept) == numbers(now)


def runs(order: list[int]) -> float:
    """The share of tokens that follow one of the same chain."""
    chain = [CHAIN_OF[n] for n in order]
    return sum(a == b for a, b in zip(chain, chain[1:], strict=False)) / (len(chain) - 1)


@pytest.mark.usefixtures("small")
def test_tokens_of_many_chains_are_mixed():
    assert runs(numbers(source())) > 0.9  # negative control
    pool, kept = memory(False), memory(True)
    assert runs(numbers(chunks(pool.shuffled(whole, 8, 0)))) < 0.25  # 100 tokens are about 6 chains
    found = chunks(kept.shuffled(whole, 8, 1))
    order = numbers(found)
    assert runs(order) < 0.08  # of 40 chains
    shares = np.array(list(Counter(CHAIN_OF.values()).values())) / N_TOKENS
    independent = sum(1 - (1 - shares) ** 32)  # expected number of chains among 32 independent tokens
    assert np.mean([len(set(c.chain.tolist())) for c in found[:-1]]) == pytest.approx(independent, rel=0.1)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.usefixtures("small")
def test_filled_memory_goes_on_like_one_that_trained_from_the_start(seed):
    """What a resumed run relies on: after `fill`, every pass is bit-identical to those of a run that never stopped."""
    straight, resumed, other = memory(True), memory(True), memory(True)
    chunks(straight.shuffled(lambda: trip_of(source(1)), 8, seed + 1))
    resumed.fill(lambda: trip_of(source(1)))
    other.fill(lambda: trip_of(source(2)))
    assert straight.used == resumed.used == N_TOKENS
    differs = False
    for n in (2, 3):
        passes = [chunks(store.shuffled(no_trip, 8, seed + n)) for store in (straight, resumed, other)]
        for a, b, c in zip(*passes, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
            differs |= not torch.equal(a.acts, c.acts)
    assert differs  # negative control: a split that was read in another order


def no_trip() -> Trip:
    raise AssertionError("the model ran again")


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.usefixtures("small")
def test_in_order(keep):
    store, calls = memory(keep), []

    def trip() -> Trip:
        calls.append(1)
        return whole()

    for _ in range(3):
        assert numbers(chunks(store.in_order(trip))) == numbers(source())
        assert numbers(list(store.all_chunks(trip))) == numbers(source())
    assert len(calls) == (1 if keep else 6)


@pytest.mark.usefixtures("small")
def test_a_pass_that_was_broken_off_does_not_count_as_filled():
    store, batches = memory(True), source()

    def broken(wanted: Sequence[Sequence[int]]) -> Iterator[TokenBatch]:
        yield batches[0]
        raise OSError("the model is gone")

    with pytest.raises(OSError, match="gone"):
        store.fill(lambda: Trip([[[0], [1]]], broken))
    assert not store.filled
    assert sorted(numbers(chunks(store.shuffled(whole, 8, 0)))) == list(range(N_TOKENS))
    assert store.filled


@pytest.mark.usefixtures("small")
def test_more_tokens_than_were_counted():
    with pytest.raises(AssertionError, match="more tokens than were counted"):
        chunks(memory(True, N_TOKENS - 1).shuffled(whole, 8, 0))


def test_stored_in_the_dtype_asked_for():
    store = ActivationMemory(N_TOKENS, True, SIZES._replace(dtype=torch.float64), CPU)
    assert {c.acts.dtype for c in chunks(store.shuffled(whole, 8, 0))} == {torch.float64}


@pytest.mark.usefixtures("small")
def test_chunks_of_a_multiple_that_is_larger_than_the_mixing_window():
    sizes = [len(c.chain) for c in chunks(memory(True, None).shuffled(whole, 150, 0))]
    assert sum(sizes) == N_TOKENS and all(size % 150 == 0 for size in sizes[:-1])
