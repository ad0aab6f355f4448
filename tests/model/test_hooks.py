"""Hooks come and go with their context manager, and see or change what a block returns."""

from typing import Any, NamedTuple

import pytest
import torch
from tiny_models import full_model, hidden_states, outputs, save_tiny, states, token_ids
from torch import Tensor, nn

from streamprobe.errors import InputError
from streamprobe.model.blocks import decoder_layers
from streamprobe.model.hooks import read, steer, tap


def n_hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_hooks_are_counted(model_dir):
    model = full_model(model_dir)
    blocks = decoder_layers(model)
    assert n_hooks(model) == 0
    with tap({0: blocks[0], 2: blocks[2]}) as taken:
        assert n_hooks(model) == 2 and not taken
        model(token_ids())
        assert set(taken) == {0, 2} and n_hooks(model) == 2
        with tap({2: blocks[2]}):
            assert n_hooks(model) == 3
        assert n_hooks(model) == 2
    assert n_hooks(model) == 0 and not taken


def test_hooks_go_with_an_exception(model_dir):
    model = full_model(model_dir)
    blocks = decoder_layers(model)
    with pytest.raises(ZeroDivisionError), tap({1: blocks[1]}):
        assert n_hooks(model) == 1
        raise ZeroDivisionError
    assert n_hooks(model) == 0
    with pytest.raises(IndexError), tap({1: blocks[1]}):  # from within the model
        model(torch.tensor([[10_000]]))
    assert n_hooks(model) == 0
    with pytest.raises(AttributeError), tap({1: blocks[1], 2: None}):  # while entering
        pass
    assert n_hooks(model) == 0


def test_tap_reads_the_hidden_states(model_dir):
    model = full_model(model_dir)
    got, states = outputs(model, [0, 1, 2]), hidden_states(model)
    for i in range(3):
        assert torch.equal(got[i], states[i + 1])
        assert not torch.equal(got[i], states[i])  # negative control


def test_tap_holds_the_last_forward_pass(model_dir):
    model = full_model(model_dir)
    with tap({1: decoder_layers(model)[1]}) as taken:
        model(token_ids(1))
        first = taken[1]
        model(token_ids(2))
        assert not torch.equal(taken[1], first)
        assert torch.equal(taken[1], outputs(model, [1], token_ids(2))[1])
        assert not taken[1].requires_grad


class Pair(NamedTuple):
    """What some blocks return."""

    hidden: Tensor
    other: Tensor


class Doubles(nn.Module):
    """A block that returns a tensor, or a container that begins with it, and remembers it."""

    def __init__(self, kind: Any):
        super().__init__()
        self.kind, self.returned = kind, torch.empty(0)

    def forward(self, x: Tensor) -> Any:
        self.returned = 2 * x
        return self.kind([self.returned, x]) if self.kind else self.returned


KINDS_OF_OUTPUT = [None, tuple, list, Pair._make]


@pytest.mark.parametrize("kind", KINDS_OF_OUTPUT)
def test_tap_takes_a_tensor_or_the_head_of_a_container_without_a_copy(kind):
    block = Doubles(kind)
    x = torch.randn(2, 3, 4, requires_grad=True)
    with tap({"any key": block}) as taken:
        returned = block(x)
        got = taken["any key"]
        assert torch.equal(got, 2 * x)
        assert got.data_ptr() == block.returned.data_ptr()
        assert got.clone().data_ptr() != block.returned.data_ptr()  # negative control
        assert not got.requires_grad and block.returned.requires_grad
        (returned[0] if kind else returned).sum().backward()  # the model's own graph is whole
    assert torch.equal(x.grad, torch.full_like(x, 2))


@pytest.mark.parametrize("kind", KINDS_OF_OUTPUT)
@torch.no_grad()
def test_steer_gives_back_the_same_kind_of_container(kind):
    block, x = Doubles(kind), torch.randn(2, 3, 4)
    plain = block(x)
    with steer(block, add=torch.ones(4)):
        changed = block(x)
    assert type(changed) is type(plain)
    if kind:
        assert torch.equal(changed[0], 2 * x + 1) and changed[1] is x and len(changed) == 2
    else:
        assert torch.equal(changed, 2 * x + 1)


def test_a_block_that_returns_a_list_can_be_steered(tmp_path):
    whole = save_tiny("openai-gpt", str(tmp_path))
    blocks, push = decoder_layers(whole), torch.full((32,), 0.5)
    assert isinstance(blocks[1](torch.zeros(1, 3, 32)), list)
    plain = states(whole, torch.arange(3, 15))
    with steer(blocks[1], add=push), tap({1: blocks[1]}) as taken:
        steered = states(whole, torch.arange(3, 15))
        assert isinstance(blocks[1](torch.zeros(1, 3, 32)), list)
    torch.testing.assert_close(steered[2], plain[2] + push, rtol=0, atol=1e-6)
    assert (steered[3] - plain[3] - push).abs().max() > 1e-3 and not taken  # the rest of the model hears of it


@pytest.mark.parametrize("kind", [dict.fromkeys, lambda _: (), lambda _: ("a", 1), lambda _: None])
def test_an_output_without_a_tensor_is_refused(kind):
    block = Doubles(kind)
    with tap({0: block}), pytest.raises(InputError, match="^a decoder block that returns (dict|tuple|NoneType);"):
        block(torch.zeros(2, 3, 4))


def test_nothing_behind_the_last_block_is_computed(model_dir):
    """Also with a tap on it, and a change of it; then all hooks are gone."""
    model, ids = full_model(model_dir), token_ids()
    blocks, ran = decoder_layers(model), []
    expected = outputs(model, [1])[1] + 1
    for i, block in enumerate(blocks):
        block.register_forward_pre_hook(lambda *_, i=i: ran.append(i))
    before = n_hooks(model)
    with tap({1: blocks[1]}) as taken, steer(blocks[1], add=torch.ones(32)):
        read(model, ids, last=blocks[1])
        assert ran == [0, 1] and torch.equal(taken[1], expected)
    assert n_hooks(model) == before
    ran.clear()
    read(model, ids)
    assert ran == [0, 1, 2, 3]  # negative control
    with pytest.raises(InputError, match="^a LlamaModel, which cannot read a text of 24 tokens alone .IndexError"):
        read(model, ids + 10_000, last=blocks[1])
    assert n_hooks(model) == before


def test_a_lack_of_memory_is_no_fault_of_the_model(model_dir):
    model, ids = full_model(model_dir), token_ids()
    for error in (torch.OutOfMemoryError("out of memory"), RuntimeError("not enough memory: you tried to allocate")):

        def fail(*_: Any, error: Exception = error) -> None:
            raise error

        handle = model.register_forward_pre_hook(fail)
        with pytest.raises(type(error)) as raised:
            read(model, ids)
        assert not isinstance(raised.value, InputError)
        handle.remove()
