"""A GGUF file that is parsed once.

transformers parses such a file, with the whole vocabulary in it, each time that it wants the config, the tokenizer or
the weights, and turns the weights of all blocks into numbers.  Within `parsed_once` it gets what was parsed before, and
the weights of the blocks that are kept.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from functools import cache, lru_cache, partial
from importlib.util import find_spec
from typing import Any

import numpy as np

BLOCK = re.compile(r"blk\.(\d+)\.")  # at the start of the names of its tensors


@contextmanager
def parsed_once(gguf_file: str | None, blocks: int | None = None) -> Iterator[None]:
    """Lets transformers read a GGUF file without parsing it again; `blocks` are those whose weights are read (all).

    It is forgotten when its weights were read, which are the last that is wanted of it.  Nothing is done without a
    file, and without the package `gguf`, of which transformers says that it is missing.
    """
    if not gguf_file or not find_spec("gguf"):
        yield
        return
    from transformers import modeling_gguf_pytorch_utils as library

    load = library.load_gguf_checkpoint

    def load_parsed(path: str, return_tensors: bool = False, **options: Any) -> dict[str, dict[str, Any]]:
        if not return_tensors:
            return {name: dict(part) for name, part in _read_parts(path, _changed(path), load).items()}
        try:
            return _read_weights(partial(load, path, return_tensors=True, **options), blocks)
        finally:
            _parse.cache_clear()
            _read_parts.cache_clear()

    with _replaced(library, "load_gguf_checkpoint", load_parsed):
        yield


def _changed(path: str) -> int:
    """When a file was last changed."""
    return os.stat(path).st_mtime_ns


@lru_cache(maxsize=1)
def _parse(path: str, changed: int) -> Any:
    """The parsed file.

    Its bytes are an array of the plain kind: `gguf` takes some 100,000 slices, and those of a memory map are slow.
    """
    from gguf.gguf_reader import GGUFReader

    class Reader(GGUFReader):
        @property
        def data(self) -> Any:
            return self.bytes

        @data.setter
        def data(self, mapped: Any) -> None:
            self.bytes = np.asarray(mapped)

    return Reader(path)


@lru_cache(maxsize=1)
def _read_parts(path: str, changed: int, load: Any) -> dict[str, dict[str, Any]]:
    """What transformers' function `load` reads in a file beside the weights: the config and the tokenizer."""
    import gguf

    def parse(path: str) -> Any:
        return _parse(path, _changed(path))

    with _replaced(gguf, "GGUFReader", parse):
        return load(path)


def _read_weights(load: Any, blocks: int | None) -> dict[str, dict[str, Any]]:
    """What transformers' function `load` reads with the weights of the first `blocks`, or of all."""
    import gguf

    def parse_kept(path: str) -> Any:
        kept = copy(_parse(path, _changed(path)))
        kept.fields = {name: field for name, field in kept.fields.items() if not name.startswith("tokenizer.")}
        kept.tensors = [tensor for tensor in kept.tensors if blocks is None or _block_of(tensor.name) < blocks]
        return kept

    names = cache(gguf.get_tensor_name_map)  # which is built anew for every module of the model
    with _replaced(gguf, "GGUFReader", parse_kept), _replaced(gguf, "get_tensor_name_map", names):
        return load()


def _block_of(name: str) -> int:
    """The block that a tensor is part of, or -1 for one that is part of none."""
    found = BLOCK.match(name)
    return int(found[1]) if found else -1


@contextmanager
def _replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    """Has another value under a name of a module."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)
