"""Every model type of transformers is read exactly, or refused in one line."""

import json
import re
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny_models import CAUSAL, CHANGES, TYPES, save_tiny, states, tiny_config
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText

from streamprobe import cli
from streamprobe.activations.stream import forward, stream
from streamprobe.cli import train as main
from streamprobe.data.tokenize import Chain
from streamprobe.errors import InputError
from streamprobe.lags import Column
from streamprobe.model import trial
from streamprobe.model.backbone import load_backbone
from streamprobe.model.blocks import check_layers, decoder_layers
from streamprobe.model.chunks import check_chunks
from streamprobe.model.hooks import check_taken, tap
from streamprobe.model.loading import read_config
from streamprobe.model.sizes import weight_bytes
from streamprobe.model.trial import check_reading

CHAINS = [torch.arange(3, 3 + n) for n in (12, 9, 17)]  # token ids of chains of other lengths
WORDS = list(range(3, 50))

# Types that no tiny model is made of here.
SKIPPED = {
    "fast_vlm": "its vision tower needs timm",
    "gemma3n": "its vision tower needs timm (gemma3n_text is tried)",
    "gemma4_assistant": "its class refuses its own default config (and AutoModel has no class for it)",
    "perception_lm": "its vision tower needs timm",
}
WITHOUT = {  # AutoModel has none of these
    "evolla",
    "gemma4_unified_assistant",
    "nemotron_h_omni",
    "pp_chart2table",
    "shieldgemma2",
    "trocr",
}
SEES_AHEAD = """
    bart bert bert-generation big_bird bigbird_pegasus blenderbot blenderbot-small camembert data2vec-text electra ernie
    florence2 marian mbart megatron-bert musicgen musicgen_melody mvp paligemma pegasus pix2struct plbart pp_formulanet
    prophetnet rembert roberta roberta-prelayernorm roc_bert roformer t5gemma2 udop vision-encoder-decoder whisper xlm
    xlm-roberta xlm-roberta-xl xmod
"""
NO_TEXT = "blip blip-2 idefics instructblip instructblipvideo kosmos-2"
OTHER_SHAPE = "cpmant deepseek_v4 gemma3n_text glm5_next hy_v4 reformer xlnet"
NO_BLOCKS = "blt hrm_text longcat_flash pi0"
NO_CLASS = " ".join(sorted(WITHOUT))
REFUSED = {
    name: reason
    for names, reason in (
        (SEES_AHEAD, "in which a token sees later ones"),
        (NO_TEXT, "which cannot read a text of 23 tokens alone"),
        (
            OTHER_SHAPE,
            r"^layer 0, whose block returns \[.*\] for 5 chains of 23 tokens; expected \[5, 23, hidden size\]",
        ),
        (NO_BLOCKS, "of its (32|8) decoder blocks|names None as the number of its decoder blocks"),
        (NO_CLASS, "Unrecognized configuration class"),
    )
    for name in names.split()
}


@torch.no_grad()
def reference(whole: Any, ids: Tensor, n: int) -> dict[int, Tensor]:
    """What the n blocks of the whole model return for one chain alone, [T, D] each.

    Which list of modules holds the blocks is found by what they return: all but the last one's are the hidden states of
    transformers, before which stands the embedding, or in a few types does not.  The last one is normed there.
    """
    outputs: dict[str, dict[int, Tensor]] = {}

    def keep(name: str, i: int) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple | list) else output
            if isinstance(first, Tensor):
                outputs.setdefault(name, {}).setdefault(i, first[0].clone())

        return hook

    lists = {name: m for name, m in whole.named_modules() if isinstance(m, nn.ModuleList) and len(m) == n}
    handles = [block.register_forward_hook(keep(name, i)) for name, m in lists.items() for i, block in enumerate(m)]
    states = whole(input_ids=ids[None], output_hidden_states=True, use_cache=False).hidden_states
    for handle in handles:
        handle.remove()
    if whole.config.model_type == "diffusion_gemma":  # its states are those of the canvas, not of the text
        return next(found for name, found in outputs.items() if name.startswith("encoder.language_model"))
    for before in (1, 0):
        for found in outputs.values():  # a block that does not run leaves no state
            if all(torch.equal(found[i], states[j + before][0]) for j, i in enumerate(sorted(found)[: n - 2])):
                return found
    raise AssertionError(f"no list of {n} modules returns the hidden states")


def read(model: nn.Module, layers: list[int], max_tokens: int = 1000) -> list[Tensor]:
    """Activations [T, L, D] of each chain, as they are streamed: padded, or in chunks."""
    chains = []
    for i, ids in enumerate(CHAINS):
        codes, support = torch.zeros(len(ids), 1, dtype=torch.int8), torch.ones(len(ids), dtype=torch.bool)
        chains.append(Chain(f"x_{i}", ids, codes, support))
    batches = list(stream(chains, model, layers, [Column("x", "token", 0)], labels=["x"], max_batch_tokens=max_tokens))
    acts, chain = torch.cat([b.acts for b in batches]), torch.cat([b.chain for b in batches])
    return [acts[chain == i] for i in range(len(CHAINS))]


def check(got: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * max(1.0, float(b.abs().max())))


def head(name: str) -> Any:
    """The model with its head, without memory."""
    kind = AutoModelForCausalLM if name in CAUSAL else AutoModelForImageTextToText
    with torch.device("meta"):
        return kind.from_config(tiny_config(name))


def exact_or_refused(name: str, folder: str, **changes: Any) -> str:
    """Reads a tiny model of this type; returns why it is refused, or an empty text if it is exact."""
    try:
        tiny_config(name, **changes).save_pretrained(folder)
        config = read_config(folder)
        check_layers(config, [0])
        whole = None if name in WITHOUT else save_tiny(name, folder, **changes)
        n = config.get_text_config().num_hidden_layers
        layers = [0, n // 2 - 1]
        cut = load_backbone(folder, layers, "float32", device_map="cpu")
        check_reading(cut, layers, WORDS)
    except InputError as error:
        assert "\n" not in str(error) and "; expected " in str(error) and "; fix: " in str(error)
        return str(error)
    expected = [reference(whole, ids, n) for ids in CHAINS]
    some = [torch.stack([x[i] for i in layers], 1) for x in expected]
    check(read(cut, layers), some)
    assert len(decoder_layers(cut)) == n // 2 < len(decoder_layers(whole)) == n
    assert [type(b) for b in decoder_layers(head(name))] == [type(b) for b in decoder_layers(whole)]
    size = sum(t.nbytes for t in (*cut.parameters(), *cut.buffers()))
    assert weight_bytes(config, layers)["float32"] == size
    every = load_backbone(folder, [n - 1], "float32", device_map="cpu")
    # Each chain alone: beside others the sums of experts add up in another order, which grows from block to block.
    check(read(every, [n - 1], max(map(len, CHAINS))), [x[n - 1][:, None] for x in expected])
    try:
        check_reading(cut, layers, WORDS, chunked=True)
    except InputError as error:
        assert "\n" not in str(error) and "which cannot read them in chunks" in str(error)
    else:
        check(read(cut, layers, 5), some)
    return ""


@pytest.mark.parametrize("name", TYPES)
def test_exact_or_refused(name, tmp_path):
    if name in SKIPPED:
        pytest.skip(SKIPPED[name])
    reason = exact_or_refused(name, str(tmp_path))
    assert re.search(REFUSED[name], reason) if name in REFUSED else not reason


MASKED = """
    bert big_bird camembert data2vec-text electra ernie megatron-bert rembert roberta roberta-prelayernorm roc_bert roformer
    xlm-roberta xlm-roberta-xl
"""


@pytest.mark.parametrize("name", MASKED.split())
def test_masked_models_as_decoders(name, tmp_path):
    assert not exact_or_refused(name, str(tmp_path), is_decoder=True)


# --- blocks that depend on the model's depth ---


@pytest.mark.parametrize("name", ["minicpm3", "gpt_neox_japanese"])
def test_depth_fails_without_building_it(name, tmp_path):
    """With the config lowered before the blocks are built, as it once was."""
    whole = save_tiny(name, str(tmp_path))
    config = read_config(str(tmp_path))
    config.num_hidden_layers = 2
    lowered, info = AutoModel.from_pretrained(str(tmp_path), config=config, output_loading_info=True)
    got, expected = states(lowered.eval(), CHAINS[0]), states(whole, CHAINS[0])
    assert info["missing_keys"] or float((got[1] - expected[1]).abs().max()) > 0.1
    cut = load_backbone(str(tmp_path), [1], "float32", device_map="cpu")
    torch.testing.assert_close(read(cut, [1])[0][:, 0], expected[2], rtol=0, atol=1e-5)


# --- decoders that see ahead ---

AHEAD = [
    ("llama", {"is_causal": False}),
    ("gemma3_text", {"use_bidirectional_attention": True, "sliding_window": 8}),
    ("bert-generation", {}),
]
DTYPES = ["float32", "bfloat16"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "changes"), AHEAD, ids=[name for name, _ in AHEAD])
def test_a_decoder_that_sees_ahead_is_refused(name, changes, dtype, tmp_path):
    save_tiny(name, str(tmp_path), **changes)
    model = load_backbone(str(tmp_path), [0, 2], dtype, device_map="cpu")
    with pytest.raises(InputError, match=f"^a {name} model, in which a token sees later ones: they change it by .*%"):
        check_reading(model, [0, 2], WORDS)
    with pytest.raises(InputError, match="sees later ones"):  # one layer is enough
        check_reading(model, [0], WORDS)


TWINS = [
    ("llama", {}),
    ("gemma3_text", {"sliding_window": 8}),
    ("bert-generation", {"is_decoder": True}),
    ("bert", {"is_decoder": True}),
    ("mixtral", {}),
    ("qwen3_moe", {}),
    ("deepseek_v3", {}),
    ("gpt_oss", {}),
    ("olmoe", {}),
    ("mamba2", {}),
]


@pytest.mark.parametrize("dtype", [*DTYPES, "float16"])
@pytest.mark.parametrize(("name", "changes"), TWINS, ids=[name for name, _ in TWINS])
def test_the_refusal_fails_without_sight_of_later_tokens(name, changes, dtype, tmp_path):
    """The causal twins; experts multiply other tokens together in the two passes, and round as they may."""
    save_tiny(name, str(tmp_path), **changes)
    assert check_reading(load_backbone(str(tmp_path), [0, 2], dtype, device_map="cpu"), [0, 2], WORDS) == 32


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
@pytest.mark.parametrize("causal", [True, False])
def test_quantized_weights_make_no_difference_to_that(bits, causal, tmp_path, monkeypatch):
    pytest.importorskip("bitsandbytes")
    wide = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "num_hidden_layers": 12}
    save_tiny("llama", str(tmp_path), is_causal=causal, **wide)
    model, layers = load_backbone(str(tmp_path), [11], "bfloat16", device_map="cpu", quantization=bits), list(range(12))
    if causal:
        assert check_reading(model, layers, WORDS) == 64
        if bits == "8bit":  # negative control: columns that are spared for one token of the batch are so for all
            monkeypatch.setattr(trial, "_without_outliers", lambda model: nullcontext())
            with pytest.raises(InputError, match="sees later ones"):
                check_reading(model, layers, WORDS)
    else:
        with pytest.raises(InputError, match="sees later ones"):
            check_reading(model, layers, WORDS)


# --- block outputs of another shape ---


class Turned(nn.Module):
    """A block that returns [T, B, D]."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        return self.block(x, **options).transpose(0, 1)


def test_turned_axes_are_seen_also_in_a_square_batch(tmp_path):
    save_tiny("llama", str(tmp_path))
    model = load_backbone(str(tmp_path), [1], "float32", device_map="cpu")
    assert check_reading(model, [1], WORDS) == 32
    square = [torch.arange(3, 15) for _ in range(12)]  # B = T: the shape of a batch says nothing
    model.layers[1] = Turned(model.layers[1])
    with tap({1: model.layers[1]}) as taken:
        forward(model, square, None, model.layers[1])
        check_taken(taken, [1], 12, 12)  # negative control: it passes here
    with pytest.raises(InputError, match=r"^layer 1, whose block returns \[23, 5, 32\] for 5 chains of 23 tokens"):
        check_reading(model, [1], WORDS)
    with pytest.raises(InputError, match=r"^layer 1, whose block returns \[17, 3, 32\] for 3 chains of 17 tokens"):
        read(model, [1])


def test_a_block_that_runs_twice_is_refused(tmp_path):
    whole = save_tiny("llama", str(tmp_path))
    whole.layers[2] = whole.layers[0]
    with pytest.raises(InputError, match="^a llama model, whose block of layer 0 runs 2 times in a forward pass"):
        check_reading(whole, [0, 1], WORDS)
    assert check_reading(whole, [1, 3], WORDS) == 32


def test_a_cross_attention_layer_is_refused(tmp_path):
    save_tiny("mllama", str(tmp_path))
    model = load_backbone(str(tmp_path), [1, 2, 3], "float32", device_map="cpu")
    for layers in ([2], [1, 2, 3]):
        with pytest.raises(InputError, match="^layer 2, whose block does not run on text alone; .* --layers$"):
            check_reading(model, layers, WORDS)
        with pytest.raises(InputError, match="^layer 2, whose block does not run on text alone"):
            read(model, layers)
    assert check_reading(model, [1, 3], WORDS) == 32  # negative control


# --- the text blocks of multimodal models ---

TOWERS = {
    "qwen2_vl": {"vision_config": {"depth": 2}},
    "qwen2_5_vl": {"vision_config": {"depth": 2}},
    "qwen3_vl": {"vision_config": {"depth": 2, "deepstack_visual_indexes": [0, 1]}},
    "qwen3_5": {"vision_config": {"depth": 2}},
    "gemma3": {"vision_config": {"num_hidden_layers": 2}},
    "llava": {"vision_config": {"num_hidden_layers": 2}},
}


@pytest.mark.parametrize("depth", [2, 4])
@pytest.mark.parametrize("name", TOWERS)
def test_the_text_blocks_are_found_beside_a_tower_of_as_many(name, depth, tmp_path):
    """As many as are kept, and as many as there are."""
    changes = {
        part: {k: v if isinstance(v, list) else depth for k, v in sizes.items()} for part, sizes in TOWERS[name].items()
    }
    both = {part: changes.get(part, {}) | CHANGES.get(name, {}).get(part, {}) for part in (*changes, "text_config")}
    whole = save_tiny(name, str(tmp_path), **both)
    cut = load_backbone(str(tmp_path), [1], "float32", device_map="cpu")
    for model, n in ((whole, 4), (cut, 2)):
        assert decoder_layers(model) == list(model.language_model.layers) and len(decoder_layers(model)) == n
    check_reading(cut, [1], WORDS)
    check(read(cut, [1]), [states(whole, ids)[2][:, None] for ids in CHAINS])


# --- caches of another kind ---


def test_chunks_that_change_what_is_read_are_refused(tmp_path):
    """Moshi takes a cache of plain attention and fills it, but reads on from another position."""
    save_tiny("moshi", str(tmp_path))
    model = load_backbone(str(tmp_path), [0, 1], "float32", device_map="cpu")
    check_chunks(model.config)
    assert check_reading(model, [0, 1], WORDS) == 32
    with pytest.raises(InputError, match="a moshi model, which cannot read them in chunks"):
        check_reading(model, [0, 1], WORDS, chunked=True)
    distance = max(float((a - b).abs().max()) for a, b in zip(read(model, [0]), read(model, [0], 5), strict=True))
    assert distance > 0.1  # negative control: what is refused would be wrong


# --- what is launched ---


@pytest.fixture
def ahead(model_dir, tmp_path) -> Path:
    """The tiny model with its tokenizer, in which a token sees later ones."""
    folder = tmp_path / "ahead"
    shutil.copytree(model_dir, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"is_causal": False}))
    return folder


@pytest.mark.parametrize("options", [[], ["--dry_run"]], ids=str)
def test_a_run_of_a_model_that_sees_ahead_is_refused(ahead, chains_file, tmp_path, monkeypatch, capfd, options):
    monkeypatch.chdir(tmp_path)
    keys = {"model": str(ahead), "dtype": "float32", "data": str(chains_file), "layers": [0, 2], "lags": [0]}
    Path("config.yaml").write_text(yaml.safe_dump(keys))
    assert main(["config.yaml", *options]) == 2
    said = capfd.readouterr().err
    assert re.fullmatch("streamprobe: a llama model, in which a token sees later ones: .* --model\n", said)
    assert list(tmp_path.rglob("*.safetensors")) == [ahead / "model.safetensors"]  # nothing was trained


def test_a_model_that_sees_ahead_is_neither_watched_nor_steered(ahead, run_folder, capsys):
    words = [str(run_folder), "--model", str(ahead)]
    for command, options in (("watch", ["--prompt", "so"]), ("steer", ["--marker", "wait"])):
        assert cli.main([command, *words, *options]) == 2
        assert "in which a token sees later ones" in capsys.readouterr().err
