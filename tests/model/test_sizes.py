"""The memory of the weights, from a config alone, against that of models that are loaded."""

import pytest
from tiny_models import build, cut_model

from streamprobe.model.backbone import load_backbone
from streamprobe.model.loading import read_config
from streamprobe.model.sizes import loaded_bytes, weight_bytes

LINEAR = 7  # matrices in a Llama block


@pytest.fixture(scope="module", params=["Llama", "Qwen3", "Gemma3"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A saved tiny model of each architecture."""
    return build(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def wide_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Wide enough for one block of 64 weights a row, which is what 4 bits share a scale over."""
    wide = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "initializer_range": 0.05}
    return build("Llama", tmp_path_factory.mktemp("wide"), **wide)


@pytest.mark.parametrize("layers", [[0], [2, 1], [5]], ids=str)
@pytest.mark.parametrize(("name", "dtype"), [("float32", "float32"), ("bf16", "bfloat16")])
def test_estimate_is_what_is_loaded(folder, layers, name, dtype):
    config = read_config(folder)
    model = load_backbone(folder, layers, dtype, device_map="cpu")
    estimate = weight_bytes(config, layers)
    assert estimate[name] == loaded_bytes(model)
    assert estimate[name] == sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    assert config.num_hidden_layers == 6
    assert layers == [5] or estimate[name] < weight_bytes(config, [5])[name]  # negative control: the whole model


def test_shared_weights_count_once(tmp_path):
    build("Llama", tmp_path)
    model = cut_model(tmp_path, [1])
    one = loaded_bytes(model)
    model.layers[1].mlp.up_proj.weight = model.layers[0].mlp.up_proj.weight
    assert loaded_bytes(model) == one - 4 * 32 * 64


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_estimate_of_quantized_weights(wide_folder, bits):
    """But for the bookkeeping that bitsandbytes keeps for each matrix."""
    pytest.importorskip("bitsandbytes")
    model = load_backbone(wide_folder, [2], "bfloat16", device_map="cpu", quantization=bits)
    estimate = weight_bytes(read_config(wide_folder), [2])
    name = bits.replace("bit", "-bit")
    assert 0 <= loaded_bytes(model) - estimate[name] <= 3 * LINEAR * 160
    assert estimate["4-bit"] < estimate["8-bit"] < estimate["bf16"] < estimate["float32"]


def test_estimate_of_gpt2(tmp_path):
    """Its matrices lie the other way round."""
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=32, n_layer=5, n_head=4)).save_pretrained(tmp_path)
    estimate = weight_bytes(read_config(str(tmp_path)), [2])
    assert estimate["float32"] == loaded_bytes(cut_model(tmp_path, [2]))
    rows = 3 * (3 * 32 + 32 + 4 * 32 + 32)
    assert estimate["bf16"] - estimate["8-bit"] == 3 * 12 * 32**2 - 4 * rows


def test_estimate_by_hand_at_the_size_of_llama_8b(tmp_path):
    """From a config alone, without weights and without making any."""
    from transformers import LlamaConfig

    LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
    ).save_pretrained(tmp_path)
    estimate = weight_bytes(read_config(str(tmp_path)), [8, 16])
    inside = 17 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    rows = 17 * (2 * 4096 + 2 * 1024 + 2 * 14336 + 4096)
    outside = 128256 * 4096 + 17 * 2 * 4096 + 4096
    frequencies = 2 * 64 * 4
    assert estimate == {
        "float32": 4 * (inside + outside) + frequencies,
        "bf16": 2 * (inside + outside) + frequencies,
        "8-bit": inside + 4 * rows + 2 * outside + frequencies,
        "4-bit": inside // 2 + 4 * inside // 64 + 2 * outside + frequencies,
    }
