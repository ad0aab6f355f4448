"""What a config says of the blocks, which of them a user names, and where a model holds them."""

import re
import sys

import pytest
import torch
from tiny_models import SIZES, build, cut_model, full_model, hidden_states, outputs, tiny_config

from streamprobe.errors import InputError
from streamprobe.model.blocks import check_layers, context, decoder_layers, resolve_layers


def test_check_layers_names_all_wrong_ones():
    from transformers import LlamaConfig

    check_layers(LlamaConfig(**SIZES), [0, 5])
    with pytest.raises(InputError, match="layers 6 -2;"):
        check_layers(LlamaConfig(**SIZES), [6, 0, -2])


@pytest.mark.parametrize(
    ("spec", "n_blocks", "layers"),
    [
        ([12, 16], 32, [12, 16]),
        ([16, 12, 12, "12"], 32, [12, 16]),
        (["all"], 4, [0, 1, 2, 3]),
        (["all"], 1, [0]),
        (["8-16"], 32, [8, 9, 10, 11, 12, 13, 14, 15, 16]),
        (["3-3"], 4, [3]),
        (["0%", "25%", "50%", "75%", "100%"], 32, [0, 8, 16, 23, 31]),
        (["50%"], 2, [1]),
        (["37.5%"], 9, [3]),
        (["100%", "0%"], 1, [0]),
        (["2-4", "50%", 3, 9], 12, [2, 3, 4, 6, 9]),
        ([1, "all"], 3, [0, 1, 2]),
    ],
    ids=str,
)
def test_layers_are_named_in_many_ways(spec, n_blocks, layers):
    assert resolve_layers(spec, n_blocks) == layers


@pytest.mark.parametrize("n_blocks", range(1, 81))
def test_a_percentage_is_the_layer_nearest_to_it(n_blocks):
    """Of two that are as near the deeper one; in whole numbers, which do not round."""
    for percent in range(101):
        layer, place = resolve_layers([f"{percent}%"], n_blocks)[0], percent * (n_blocks - 1)
        nearest = max(range(n_blocks), key=lambda i: (-abs(100 * i - place), i))  # noqa: B023
        assert layer == nearest


@pytest.mark.parametrize(
    "entry",
    [
        "9-3",
        "8-",
        "-8",
        "8-32",
        "32-40",
        "120%",
        "100.1%",
        "-5%",
        "%",
        "5 %",
        "x",
        "",
        "All",
        "1.5",
        "1e1",
        "٣",
        "9" * 5000,
    ]
    + [-1, 32, 10**6],
    ids=lambda x: str(x)[:9],
)
def test_what_names_no_layer_is_refused(entry):
    expected = re.escape(f"layers {entry}".rstrip())
    with pytest.raises(InputError, match=f"^{expected} ?; expected numbers from 0 to 31 .* fix: correct --layers$"):
        resolve_layers([3, entry, "50%"], 32)


def test_all_wrong_names_are_in_the_message():
    with pytest.raises(InputError, match=r"^layers 9-3 40 x; expected"):
        resolve_layers(["9-3", 5, 40, "x"], 32)


def test_decoder_layers_of_llama_and_gpt2(tmp_path):
    from transformers import AutoModel, GPT2Config, GPT2LMHeadModel

    build("Llama", tmp_path / "llama")
    llama = full_model(str(tmp_path / "llama"))
    assert decoder_layers(llama) == list(llama.layers)
    GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=32, n_layer=5, n_head=4)).save_pretrained(tmp_path / "gpt2")
    gpt2 = AutoModel.from_pretrained(tmp_path / "gpt2")
    assert decoder_layers(gpt2) == list(gpt2.h)
    cut = cut_model(str(tmp_path / "gpt2"), [2])
    assert len(decoder_layers(cut)) == len(cut.h) == 3
    got = outputs(cut, [0, 2])
    for layer in (0, 2):
        assert torch.equal(got[layer], hidden_states(gpt2.eval())[layer + 1])


@pytest.mark.parametrize(
    ("name", "changes", "tokens"),
    [
        ("mpt", {"max_seq_len": 48}, 48),
        ("rwkv", {"context_length": 40}, 40),
        ("gpt2", {"n_positions": 56}, 56),
        ("llama", {"max_position_embeddings": 44}, 44),
        ("ctrl", {"n_positions": 52}, 52),
        ("mamba", {}, sys.maxsize),
        ("gemma3", {"text_config": {"max_position_embeddings": 36}}, 36),
        ("xlnet", {}, sys.maxsize),
    ],
)
def test_context(name, changes, tokens):
    assert context(tiny_config(name, **changes)) == tokens
