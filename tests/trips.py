"""Trips over tokens that are there already, and all chunks of a pass."""

from collections.abc import Iterable, Sequence

from streamprobe.activations.batch import TokenBatch
from streamprobe.activations.shards import Trip
from streamprobe.activations.store import Part


def trip_of(batches: Sequence[TokenBatch]) -> Trip:
    """A trip over a single shard of these batches."""
    return Trip([[[i] for i in range(len(batches))]], lambda wanted: (batches[i] for [i] in wanted))


def chunks(parts: Iterable[Part]) -> list[TokenBatch]:
    """The chunks of all parts of a pass."""
    return [chunk for part in parts for chunk in part.chunks]
