"""The cut-off model computes what the full one does, also quantized, from GGUF and from code of its own."""

import json
import shutil
from typing import Any

import pytest
import torch
from gguf_files import NAME, save_gguf
from tiny_models import LAYER_TYPES, WINDOW, build, cut_model, full_model, hidden_states, outputs, token_ids
from torch import Tensor, nn

from streamprobe.errors import InputError
from streamprobe.model import backbone
from streamprobe.model.backbone import load_backbone, pick_dtype
from streamprobe.model.blocks import decoder_layers
from streamprobe.model.loading import read_config
from streamprobe.model.sizes import loaded_bytes, weight_bytes


@pytest.fixture(scope="module", params=["Llama", "Qwen3", "Gemma3"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A saved tiny model of each architecture."""
    return build(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def wide_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Wide enough for one block of 64 weights a row, which is what 4 bits share a scale over."""
    wide = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "initializer_range": 0.05}
    return build("Llama", tmp_path_factory.mktemp("wide"), **wide)


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
    assert len(decoder_layers(cut)) == 3 and cut.config.layer_types == LAYER_TYPES
    config = read_config(str(tmp_path))
    config.sliding_window = 64
    wide, narrow = outputs(full_model(str(tmp_path), config=config), [0])[0], outputs(cut, [0])[0]
    torch.testing.assert_close(wide[:, :WINDOW], narrow[:, :WINDOW], rtol=0, atol=1e-5)
    assert (wide[:, WINDOW:] - narrow[:, WINDOW:]).abs().amax(-1).min() > 1e-3  # negative control: a wider window


def test_folders_can_be_moved(model_dir, tmp_path):
    """Nothing but the folder is read."""
    shutil.copytree(model_dir, tmp_path / "copy")
    a, b = (cut_model(str(path), [1]) for path in (model_dir, tmp_path / "copy"))
    assert torch.equal(outputs(a, [1])[1], outputs(b, [1])[1])


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
    return save_gguf(tmp_path_factory.mktemp("gguf"))


def test_gguf_is_cut(gguf_folder):
    where = {"gguf_file": NAME}
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
    assert relative(outputs(model, [0, 2]), by_hand) < 1e-5
    assert relative(by_hand, plain) > 1e-5  # negative control: rounding to NF4 is seen


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_quantized_weights_stay_what_they_are_where_their_state_is_read(wide_folder, bits):
    model = quantized(wide_folder, bits)
    before = outputs(model, [0, 2])
    model.state_dict()
    assert relative(outputs(model, [0, 2]), before) == 0


def test_4bit_weights_do_not_stay_what_they_are_without_keeping_their_packing(wide_folder, monkeypatch):
    """Where this holds no longer, bitsandbytes needs no help."""
    bnb = pytest.importorskip("bitsandbytes")
    if not getattr(bnb.functional, "has_avx512bf16", bool)():
        pytest.skip("weights are packed anew on CPUs with AVX512-BF16 alone")
    monkeypatch.setattr(backbone, "_keep_packing", lambda _: None)
    model = quantized(wide_folder, "4bit")
    before = outputs(model, [0, 2])
    model.state_dict()
    assert relative(outputs(model, [0, 2]), before) > 0.1


def nf4(weight: Tensor) -> Tensor:
    """Each block of 64 weights, divided by its largest, rounded to the nearest of NF4's 16 levels."""
    levels = torch.tensor(NF4)
    blocks = weight.reshape(-1, 64)
    scale = blocks.abs().amax(1, keepdim=True)
    nearest = (blocks / scale)[..., None].sub(levels).abs().argmin(-1)
    return (levels[nearest] * scale).reshape(weight.shape)


NF4 = [  # Dettmers et al. 2023 (QLoRA), appendix E
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
]


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
