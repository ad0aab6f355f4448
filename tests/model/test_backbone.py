"""The cut-off model computes what the full one does, and hooks come and go with their context manager."""

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from builders import make_tokenizer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from streamprobe.errors import InputError
from streamprobe.model.backbone import load_backbone, pick_dtype
from streamprobe.model.blocks import check_layers, decoder_layers
from streamprobe.model.hooks import read, steer, tap
from streamprobe.model.loading import read_config
from streamprobe.model.sizes import loaded_bytes, weight_bytes
from streamprobe.model.tokenizer import load_tokenizer

SIZES = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
WINDOW = 4  # tokens; the text is longer
KINDS = ["sliding_attention", "full_attention", "sliding_attention"] * 2


def build(kind: str, folder: str | Path, **changes: Any) -> None:
    """Saves a tiny random model with an LM head."""
    import transformers

    extra = {"layer_types": KINDS, "sliding_window": WINDOW} if kind == "Gemma3" else {}
    config_class = "Gemma3TextConfig" if kind == "Gemma3" else f"{kind}Config"
    config = getattr(transformers, config_class)(**SIZES | extra | changes)
    torch.manual_seed(0)
    getattr(transformers, f"{kind}ForCausalLM")(config).float().save_pretrained(folder)


@pytest.fixture(scope="module", params=["Llama", "Qwen3", "Gemma3"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A saved tiny model of each architecture."""
    path = tmp_path_factory.mktemp(request.param)
    build(request.param, path)
    return str(path)


def full_model(folder: str, **options: Any) -> nn.Module:
    from transformers import AutoModel

    return AutoModel.from_pretrained(folder, dtype=torch.float32, **options).eval()


def cut_model(folder: str | Path, layers: list[int], **options: Any) -> nn.Module:
    """On the CPU, where the full one is, too."""
    return load_backbone(str(folder), layers, "float32", device_map="cpu", **options)


def token_ids(seed: int = 0) -> Tensor:
    return torch.randint(3, 300, (2, 24), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def outputs(model: nn.Module, layers: list[int], ids: Tensor | None = None) -> dict[int, Tensor]:
    """What `tap` reads in one forward pass."""
    blocks = decoder_layers(model)
    with tap({layer: blocks[layer] for layer in layers}) as taken:
        model(input_ids=token_ids() if ids is None else ids, use_cache=False)
        return {layer: acts.clone() for layer, acts in taken.items()}


@torch.no_grad()
def hidden_states(model: nn.Module) -> tuple[Tensor, ...]:
    return model(input_ids=token_ids(), use_cache=False, output_hidden_states=True).hidden_states


# --- the cut ---


@pytest.mark.parametrize("layers", [[0], [2, 1], [0, 3, 4]], ids=str)
def test_truncated_model_is_bit_equal(folder, layers):
    full = full_model(folder)
    cut = cut_model(folder, layers)
    assert len(decoder_layers(full)) == 6 and len(decoder_layers(cut)) == max(layers) + 1
    reference, got, states = outputs(full, layers), outputs(cut, layers), hidden_states(full)
    assert set(got) == set(layers)
    for layer in layers:
        assert torch.equal(got[layer], reference[layer])
        assert torch.equal(got[layer], states[layer + 1])  # none of `layers` is the full model's last, which is normed
        assert not torch.equal(got[layer], states[layer])  # negative control: the block's input
    normed = cut(input_ids=token_ids(), use_cache=False).last_hidden_state
    assert not torch.allclose(normed, got[max(layers)])  # negative control: `last_hidden_state`


def test_truncated_model_is_frozen_and_smaller(folder):
    cut = cut_model(folder, [1])
    assert not cut.training
    assert not any(p.requires_grad for p in cut.parameters())
    assert all(p.dtype == torch.float32 for p in cut.parameters())
    names = {name for name, _ in cut.named_parameters()}
    assert not any("lm_head" in name for name in names)
    full = {name: p for name, p in full_model(folder).named_parameters()}
    assert names == {name for name in full if not any(f"layers.{i}." in name for i in range(2, 6))}
    for name, p in cut.named_parameters():
        assert torch.equal(p, full[name])


def test_every_block_may_be_asked_for(folder):
    assert len(decoder_layers(load_backbone(folder, range(6), "float32"))) == 6


def test_the_sliding_window_is_kept_by_the_cut(tmp_path):
    """The config is that of the whole model, with an entry per block; the window makes a difference in this text."""
    build("Gemma3", tmp_path)
    cut = cut_model(str(tmp_path), [2])
    assert len(decoder_layers(cut)) == 3 and cut.config.layer_types == KINDS
    config = read_config(str(tmp_path))
    config.sliding_window = 64
    wide, narrow = outputs(full_model(str(tmp_path), config=config), [0])[0], outputs(cut, [0])[0]
    torch.testing.assert_close(wide[:, :WINDOW], narrow[:, :WINDOW], rtol=0, atol=1e-5)
    assert (wide[:, WINDOW:] - narrow[:, WINDOW:]).abs().amax(-1).min() > 1e-3  # negative control: a wider window


@pytest.mark.parametrize("layers", [[6], [0, 17], [-1]], ids=str)
def test_layer_out_of_range_is_told_before_the_weights_load(tmp_path, layers):
    build("Llama", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(InputError, match=rf"^layers {layers[-1]}; expected numbers from 0 to 5 .*--layers$"):
        cut_model(str(tmp_path), layers)
    with pytest.raises(InputError, match="model.safetensors"):  # negative control: one that exists gets to the weights
        cut_model(str(tmp_path), [5])


def test_check_layers_names_all_wrong_ones():
    from transformers import LlamaConfig

    check_layers(LlamaConfig(**SIZES), [0, 5])
    with pytest.raises(InputError, match="layers 6 -2;"):
        check_layers(LlamaConfig(**SIZES), [6, 0, -2])


# --- dropped blocks take no memory ---


class Watched:
    """A safetensors file that notes what is read of it."""

    read: set[str] = set()

    def __init__(self, *args: Any, **options: Any):
        from safetensors import safe_open

        self.file = safe_open(*args, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def get_slice(self, name: str) -> Any:
        inner = self.file.get_slice(name)
        self.read.discard(name)

        class Slice:
            def __getitem__(self, index: Any) -> Tensor:
                Watched.read.add(name)
                return inner[index]

            def __getattr__(self, attribute: str) -> Any:
                return getattr(inner, attribute)

        return Slice()


@pytest.mark.parametrize("quantization", ["none", "8bit", "4bit"])
@pytest.mark.parametrize("device_map", ["auto", "cpu"])
def test_dropped_blocks_are_never_read(wide_folder, monkeypatch, quantization, device_map):
    import transformers.modeling_utils as loading

    if quantization != "none":
        pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(loading, "safe_open", Watched)
    for layers, n in ([1], 2), ([5], 6):  # the second is the negative control
        Watched.read = set()
        load_backbone(wide_folder, layers, "float32", device_map=device_map, quantization=quantization)
        names = {int(name.split(".")[2]) for name in Watched.read if "layers" in name}
        assert names == set(range(n)) and "model.embed_tokens.weight" in Watched.read


@pytest.fixture(scope="module")
def gguf_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny Llama as GGUF, in float32."""
    gguf = pytest.importorskip("gguf")
    path = tmp_path_factory.mktemp("gguf")
    writer = gguf.GGUFWriter(path / "model.gguf", "llama")
    for name, value in {
        "context_length": 64, "embedding_length": 32, "block_count": 6, "feed_forward_length": 64, "head_count": 4,
        "head_count_kv": 4, "vocab_size": 300,
    }.items():  # fmt: skip
        getattr(writer, f"add_{name}")(value)
    writer.add_layer_norm_rms_eps(1e-6)
    random = torch.Generator().manual_seed(0)
    shapes = {"token_embd": (300, 32), "output_norm": (32,), "output": (300, 32)}
    for i in range(6):
        shapes |= {f"blk.{i}.attn_{x}": (32, 32) for x in ("q", "k", "v", "output")}
        shapes |= {f"blk.{i}.attn_norm": (32,), f"blk.{i}.ffn_norm": (32,), f"blk.{i}.ffn_down": (32, 64)}
        shapes |= {f"blk.{i}.ffn_{x}": (64, 32) for x in ("gate", "up")}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", (torch.randn(*shape, generator=random) * 0.3).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


def test_gguf_is_cut(gguf_folder):
    where = {"gguf_file": "model.gguf"}
    whole, cut = full_model(gguf_folder, **where), cut_model(gguf_folder, [0, 2], **where)
    assert len(decoder_layers(whole)) == 6 and len(decoder_layers(cut)) == 3
    expected, got = outputs(whole, [0, 2]), outputs(cut, [0, 2])
    for layer in (0, 2):
        assert torch.equal(got[layer], expected[layer])
        assert torch.equal(got[layer], hidden_states(whole)[layer + 1])
    assert not torch.equal(got[0], got[2])  # negative control


REMOTE = """
from transformers import LlamaConfig, LlamaModel


class MyConfig(LlamaConfig):
    model_type = "my_own"


class MyModel(LlamaModel):
    config_class = MyConfig

    def __init__(self, config):
        super().__init__(config)
        for block in self.layers:
            block.mlp.depth = len(self.layers)
            block.mlp.register_forward_hook(lambda module, _inputs, output: output / module.depth)
"""


def test_the_models_own_code_is_cut(tmp_path):
    """Only where it is trusted; its blocks depend on the depth."""
    build("Llama", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "my_own", "auto_map": {"AutoConfig": "own.MyConfig", "AutoModel": "own.MyModel"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "own.py").write_text(REMOTE)
    with pytest.raises(InputError, match="contains custom code"):
        cut_model(tmp_path, [2], trust_remote_code=False)
    whole, cut = full_model(str(tmp_path), trust_remote_code=True), cut_model(tmp_path, [2], trust_remote_code=True)
    assert type(cut).__name__ == type(whole).__name__ == "MyModel" and len(decoder_layers(cut)) == 3
    assert torch.equal(outputs(cut, [2])[2], outputs(whole, [2])[2])
    for block in cut.layers:
        block.mlp.depth = 3
    assert not torch.equal(outputs(cut, [2])[2], outputs(whole, [2])[2])  # negative control: built with three blocks
    size = weight_bytes(read_config(str(tmp_path), trust_remote_code=True), [2], trust_remote_code=True)
    assert size["float32"] == loaded_bytes(cut)


# --- what cannot be loaded ---


def test_missing_weights(tmp_path):
    build("Llama", tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.3.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"without the weights layers\.3\.mlp\.up_proj\.weight;"):
        cut_model(str(tmp_path), [4])
    cut_model(str(tmp_path), [2])  # negative control: above the cut nothing is missed


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "not a valid JSON"),
        ("{}", "model_type"),
        ('{"model_type": "martian"}', "martian"),
        (None, "expected a folder"),
    ],
    ids=["broken", "empty", "unknown", "missing"],
)
def test_no_model(tmp_path, config, message):
    if config:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(InputError, match=message) as error:
        cut_model(str(tmp_path), [0])
    assert str(tmp_path) in str(error.value) and "; fix: " in str(error.value) and "\n" not in str(error.value)


class Evil:
    """What a pickle may hold."""

    def __reduce__(self) -> Any:
        return os.system, ("true",)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_attention_heads": 5}, "32.* is not a multiple of the number of attention heads .5.; expected"),
        ({"num_hidden_layers": "four"}, "'num_hidden_layers' expected int, got str .value: 'four'"),
        ({"num_hidden_layers": 0}, "names 0 as the number of its decoder blocks"),
        ({"vocab_size": 512}, r"embed_tokens.weight of size \[300, 32\]; expected \[512, 32\], as its config says"),
        ({"hidden_act": "martian"}, "KeyError: 'martian'"),
        ({"layer_types": ["a"]}, "`layer_types` entries must be in"),
    ],
    ids=lambda x: str(x)[:24],
)
@pytest.mark.filterwarnings("error")
def test_a_config_that_does_not_hold_is_said_in_one_line(tmp_path, capfd, changes, said):
    build("Llama", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    capfd.readouterr()
    with pytest.raises(InputError, match=said) as error:
        cut_model(tmp_path, [1])
    assert "\n" not in str(error.value) and "; fix: " in str(error.value)
    assert "".join(capfd.readouterr()) == ""  # the library's own words are kept back


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (lambda path: torch.save({"a": Evil()}, path), "its pickled weights ask for posix.system"),
        (lambda path: path.write_bytes(pickle.dumps({"a": Evil()})), "its pickled weights ask for more than tensors"),
        (lambda path: path.write_bytes(b"garbage" * 99), "its pickled weights ask for more than tensors"),
        (lambda path: path.write_bytes(b""), "EOFError"),
    ],
    ids=["foreign global", "old pickle", "garbage", "empty"],
)
def test_pickled_weights_are_refused_in_one_line(tmp_path, capfd, write, said):
    build("Llama", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    write(tmp_path / "pytorch_model.bin")
    capfd.readouterr()
    with pytest.raises(InputError, match=said) as error:
        cut_model(tmp_path, [1])
    assert "weights_only" not in str(error.value) and "\n" not in str(error.value)
    assert "".join(capfd.readouterr()) == ""


def test_pickled_tensors_load(tmp_path):
    """Negative control."""
    build("Llama", tmp_path)
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    expected = outputs(cut_model(tmp_path, [1]), [1])[1]
    (tmp_path / "model.safetensors").unlink()
    assert torch.equal(outputs(cut_model(tmp_path, [1]), [1])[1], expected)


@pytest.mark.parametrize("device", ["meta", "xpu:0", "nowhere"])
def test_a_device_that_computes_nothing(model_dir, device):
    with pytest.raises(InputError, match="--device_map"):
        load_backbone(model_dir, [1], "float32", device_map=device)


def test_no_such_folder(tmp_path):
    with pytest.raises(InputError, match="nowhere"):
        cut_model(str(tmp_path / "nowhere"), [0])


def test_slow_tokenizer(tmp_path):
    from transformers import ByT5Tokenizer, LlamaConfig

    LlamaConfig(**SIZES).save_pretrained(tmp_path)
    with pytest.raises(InputError):
        load_tokenizer(str(tmp_path))  # no tokenizer at all
    ByT5Tokenizer().save_pretrained(tmp_path)
    with pytest.raises(InputError, match="ByT5Tokenizer, which has no offset mapping; expected a fast tokenizer"):
        load_tokenizer(str(tmp_path))


def test_fast_tokenizer(model_dir, tokenizer):
    loaded = load_tokenizer(model_dir)
    text = "wait no. é\n\nthen"
    names = {"return_offsets_mapping": True}
    assert loaded(text, **names)["input_ids"] == tokenizer(text, **names)["input_ids"]
    assert loaded(text, **names)["offset_mapping"] == tokenizer(text, **names)["offset_mapping"]
    assert loaded.bos_token_id == 0
    assert make_tokenizer()(text)["input_ids"] == tokenizer(text)["input_ids"]  # training it is deterministic


# --- numbers ---


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_named_dtype(name):
    assert pick_dtype(name) is getattr(torch, name)


@pytest.mark.parametrize(
    ("cuda", "native", "expected"),
    [
        (True, True, torch.bfloat16),
        (True, False, torch.float32),
        (False, {"avx512_bf16": True}, torch.bfloat16),
        (False, {"avx512_bf16": False, "amx_bf16": True}, torch.bfloat16),
        (False, {"bf16": True}, torch.bfloat16),
        (False, {"avx2": True, "avx512_bf16": False}, torch.float32),
        (False, {}, torch.float32),
    ],
)
def test_auto_dtype_is_what_the_hardware_multiplies(monkeypatch, cuda, native, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: native or including_emulation)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: native, raising=False)
    assert pick_dtype("auto") is expected


# --- the list of blocks ---


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


# --- quantization ---


@pytest.fixture(scope="module")
def wide_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Wide enough for one block of 64 weights a row, which is what 4 bits share a scale over."""
    path = tmp_path_factory.mktemp("wide")
    wide = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "initializer_range": 0.05}
    build("Llama", path, **wide)
    return str(path)


def relative(a: dict[int, Tensor], b: dict[int, Tensor]) -> float:
    """The largest distance of a layer's activations, in units of the norm of b's."""
    return max(float((a[k] - b[k]).norm() / b[k].norm()) for k in b)


def quantized(folder: str, bits: str) -> nn.Module:
    pytest.importorskip("bitsandbytes")
    return cut_model(folder, [2], quantization=bits)


LINEAR = 7  # matrices in a Llama block


def test_4bit(wide_folder):
    """Equal to the float model whose matrices were rounded to NF4 by hand, and that is near the float model."""
    import bitsandbytes as bnb

    model = quantized(wide_folder, "4bit")
    matrices = {name: m for name, m in model.named_modules() if isinstance(m, bnb.nn.Linear4bit)}
    assert len(matrices) == 3 * LINEAR
    reference = cut_model(wide_folder, [2])
    plain = outputs(reference, [0, 2])
    for name in matrices:
        weight = reference.get_submodule(name).weight
        rounded = nf4(weight)
        assert float((rounded - weight).norm() / weight.norm()) < 0.12  # NF4 on normal weights, blocks of 64: 0.09
        weight.data = rounded
    by_hand = outputs(reference, [0, 2])
    in_bfloat16 = bnb.functional.has_avx512bf16()  # there bitsandbytes multiplies in bfloat16, whatever it is asked for
    limit = 2**-6 if in_bfloat16 else 1e-5
    assert relative(outputs(model, [0, 2]), by_hand) < limit
    assert limit < relative(by_hand, plain)  # negative control: rounding to NF4 is seen


def nf4(weight: Tensor) -> Tensor:
    """Each block of 64 weights, divided by its largest, rounded to the nearest of NF4's 16 levels."""
    levels = torch.tensor(NF4)
    blocks = weight.reshape(-1, 64)
    scale = blocks.abs().amax(1, keepdim=True)
    nearest = (blocks / scale)[..., None].sub(levels).abs().argmin(-1)
    return (levels[nearest] * scale).reshape(weight.shape)


NF4 = [  # Dettmers et al. 2023 (QLoRA), appendix E
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip


def int8(x: Tensor) -> Tensor:
    """Each row rounded to 127 steps of either sign, the largest of which is its largest number."""
    x = x.half().float()
    largest = x.abs().amax(-1, keepdim=True)
    return (x * (127 / largest)).round() * largest / 127


def test_8bit(wide_folder):
    """Each matrix multiplies rounded activations by rounded weights; that is near the float model.

    What one matrix computes equals the product by hand, but for the 1/127^2 that bitsandbytes wrote with five correct
    digits.  In the whole model such a difference now and then moves a number to the next of its 127 steps, so there
    the two are only nearer to each other than to the float model.
    """
    import bitsandbytes as bnb

    model = quantized(wide_folder, "8bit")
    matrices = {name: m for name, m in model.named_modules() if isinstance(m, bnb.nn.Linear8bitLt)}
    assert len(matrices) == 3 * LINEAR
    reference = cut_model(wide_folder, [2])
    plain, got = outputs(reference, [0, 2]), outputs(model, [0, 2])
    generator = torch.Generator().manual_seed(0)
    for name, matrix in matrices.items():
        linear = reference.get_submodule(name)
        x = torch.randn(20, linear.in_features, generator=generator)
        by_hand = int8(x) @ int8(linear.weight).T
        assert float((matrix(x) - by_hand).norm() / by_hand.norm()) < 1e-4
        assert float((linear(x) - by_hand).norm() / by_hand.norm()) > 1e-3  # negative control: rounding is seen
        linear.register_forward_hook(lambda m, args, _: int8(args[0]) @ int8(m.weight).T)
    rounded = outputs(reference, [0, 2])
    assert relative(got, rounded) < relative(rounded, plain)
    assert relative(got, plain) < 1.5 * relative(rounded, plain) < 0.05


# --- how much memory the weights take ---


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
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=128256,
    ).save_pretrained(tmp_path)  # fmt: skip
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


# --- hooks ---


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
    with pytest.raises(AttributeError), tap({1: blocks[1], 2: None}):  # type: ignore[dict-item]  # while entering
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
    with tap({"any key": block}) as taken:  # type: ignore[dict-item]
        returned = block(x)
        got = taken["any key"]  # type: ignore[index]
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
        read(model, ids, torch.ones_like(ids), blocks[1])
        assert ran == [0, 1] and torch.equal(taken[1], expected)
    assert n_hooks(model) == before
    ran.clear()
    read(model, ids, torch.ones_like(ids))
    assert ran == [0, 1, 2, 3]  # negative control
    with pytest.raises(InputError, match="^a LlamaModel, which cannot read a text of 24 tokens alone .IndexError"):
        read(model, ids + 10_000, torch.ones_like(ids), blocks[1])
    assert n_hooks(model) == before


def test_a_lack_of_memory_is_no_fault_of_the_model(model_dir):
    model, ids = full_model(model_dir), token_ids()
    for error in (torch.OutOfMemoryError("out of memory"), RuntimeError("not enough memory: you tried to allocate")):

        def fail(*_: Any, error: Exception = error) -> None:
            raise error

        handle = model.register_forward_pre_hook(fail)
        with pytest.raises(type(error)) as raised:
            read(model, ids, torch.ones_like(ids))
        assert not isinstance(raised.value, InputError)
        handle.remove()


def test_folders_can_be_moved(model_dir, tmp_path):
    """Nothing but the folder is read."""
    shutil.copytree(model_dir, tmp_path / "copy")
    a, b = (cut_model(str(path), [1]) for path in (model_dir, tmp_path / "copy"))
    assert torch.equal(outputs(a, [1])[1], outputs(b, [1])[1])


@pytest.mark.parametrize("damage", ["cut", "other sizes"])
def test_damaged_weights(tmp_path, damage):
    build("Llama", tmp_path)
    path = tmp_path / "model.safetensors"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:1000])
    else:
        weights = load_file(path)
        weights["model.layers.0.mlp.up_proj.weight"] = torch.zeros(3, 3)
        save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(InputError):
        cut_model(tmp_path, [0])
