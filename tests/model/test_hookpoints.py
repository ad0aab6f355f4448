"""Patterns over the names of modules, and TransformerLens' names of hooks, become places, or end in a line."""

import pytest
import torch
from tiny_models import SIZES, tiny_config
from transformers import AutoModel, LlamaConfig, LlamaModel

from streamprobe.errors import InputError
from streamprobe.model.hookpoints import expand, resolve_places
from streamprobe.model.points import Place

N = 6


def build() -> LlamaModel:
    with torch.device("meta"):
        return LlamaModel(LlamaConfig(**SIZES))


def never() -> LlamaModel:
    raise AssertionError("a model that nobody needs")


def names(*patterns: str) -> list[str]:
    """The places of patterns, as layer and point."""
    return [f"{place.layer} {place.point}" for place in resolve_places([], [], patterns, N, build=build)]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("layers.3.mlp.down_proj", ["3 mlp.down_proj"]),
        ("model.layers.3.mlp.down_proj", ["3 mlp.down_proj"]),
        ("*.layers.{1,4}.mlp.down_proj", ["1 mlp.down_proj", "4 mlp.down_proj"]),
        ("layers.[0-2].mlp", ["0 mlp", "1 mlp", "2 mlp"]),
        ("model.layers.*.self_attn.q_proj", [f"{i} self_attn.q_proj" for i in range(N)]),
        ("layers.2.self_attn.{q,k}_proj", ["2 self_attn.q_proj", "2 self_attn.k_proj"]),
        ("layers.2", ["2 resid_post"]),
        ("blocks.5.hook_resid_post", ["5 resid_post"]),
        ("blocks.{0,5}.hook_attn_out", ["0 attn_out", "5 attn_out"]),
        ("blocks.*.hook_mlp_out", [f"{i} mlp_out" for i in range(N)]),
        ("blocks.0.hook_resid_mid", ["0 resid_mid"]),
    ],
)
def test_a_pattern_names_places(pattern: str, expected: list[str]) -> None:
    assert names(pattern) == expected


def test_places_stand_point_by_point_and_once() -> None:
    both = ["blocks.2.hook_attn_out", "layers.1.mlp", "blocks.{0,2}.hook_attn_out", "layers.0.mlp"]
    found = resolve_places(["resid_post", "attn_out"], [1, 2], both, N, build=build)
    assert [(place.point, place.layer) for place in found] == [
        *(("resid_post", i) for i in (1, 2)),
        *(("attn_out", i) for i in (0, 1, 2)),
        *(("mlp", i) for i in (0, 1)),
    ]
    assert found[-1] == Place(1, "mlp", "layers.1.mlp") and {place.path for place in found[:-2]} == {""}


def test_no_model_is_built_for_points() -> None:
    assert len(resolve_places(["resid_pre"], [0, 1], ["blocks.1.hook_mlp_out"], N, build=never)) == 3
    with pytest.raises(AssertionError, match="nobody needs"):  # negative control
        resolve_places([], [], ["layers.0.mlp"], N, build=never)


def test_the_text_blocks_of_a_model_that_sees_are_meant() -> None:
    with torch.device("meta"):
        model = AutoModel.from_config(tiny_config("gemma3"))
    found = resolve_places([], [], ["*.layers.1.self_attn.q_proj"], 4, build=lambda: model)
    assert found == [Place(1, "self_attn.q_proj", "language_model.layers.1.self_attn.q_proj")]


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        (
            "layers.9.mlp",
            r"^hookpoints layers.9.mlp, which matches no module of the model; expected such as layers\.\*\.mlp",
        ),
        ("*.mlp.down_prj", r"which matches no module of the model; expected such as layers\.\*\.mlp\.down_proj"),
        ("layers.2.mlp.", "which matches no module"),
        ("embed_tokens", "which matches embed_tokens, in no decoder block; .* resid_pre of layer 0"),
        ("norm", "which matches norm, in no decoder block"),
        ("blocks.9.hook_attn_out", "^hookpoints blocks.9.hook_attn_out; expected blocks from 0 to 5"),
        ("blocks.2.hook_nope", "^hookpoints blocks.2.hook_nope; expected blocks.N. with one of hook_resid_pre, "),
        ("blocks.2.attn.hook_z", "^hookpoints blocks.2.attn.hook_z; expected blocks.N. with one of"),
        ("hook_embed", "^hookpoints hook_embed; expected blocks.N. with one of"),
        ("layers." + "{0,1}" * 20, "braces for at most 10,000 names"),
    ],
)
def test_a_pattern_that_names_none_is_one_line(pattern: str, said: str) -> None:
    with pytest.raises(InputError, match=said) as refused:
        names(pattern)
    assert "\n" not in str(refused.value)


def test_braces() -> None:
    assert expand("a{b,c}d{e,f}") == ["abde", "abdf", "acde", "acdf"]
    assert expand("plain[ab]*") == ["plain[ab]*"]
