"""What is read at a place of a block is what an own hook on the plain model sees, bit for bit, or it is refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import save_tiny, tiny_config
from torch import Tensor, nn
from transformers import AutoModel

from streamprobe.activations.stream import forward
from streamprobe.errors import InputError
from streamprobe.model.backbone import load_backbone
from streamprobe.model.blocks import decoder_layers
from streamprobe.model.finding import Step, find_taps, solve, trace_of
from streamprobe.model.hooks import check_taken, read, tap
from streamprobe.model.points import Place
from streamprobe.model.trial import check_places, find_places

WORDS = list(range(3, 50))
CHAINS = [torch.arange(3, 15), torch.arange(5, 17)]
LAYERS = [0, 2]
SITES = ("resid_pre", "attn_out", "mlp_out", "resid_post")
Added = tuple[str, str, float]  # modules of a block that give what attention and MLP add, and times what

FAMILIES: dict[str, Added] = {
    "llama": ("self_attn", "mlp", 1.0),
    "qwen3": ("self_attn", "mlp", 1.0),
    "gpt2": ("attn", "mlp", 1.0),
    "opt": ("self_attn", "fc2", 1.0),
    "bloom": ("self_attention.dense", "mlp.dense_4h_to_h", 1.0),
    "gemma2": ("post_attention_layernorm", "post_feedforward_layernorm", 1.0),
    "olmo2": ("post_attention_layernorm", "post_feedforward_layernorm", 1.0),
    "glm4": ("post_self_attn_layernorm", "post_mlp_layernorm", 1.0),
    "gpt_neox": ("attention", "mlp", 1.0),
    "phi": ("self_attn", "mlp", 1.0),
    "cohere": ("self_attn", "mlp", 1.0),
    "mixtral": ("self_attn", "mlp", 1.0),
    "qwen3_moe": ("self_attn", "mlp", 1.0),
    "gpt_oss": ("self_attn", "mlp", 1.0),
    "deepseek_v3": ("self_attn", "mlp", 1.0),
    "dbrx": ("norm_attn_norm.attn", "ffn", 1.0),
    "granite": ("self_attn", "mlp", 0.22),
    "minicpm3": ("self_attn", "mlp", 1.4 / 4**0.5),
}
CHANGES: dict[str, dict[str, Any]] = {"granite": {"residual_multiplier": 0.22}}


def alive(model: Any) -> Any:
    """The model with norms that do something: those of a new one multiply by 1."""
    random = torch.Generator().manual_seed(1)
    for p in model.parameters():
        if p.dim() == 1:
            p.data += 0.2 * torch.randn(p.shape, generator=random)
    return model


def make(name: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    return alive(AutoModel.from_config(tiny_config(name, **CHANGES.get(name, {}) | changes)).float().eval())


@torch.no_grad()
def outputs(model: Any, ids: Tensor, modules: dict[Any, nn.Module], **options: Any) -> dict[Any, Tensor]:
    """What these modules return, by hooks of this test's own; copies."""
    seen: dict[Any, Tensor] = {}

    def keep(key: Any) -> Callable[..., None]:
        return lambda _module, _given, output: seen.update(
            {key: (output[0] if isinstance(output, tuple | list) else output).clone()}
        )

    handles = [module.register_forward_hook(keep(key)) for key, module in modules.items()]
    states = model(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states
    for handle in handles:
        handle.remove()
    return seen | {f"state{i}": state for i, state in enumerate(states)}


def taken_at(model: Any, places: list[Place]) -> dict[Place, Tensor]:
    """What a run reads there."""
    taps = find_places(model, places, WORDS)
    with tap(taps.hooks) as taken:
        forward(model, CHAINS, last=taps.last)
        return dict(zip(places, check_taken(taken, places, 2, 12), strict=True))


@pytest.mark.parametrize("name", FAMILIES)
def test_sites_are_what_an_own_hook_sees(name: str, tmp_path: Any) -> None:
    attention, mlp, factor = FAMILIES[name]
    make(name).save_pretrained(tmp_path)
    whole = AutoModel.from_pretrained(tmp_path, dtype=torch.float32).eval()
    blocks = decoder_layers(whole)
    modules = {(i, part): blocks[i].get_submodule(part) for i in LAYERS for part in (attention, mlp)}
    seen = outputs(whole, torch.stack(CHAINS), modules)
    cut = load_backbone(str(tmp_path), LAYERS, "float32", device_map="cpu")
    got = taken_at(cut, [Place(i, point) for i in LAYERS for point in SITES])
    for i in LAYERS:
        assert torch.equal(got[Place(i, "resid_pre")], seen[f"state{i}"])
        assert torch.equal(got[Place(i, "resid_post")], seen[f"state{i + 1}"])
        assert torch.equal(got[Place(i, "attn_out")], seen[i, attention] * factor)
        assert torch.equal(got[Place(i, "mlp_out")], seen[i, mlp].view(2, 12, -1) * factor)
        parts = [got[Place(i, point)] for point in SITES]
        torch.testing.assert_close(sum(parts[:3]), parts[3], rtol=0, atol=1e-5 * float(parts[3].abs().max()))
        assert not torch.equal(parts[1], parts[2])  # negative control


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_neox", "granite"])
def test_they_are_found_in_half_precision(name: str, dtype: torch.dtype) -> None:
    model = make(name).to(dtype)
    attention, mlp, factor = FAMILIES[name]
    hooks = find_places(model, [Place(1, "attn_out"), Place(1, "mlp_out")], WORDS).hooks
    block = decoder_layers(model)[1]
    assert [hook.module for hook in hooks.values()] == [block.get_submodule(attention), block.get_submodule(mlp)]
    assert {hook.factor for hook in hooks.values()} == {factor}


def test_the_factor_of_granite_fails_without_the_config_that_names_it() -> None:
    """0.22 is what makes it add up: with weights that were trained for another one nothing does."""
    model = make("granite")
    for block in model.layers:
        block.residual_multiplier = 0.37  # and not what the config says
    assert {hook.factor for hook in find_places(model, [Place(1, "attn_out")], WORDS).hooks.values()} == {0.37}
    for block in model.layers:
        block.residual_multiplier = torch.tensor(0.41)  # which nothing names
    with pytest.raises(InputError, match="^attn_out of layer 1, a GraniteDecoderLayer, in which no module's output"):
        find_places(model, [Place(1, "attn_out")], WORDS)


def test_the_stream_between_both_is_what_enters_the_second_norm() -> None:
    model = make("llama")
    seen: list[Tensor] = []
    model.layers[1].post_attention_layernorm.register_forward_pre_hook(lambda _module, given: seen.append(given[0]))
    got = taken_at(model, [Place(1, "resid_mid"), Place(1, "resid_pre"), Place(1, "attn_out")])
    mid, before, added = got.values()
    assert torch.equal(mid, seen[-1]) and torch.equal(mid, before + added)
    with pytest.raises(InputError, match="^resid_mid of layer 1, a GPTNeoXLayer, in which nothing reads the stream"):
        find_places(make("gpt_neox"), [Place(1, "resid_mid")], WORDS)


HYBRID = {  # layers that have an attention, and an MLP, as numbers of a string
    "jamba": ("", "0123"),
    "recurrent_gemma": ("2", "0123"),
    "qwen3_next": ("0123", "0123"),
    "lfm2_moe": ("13", "0123"),
    "nemotron_h": ("2", "13"),
    "mamba2": ("", ""),
    "granitemoeshared": ("0123", ""),
    "falcon_h1": ("", ""),
    "minimax": ("", ""),
    "doge": ("", ""),
    "axk2": ("0123", "0123"),
}


@pytest.mark.parametrize("name", HYBRID)
def test_a_block_without_the_place_is_refused(name: str) -> None:
    model = make(name)
    for point, layers in zip(("attn_out", "mlp_out"), HYBRID[name], strict=True):
        for layer in range(4):
            if str(layer) in layers:
                find_places(model, [Place(layer, point)], WORDS)
                continue
            with pytest.raises(InputError, match=f"^{point} of layer {layer}, a \\w+, ") as refused:
                find_places(model, [Place(layer, point)], WORDS)
            assert "\n" not in str(refused.value) and "fix: " in str(refused.value)


def test_a_block_of_two_states_is_refused() -> None:
    with pytest.raises(InputError, match="^attn_out of layer 0, a BertLayer, in which no module's output"):
        find_places(make("bert", is_decoder=True), [Place(0, "mlp_out"), Place(0, "attn_out")][::-1], WORDS)


def test_of_a_block_that_normalises_the_stream_what_attention_adds_to_what_enters_is_read() -> None:
    """And nothing behind: there is no stream to which its MLP would add."""
    model = make("openai-gpt")
    seen = outputs(model, torch.stack(CHAINS), {"attn": model.h[1].attn})
    got = taken_at(model, [Place(1, point) for point in ("resid_pre", "attn_out", "resid_mid")])
    before, added, between = got.values()
    assert torch.equal(added, seen["attn"]) and torch.equal(between, before + added)
    with pytest.raises(InputError, match="^mlp_out of layer 1, a Block, in which no module's output"):
        find_places(model, [Place(1, "mlp_out")], WORDS)


class InPlace(nn.Module):
    """A block that goes on to change what its parts return."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attn, self.mlp = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.self_attn(x).add_(x)
        return self.mlp(x).add_(x)


def test_what_a_block_changes_in_place_is_read_as_it_was() -> None:
    block, x = InPlace(), torch.randn(1, 5, 8)
    with torch.no_grad(), tap({"in": block}) as taken:
        from streamprobe.model.taps import Hook

        expected = block.self_attn(x)
        with tap({"attn_out": Hook(block.self_attn)}) as added:
            block(x)
            assert torch.equal(added["attn_out"], expected) and "in" in taken
        with tap({"attn_out": block.self_attn}) as added:  # negative control: a block's own output is not copied
            block(x)
            assert not torch.equal(added["attn_out"], expected)


def steps_of(*given: tuple[str, nn.Module, bool, Tensor]) -> list[Step]:
    return [Step(*each) for each in given]


def test_a_sum_fails_without_its_parts() -> None:
    """What is found adds up; with another number in one place nothing is."""
    x, a, m = torch.randn(3, 1, 4, 8).unbind()
    block, attention, mlp, norm = nn.Identity(), nn.Linear(8, 8), nn.Linear(8, 8), nn.LayerNorm(8)
    steps = steps_of(
        ("", block, True, x),
        ("self_attn", attention, False, a),
        ("norm", norm, True, x + a),
        ("mlp", mlp, False, m),
        ("", block, False, x + a + m),
    )
    trace = trace_of(steps)
    assert trace is not None and solve(trace, [1.0])[1:] == (0, 1, 2)
    steps[3] = steps[3]._replace(value=m + torch.eye(8)[:4] / 100)
    trace = trace_of(steps)
    assert trace is not None and solve(trace, [1.0]).mlp is None
    assert trace_of(steps[1:]) is None


def test_a_module_of_any_width_is_read(tmp_path: Any) -> None:
    save_tiny("llama", str(tmp_path))
    cut = load_backbone(str(tmp_path), LAYERS, "float32", device_map="cpu")
    paths = ("self_attn.k_proj", "mlp.up_proj", "mlp.act_fn")
    places = [Place(i, path) for path in paths for i in LAYERS]
    got = taken_at(cut, places)
    modules = {(i, path): cut.layers[i].get_submodule(path) for path in paths for i in LAYERS}
    seen = outputs(cut, torch.stack(CHAINS), modules)
    assert all(torch.equal(got[place], seen[place.layer, place.point]) for place in places)
    assert check_places(cut, find_places(cut, places, WORDS), WORDS) == [16, 16, 48, 48, 48, 48]


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("nothing.here", "^nothing.here of layer 1; expected a module of that block"),
        ("self_attn.rotary", "^self_attn.rotary of layer 1; "),
    ],
)
def test_a_module_that_is_not_there_is_refused(path: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        find_places(make("llama"), [Place(1, path)], WORDS)


def test_a_module_without_a_row_for_each_token_is_refused() -> None:
    model = make("qwen3")  # its norms of queries return [B, T, heads, size of a head]
    taps = find_places(model, [Place(1, "self_attn.q_norm")], WORDS)
    with pytest.raises(InputError, match=r"^self_attn.q_norm of layer 1, where there is \[5, 23, 4, 8\] for 5 chains"):
        check_places(model, taps, WORDS)


def test_a_router_has_a_row_for_each_token_though_they_are_in_one_list() -> None:
    model = make("llama")
    block = model.layers[1]

    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.mlp = nn.Linear(32, 4), block.mlp

        def forward(self, x: Tensor) -> Tensor:
            self.gate(x.flatten(0, 1))
            return self.mlp(x)

    block.mlp = Flat()
    place = Place(1, "mlp.gate")
    assert check_places(model, find_places(model, [place], WORDS), WORDS) == [4]
    assert taken_at(model, [place])[place].shape == (2, 12, 4)


def test_hooks_are_gone_after_a_search_that_fails() -> None:
    model = make("llama")

    def fail() -> None:
        read(model, torch.arange(3, 9)[None])
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        find_taps(model, [Place(1, "attn_out")], fail)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
