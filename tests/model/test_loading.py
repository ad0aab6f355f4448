"""A model that cannot be loaded is refused in one line that says why."""

import json
import os
import pickle
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from sent_weights import accelerate_plans
from tiny_models import build, cut_model, outputs

from streamprobe.errors import InputError
from streamprobe.model import backbone
from streamprobe.model.backbone import load_backbone


@pytest.mark.parametrize("layers", [[6], [0, 17], [-1]], ids=str)
def test_layer_out_of_range_is_refused_before_the_weights_load(tmp_path, layers):
    build("Llama", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(InputError, match=rf"^layers {layers[-1]}; expected numbers from 0 to 5 .*--layers$"):
        cut_model(str(tmp_path), layers)
    with pytest.raises(InputError, match="model.safetensors"):  # negative control: one that exists gets to the weights
        cut_model(str(tmp_path), [5])


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


def test_no_such_folder(tmp_path):
    with pytest.raises(InputError, match="nowhere"):
        cut_model(str(tmp_path / "nowhere"), [0])


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


def test_the_refusal_of_pickles_fails_without_foreign_objects(tmp_path):
    """Plain tensors load."""
    build("Llama", tmp_path)
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    expected = outputs(cut_model(tmp_path, [1]), [1])[1]
    (tmp_path / "model.safetensors").unlink()
    assert torch.equal(outputs(cut_model(tmp_path, [1]), [1])[1], expected)


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


@pytest.mark.parametrize("device", ["meta", "xpu:0", "nowhere"])
def test_a_device_that_computes_nothing(model_dir, device):
    with pytest.raises(InputError, match="--device_map"):
        load_backbone(model_dir, [1], "float32", device_map=device)


# --- where accelerate lays a model ---

PLACES = ("embed_tokens", "norm", "rotary_emb", "layers.0", "layers.1")


def test_blocks_on_the_disk_are_refused(tmp_path):
    build("Llama", tmp_path)
    in_ram = dict.fromkeys(PLACES, "cpu:0") | {"layers.1": "cpu"}
    with accelerate_plans(in_ram):
        assert load_backbone(str(tmp_path), [1], "float32").hf_device_map == in_ram  # negative control
    with (
        accelerate_plans(in_ram | {"layers.1": "disk"}),
        pytest.raises(InputError, match="each forward pass would read it from the disk; expected .*larger device$"),
    ):
        load_backbone(str(tmp_path), [1], "float32")


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_quantized_blocks_are_not_left_in_ram(tmp_path, monkeypatch, bits):
    pytest.importorskip("bitsandbytes")
    build("Llama", tmp_path, hidden_size=64, intermediate_size=128, head_dim=16)
    planned = dict.fromkeys(PLACES, "cpu")
    monkeypatch.setattr("transformers.integrations.accelerate.infer_auto_device_map", lambda *_, **__: planned)
    load_backbone(str(tmp_path), [1], "float32", quantization=bits)  # negative control: a machine without a device
    planned |= {"embed_tokens": 0, "layers.0": 0}
    with pytest.raises(
        InputError, match="whose quantized blocks do not all fit into device memory; .*--quantization none$"
    ):
        load_backbone(str(tmp_path), [1], "float32", quantization=bits)


@pytest.mark.parametrize(
    ("device_map", "cuda", "free", "refused"),
    [
        ("cpu", 1000, 10, True),
        ("cpu", 0, 1000, False),
        ("auto", 0, 10, True),
        ("auto", 10, 10, True),
        ("auto", 1000, 10, False),  # the devices have room
        ("balanced", 10, 1000, False),  # the host has it
        ("cuda:0", 10, 10, False),  # torch says so itself
    ],
)
def test_room_for_the_weights_is_looked_for_wherever_they_may_lie(
    tmp_path, monkeypatch, device_map, cuda, free, refused
):
    """In kB; the blocks take 187."""
    build("Llama", tmp_path)
    empty = backbone.build_empty(backbone.read_config(str(tmp_path)), torch.float32)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(backbone, "free_bytes", lambda device: 1000 * (cuda if device.type == "cuda" else free))
    with pytest.raises(InputError, match="0.00 GB of memory that are free") if refused else nullcontext():
        backbone._check_room("tiny", empty, 4, {"device_map": device_map})
