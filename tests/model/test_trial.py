"""The text that a model is tried with; what it finds is in test_models.py."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from builders import make_tokenizer
from torch import Tensor
from transformers import LlamaConfig, LlamaModel

from streamprobe.errors import InputError
from streamprobe.model import trial
from streamprobe.model.trial import CHAINS, TOKENS, check_reading, some_tokens


def make_model(**changes: Any) -> LlamaModel:
    sizes = {
        "vocab_size": 100,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
    }
    torch.manual_seed(0)
    return LlamaModel(LlamaConfig(**sizes | {"initializer_range": 0.2} | changes)).eval()


def test_tokens_stand_for_text_and_the_model_knows_them():
    tokenizer, config = make_tokenizer(), make_model().config
    tokenizer.add_tokens(["<picture>"])
    ids = some_tokens(tokenizer, config)
    assert len(set(ids)) == len(ids) > CHAINS + TOKENS - 1 and max(ids) < 100
    assert not set(ids) & set(tokenizer.added_tokens_decoder)
    assert set(tokenizer.added_tokens_decoder) & set(
        range(3)
    )  # negative control: a vocabulary begins with special ones
    assert max(some_tokens(tokenizer, make_model(vocab_size=500).config)) > 300


@pytest.mark.parametrize(("width", "tokens"), [(32, 23), (64, 23)])
def test_no_two_axes_are_of_one_size(width, tokens):
    model, seen = make_model(hidden_size=width), []
    model.register_forward_pre_hook(
        lambda _module, _args, kwargs: seen.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    assert check_reading(model, [0, 2], range(3, 60)) == width
    assert len({*seen[0], width}) == 3 and seen[0] == (CHAINS, tokens)


def test_a_hidden_size_of_as_many_as_there_are_tokens():
    model, seen = make_model(hidden_size=23, num_attention_heads=1, head_dim=8), []
    model.register_forward_pre_hook(
        lambda _module, _args, kwargs: seen.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    assert check_reading(model, [0], range(3, 60)) == 23 and seen[0] == (CHAINS, 24)


@pytest.mark.parametrize("ids", [[3, 4], range(3, 60)], ids=len)
@pytest.mark.parametrize("tokens", [4, 12, 200])
def test_a_short_context_or_vocabulary_is_enough(tokens, ids):
    assert check_reading(make_model(max_position_embeddings=tokens), [1], ids) == 32
    with pytest.raises(InputError, match="sees later ones"):
        check_reading(make_model(max_position_embeddings=tokens, is_causal=False), [1], ids)


def test_a_token_that_the_model_has_not():
    with pytest.raises(InputError, match="^token 100, which the model's vocabulary of 100 has not"):
        check_reading(make_model(), [0], [3, 100])


def test_hooks_are_gone_whatever_was_found():
    for causal in (True, False):
        model = make_model(is_causal=causal)
        try:
            check_reading(model, [0, 1], range(3, 60), chunked=True)
        except InputError:
            assert not causal
        assert not any(m._forward_hooks for m in model.modules())


def zeros(x: Tensor) -> Tensor:
    return x * 0


def one_nan(x: Tensor) -> Tensor:
    x = x.clone()
    x[0, 3, 5] = torch.nan
    return x


def alike(x: Tensor) -> Tensor:
    return x[:1, :1].expand_as(x)


WRONG = {"all 0": zeros, "infinite or not numbers": one_nan, "the same at every token": alike}


def broken_model(change: Callable[[Tensor], Tensor], block: int = 1) -> LlamaModel:
    """A model of which one block, as after a copy that failed, returns something else."""
    model = make_model()
    model.layers[block].register_forward_hook(lambda _module, _inputs, output: change(output))
    return model


@pytest.mark.parametrize("said", WRONG)
def test_a_layer_that_no_text_can_give_is_refused(said):
    with pytest.raises(InputError) as error:
        check_reading(broken_model(WRONG[said]), [0, 1], range(3, 60))
    told = str(error.value)
    assert told.startswith(f"activations of a short text that are {said}: layer 1, whose block lies on cpu; expected ")
    assert "--device_map" in told and "--dtype" in told and "\n" not in told
    assert check_reading(broken_model(WRONG[said], block=2), [0, 1], range(3, 60)) == 32  # behind the probed layers
    assert check_reading(broken_model(lambda x: x), [0, 1], range(3, 60)) == 32  # negative control


@pytest.mark.parametrize("said", WRONG)
def test_the_refusal_of_a_layer_fails_without_a_look_at_its_numbers(said, monkeypatch):
    """What is seen of later tokens sees nothing there."""
    monkeypatch.setattr(trial, "_check_numbers", lambda *_: None)
    assert check_reading(broken_model(WRONG[said]), [0, 1], range(3, 60)) == 32
