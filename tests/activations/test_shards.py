"""Shards of chains: every chain in one, alike in size, with little padding, and each pass in an order of its own."""

import numpy as np
import pytest
import torch
from trips import trip_of

from streamprobe.activations.batch import TokenBatch
from streamprobe.activations.shards import Trip, deal
from streamprobe.activations.stream import make_batches
from streamprobe.system import distributed
from streamprobe.system.launch import World

LENGTHS = np.random.default_rng(0).integers(20, 700, 900).tolist()


def padded(lengths: list[int], batches: list[list[int]]) -> int:
    return sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)


@pytest.mark.parametrize("n_shards", [1, 5, 16, 64])
@pytest.mark.parametrize("lengths", [LENGTHS, LENGTHS[:3], [], [90_000, 5, 5], [7] * 40], ids=len)
def test_every_chain_is_in_one_batch_of_one_shard(lengths: list[int], n_shards: int) -> None:
    shards = deal(lengths, n_shards, 8192)
    assert len(shards) == n_shards
    batches = [batch for shard in shards for batch in shard]
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths))) and all(batches)
    assert all(len(batch) == 1 or padded(lengths, [batch]) <= 8192 for batch in batches)


def test_shards_are_alike_and_waste_little() -> None:
    shards = deal(LENGTHS, 16, 8192)
    sizes = [padded(LENGTHS, shard) for shard in shards]
    assert max(sizes) < 1.2 * min(sizes) and {len(shard) for shard in shards} == {3}
    full = [padded(LENGTHS, make_batches(LENGTHS, 8192)[s::16]) for s in range(16)]
    assert max(full) > 1.4 * min(full)  # negative control: batches that are as full as can be
    assert sum(sizes) < 1.05 * sum(LENGTHS)
    mixed = [list(range(s, 900, 16)) for s in range(16)]  # negative control: chains in turn, whatever their length
    batches = [own[i : i + 11] for own in mixed for i in range(0, len(own), 11)]
    assert padded(LENGTHS, batches) > 1.4 * sum(LENGTHS)


def test_few_chains_are_shared_by_as_many_shards_as_can_be() -> None:
    shards = deal([100] * 40, 16, 8192)
    assert sum(map(bool, shards)) == 14 and max(len(batch) for shard in shards for batch in shard) == 3
    assert len([batch for shard in deal([100] * 40, 1, 8192) for batch in shard]) == 1  # negative control


def batch_of(chain: int) -> TokenBatch:
    x = torch.full((2,), chain)
    return TokenBatch(x[:, None, None].float(), x[:, None].float(), x[:, None] > 0, x[:, None] > 0, x, x, x, x.float())


def read(batches: object) -> object:
    return (batch_of(chain) for batch in batches for chain in batch)  # type: ignore[attr-defined]


SHARDS = [[[0, 1], [2]], [[3], [4, 5], [6]], [], [[7]]]


def test_a_trip_is_a_trip_over_every_chain_whatever_its_order() -> None:
    plain, once, again, other = (Trip(SHARDS, read, seed) for seed in (None, 3, 3, 4))  # type: ignore[arg-type]
    orders = []
    for trip in (plain, once, again, other):
        own = [int(batch.chain[0]) for _, batches in trip.own() for batch in batches]
        assert sorted(own) == list(range(8))
        orders.append(own)
    assert orders[0] == list(range(8)) and orders[1] == orders[2]
    longer = [[[i] for i in range(50)]]
    first, second = (Trip(longer, read, seed).turns() for seed in (1, 2))  # type: ignore[arg-type]
    assert first != second


def test_batches_in_turn_are_those_of_the_trip(monkeypatch: pytest.MonkeyPatch) -> None:
    """What every rank gives in its turn: together, in one order, all that one process reads."""
    trip = Trip(SHARDS, read)  # type: ignore[arg-type]
    whole = [int(batch.chain[0]) for batch in read([batch for _, batch in trip.turns()])]  # type: ignore[attr-defined]
    found: dict[int, list[list[int]]] = {}
    for rank in range(3):
        monkeypatch.setattr(distributed, "world", lambda rank=rank: World(rank, 3))
        turns = list(trip.in_turn())
        assert [source for source, _ in turns] == [s % 3 for s, _ in trip.turns()]
        assert all(not batches for source, batches in turns if source != rank)
        found[rank] = [[int(batch.chain[0]) for batch in batches] for _, batches in turns]
    together = [chain for parts in zip(*found.values(), strict=True) for part in parts for chain in part]
    assert together == whole and sorted(whole) == list(range(8))


def test_a_batch_without_a_token_is_a_turn_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def reading(batches: object) -> object:
        return (batch for batch in read(batches) if int(batch.chain[0]) != 1)  # type: ignore[attr-defined]

    monkeypatch.setattr(distributed, "world", lambda: World(0, 2))
    trip = Trip([[[0], [1], [2]], []], reading)  # type: ignore[arg-type]
    assert [[int(batch.chain[0]) for batch in batches] for _, batches in trip.in_turn()] == [[0], [], [2]]
    assert len(list(trip_of([batch_of(0)]).in_turn())) == 1
