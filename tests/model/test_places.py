"""Models that lie on several devices, or wait in RAM: what the taps read, and what is left where."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from fake_device import DEVICE, aside, fake_cuda
from sent_weights import Sent, accelerate_plans
from tiny_models import build, cut_model, outputs, save_tiny, token_ids
from torch import Tensor, nn

from streamprobe.activations.stream import forward, stream
from streamprobe.controls.embedding import EmbeddingLayers
from streamprobe.controls.table import CONTROLS
from streamprobe.data.tokenize import Chain
from streamprobe.errors import InputError
from streamprobe.lags import Column
from streamprobe.model import hooks
from streamprobe.model.backbone import load_backbone
from streamprobe.model.blocks import decoder_layers
from streamprobe.model.chunks import make_cache
from streamprobe.model.hooks import read, steer, tap
from streamprobe.model.places import describe_places, every_tensor, main_device, place_of
from streamprobe.model.sizes import loaded_bytes
from streamprobe.model.trial import check_reading
from streamprobe.run.provenance import model_fingerprint

LAYERS = [0, 2, 4]
WANTED = {name: control.embedded for name, control in CONTROLS.items() if control.embedded}
WAITING = "cpu (sent to cpu for each batch)"
KINDS = ["Llama", "Qwen3", "Gemma3"]


def plan_for(waiting: range, blocks: int = 5) -> dict[str, str]:
    """Where accelerate is made to lay a model: these blocks in RAM."""
    rest = dict.fromkeys(("embed_tokens", "norm", "rotary_emb"), "cpu:0")
    return rest | {f"layers.{i}": "cpu" if i in waiting else "cpu:0" for i in range(blocks)}


def chains() -> list[Chain]:
    made = []
    for n in (12, 20, 7):
        codes = torch.zeros(n, 1, dtype=torch.int8)
        made.append(Chain(f"x_{n}", token_ids(n)[0, :n], codes, torch.ones(n, dtype=torch.bool)))
    return made


def streamed(model: nn.Module, embedded: Any = None, max_tokens: int = 100) -> Tensor:
    """Activations [N, L, D] as a run gets them."""
    columns, options = [Column("x", "token", 0)], {"labels": ["x"], "max_batch_tokens": max_tokens}
    batches = stream(chains(), model, LAYERS, columns, embedded=embedded, **options)  # type: ignore[arg-type]
    return torch.cat([batch.acts for batch in batches])


@pytest.fixture(params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return build(request.param, tmp_path)


def load_sent(folder: str, waiting: range, layers: list[int] = LAYERS) -> tuple[Any, Sent]:
    with accelerate_plans(plan_for(waiting, max(layers) + 1)) as sent:
        return load_backbone(folder, layers, "float32"), sent


def test_blocks_that_wait_in_ram_are_read_as_if_they_lay_on_the_device(folder: str) -> None:
    """Also in chunks, and through taps and changes of the last block, behind which a forward pass ends."""
    plain, (model, sent) = cut_model(folder, LAYERS), load_sent(folder, range(2, 5))
    assert [place_of(block) for block in decoder_layers(model)] == ["cpu"] * 2 + [WAITING] * 3
    assert check_reading(model, LAYERS, range(3, 60), chunked=True) == 32
    assert torch.equal(streamed(model), streamed(plain))
    assert torch.equal(streamed(model, max_tokens=6), streamed(plain, max_tokens=6))
    with steer(model.layers[4], torch.ones(32)), steer(plain.layers[4], torch.ones(32)):
        assert torch.equal(streamed(model), streamed(plain))
    assert torch.equal(outputs(model, [4])[4], outputs(plain, [4])[4])  # to the end of the model
    assert sent.alive() == 0 < len(sent.copies)


def test_weights_wait_in_ram_again_after_every_forward_pass(folder: str) -> None:
    model, sent = load_sent(folder, range(1, 5))
    blocks = decoder_layers(model)
    for i in range(4):
        before = len(sent.copies)
        with tap({4: blocks[4]}):
            read(model, token_ids(i), last=blocks[4])
        assert sent.alive() == 0 and len(sent.copies) - before == 4 * len(list(blocks[2].parameters()))
        assert all(weight.is_meta for block in blocks[1:] for weight in block.parameters())

    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("out of memory")

    handle = blocks[3].mlp.register_forward_hook(fail)
    with pytest.raises(torch.OutOfMemoryError):
        read(model, token_ids(), last=blocks[4])
    handle.remove()
    assert sent.alive() == 0


def test_the_count_of_sent_weights_fails_without_their_return(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, sent = load_sent(folder, range(1, 5))
    monkeypatch.setattr("accelerate.hooks.AlignDevicesHook.post_forward", lambda hook, module, output: output)
    read(model, token_ids(), last=decoder_layers(model)[4])
    assert sent.alive() == 4 * len(list(model.layers[2].parameters()))


@pytest.mark.parametrize("mended", [True, False], ids=["", "fails without putting back"])
def test_weights_around_the_blocks_wait_in_ram_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mended: bool
) -> None:
    """A forward pass that ends by an exception leaves the module that has the blocks, whose own weights were sent."""
    if not mended:
        monkeypatch.setattr(hooks, "put_back", lambda *_: None)
    save_tiny("zaya", str(tmp_path))
    model = load_backbone(str(tmp_path), [1], "float32", device_map="cpu")
    own = dict(model.named_parameters(recurse=False))
    assert own  # of the model itself
    cpu_offload(model, torch.device("cpu"))
    read(model, torch.arange(3, 20)[None], last=decoder_layers(model)[1])
    assert [name for name, weight in model.named_parameters() if not weight.is_meta] == ([] if mended else list(own))


def test_what_a_model_is_does_not_depend_on_where_it_lies(folder: str) -> None:
    plain, (model, _) = cut_model(folder, LAYERS), load_sent(folder, range(1, 5))
    assert model_fingerprint(model) == model_fingerprint(plain)
    assert loaded_bytes(model) == loaded_bytes(plain)
    tensors, expected = every_tensor(model), plain.state_dict()
    assert tensors.keys() == expected.keys() and all(torch.equal(tensors[name], expected[name]) for name in expected)
    assert any(tensor.is_meta for tensor in model.state_dict().values())  # negative control


def test_a_model_that_waits_in_ram_as_a_whole_has_a_device(folder: str) -> None:
    """Its own `device` is none that token ids could be sent to."""
    model = cut_model(folder, LAYERS)
    ids = torch.cat([chain.ids for chain in chains()])
    expected = streamed(model, EmbeddingLayers.fitted(model.get_input_embeddings(), ids, 32, WANTED))
    cpu_offload(model, torch.device("cpu"))
    assert model.device.type == "meta" and main_device(model).type == "cpu"
    embedded = EmbeddingLayers.fitted(model.get_input_embeddings(), ids, 32, WANTED)
    assert torch.equal(streamed(model, embedded), expected)
    with tap({2: model.layers[2]}) as taken:
        forward(model, [token_ids()[0]], make_cache(model.config), model.layers[2])
        assert not taken[2].is_meta


def spread(model: nn.Module) -> nn.Module:
    """The model with its first two blocks on the CPU and the others, and the embedding, on the pretended device."""
    rest = dict.fromkeys(("embed_tokens", "norm", "rotary_emb", "layers.2", "layers.3", "layers.4"), str(DEVICE))
    return dispatch_model(model, {**rest, "layers.0": "cpu", "layers.1": "cpu"}, main_device="cpu")


def test_layers_on_several_devices_are_gathered_on_the_main_one(folder: str) -> None:
    expected = streamed(cut_model(folder, LAYERS, attn_implementation="eager"))
    with fake_cuda():
        with aside():
            model = cut_model(folder, LAYERS, attn_implementation="eager")
        spread(model)
        assert describe_places(model) == "blocks 0-1 on cpu, 2-4 on cuda:0" and main_device(model) == DEVICE
        with tap({layer: decoder_layers(model)[layer] for layer in LAYERS}) as taken:
            read(model, token_ids().to(DEVICE), last=decoder_layers(model)[4])
            assert [taken[layer].device.type for layer in LAYERS] == ["cpu", "cuda", "cuda"]  # negative control
        assert check_reading(model, LAYERS, range(3, 60)) == 32
        acts = streamed(model)
        assert acts.device == DEVICE and torch.equal(acts.cpu(), expected)


def test_blocks_are_listed_by_where_they_lie(folder: str) -> None:
    model = cut_model(folder, LAYERS)
    assert describe_places(model) == ""  # negative control: one device
    model.layers[3].to("meta")
    assert describe_places(model) == "blocks 0-2 on cpu, 3 on meta, 4 on cpu"
    model.layers[4].mlp.to("meta")
    assert describe_places(model) == "blocks 0-2 on cpu, 3 on meta, 4 on cpu and meta"
    sent, _ = load_sent(folder, range(1, 5))
    assert describe_places(sent) == f"blocks 0 on cpu, 1-4 on {WAITING}"


def test_a_model_that_cannot_be_sent_block_by_block_is_refused(tmp_path: Path) -> None:
    """It uses a weight of a module that it does not call."""
    save_tiny("jetmoe", str(tmp_path))
    model = load_backbone(str(tmp_path), [1], "float32", device_map="cpu")
    assert check_reading(model, [1], range(3, 60)) == 32  # negative control
    cpu_offload(model, torch.device("cpu"))
    with pytest.raises(
        InputError, match="^a JetMoeModel, which cannot read .* or all of it on devices; fix: .*larger device$"
    ):
        check_reading(model, [1], range(3, 60))
