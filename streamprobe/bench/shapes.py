"""The sizes of model that can be measured, and how long that takes by default."""

from typing import NamedTuple


class Shape(NamedTuple):
    """A Llama's size, and what is probed in it."""

    hidden: int
    blocks: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int
    layers: tuple[int, ...]
    dtype: str  # as in the config


SHAPES = {
    "tiny": Shape(32, 6, 4, 2, 64, 400, (0, 1, 2, 3, 4), "float32"),
    "smollm2-135m": Shape(576, 30, 9, 3, 1536, 49_152, (7, 9, 11, 13, 15), "auto"),
    "llama-3.1-8b": Shape(4096, 32, 32, 8, 14_336, 128_256, (8, 10, 12, 14, 16), "auto"),
}


def default_shape(cuda: bool) -> str:
    """The shape that is measured where none is asked for: one that takes minutes on a GPU, or else on a CPU."""
    return "llama-3.1-8b" if cuda else "smollm2-135m"
