"""What transformers is told and asked of a model in shards; whole runs are in tests/run/test_tensor_parallel.py."""

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import tiny_config
from torch.distributed.tensor import Replicate, Shard

from streamprobe.errors import InputError
from streamprobe.model.hooks import residual
from streamprobe.model.loading import build_empty
from streamprobe.model.sharded import check_plan, own_part, plain, sharding, whole


def empty(kind: str, **changes: Any) -> Any:
    return build_empty(tiny_config(kind, **changes), torch.float32)


def sharded(*placements: Any) -> Any:
    """As torch's DTensor, as far as it is asked here."""
    return SimpleNamespace(placements=placements, to_local=lambda: torch.ones(2), full_tensor=lambda: torch.ones(4))


def test_outputs_that_are_whole_lose_their_mesh() -> None:
    x = torch.ones(1)
    assert plain(x) is x and own_part(x) is x and whole(x) is x and residual((x,)) is x
    assert plain(sharded(Replicate())).shape == own_part(sharded(Shard(1))).shape == (2,)
    assert whole(sharded(Shard(1))).shape == (4,)


def test_outputs_of_which_a_process_has_a_part_are_refused() -> None:
    with pytest.raises(InputError, match="a block whose output is cut over processes .* drop --tp_size"):
        plain(sharded(Replicate(), Shard(1)))


def test_the_embedding_stays_whole() -> None:
    model = empty("llama")
    assert model.tp_plan["embed_tokens"] == "embedding_rowwise"  # transformers' own rule
    assert sharding(model, 2)["distributed_config"].tp_plan == {"embed_tokens": "replicate"}


def test_what_has_no_plan_or_too_few_heads_is_refused() -> None:
    check_plan(empty("llama"), 2)
    with pytest.raises(InputError, match="tp_size 2 with a gpt2 model, which transformers has no plan to shard"):
        check_plan(empty("gpt2"), 2)
    with pytest.raises(InputError, match="tp_size 4 with a model of 2 key and value heads"):
        check_plan(empty("llama"), 4)
    with pytest.raises(InputError, match="tp_size 3 with a model of 2 key and value heads"):
        check_plan(empty("llama"), 3)


def test_an_older_transformers_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model = empty("llama")
    monkeypatch.setitem(sys.modules, "transformers.distributed.utils", None)
    with pytest.raises(InputError, match=r"tp_size 2 with transformers 5\..*; expected 5.23 or later"):
        check_plan(model, 2)
