"""Every model type of transformers is read exactly, or refused in one line."""

import re
from typing import Any

import pytest
import torch
from tiny_models import CAUSAL, TYPES, save_tiny, tiny_config
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from streamprobe.backbone import check_layers, check_reading, decoder_layers, load_backbone, read_config, weight_bytes
from streamprobe.chains import Chain
from streamprobe.errors import InputError
from streamprobe.lags import Column
from streamprobe.stream import stream

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
    "evolla", "gemma4_unified_assistant", "nemotron_h_omni", "pp_chart2table", "shieldgemma2", "trocr"
}  # fmt: skip
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
        (OTHER_SHAPE, r"^layer 0, whose block returns \[.*\] for 5 chains of 23 tokens; expected \[5, 23, hidden size\]"),
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
    batches = list(stream(chains, model, layers, [Column("x", "token", 0)], ["x"], max_tokens))
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


@pytest.mark.parametrize("name", TYPES)
def test_exact_or_refused(name, tmp_path):
    if name in SKIPPED:
        pytest.skip(SKIPPED[name])
    whole = None
    try:
        tiny_config(name).save_pretrained(tmp_path)
        config = read_config(str(tmp_path))
        check_layers(config, [0])
        if name not in WITHOUT:
            whole = save_tiny(name, str(tmp_path))
        n = config.get_text_config().num_hidden_layers
        layers = [0, n // 2 - 1]
        cut = load_backbone(str(tmp_path), layers, "float32", device_map="cpu")
        check_reading(cut, layers, WORDS)
    except InputError as error:
        assert re.search(REFUSED.get(name, "is not refused"), str(error)), str(error)
        assert "\n" not in str(error) and "; expected " in str(error) and "; fix: " in str(error)
        return
    assert name not in REFUSED and whole is not None
    expected = [reference(whole, ids, n) for ids in CHAINS]
    some = [torch.stack([x[i] for i in layers], 1) for x in expected]
    check(read(cut, layers), some)
    assert len(decoder_layers(cut)) == n // 2 < len(decoder_layers(whole)) == n
    assert [type(b) for b in decoder_layers(head(name))] == [type(b) for b in decoder_layers(whole)]
    size = sum(t.nbytes for t in (*cut.parameters(), *cut.buffers()))
    assert weight_bytes(config, layers)["float32"] == size
    every = load_backbone(str(tmp_path), [n - 1], "float32", device_map="cpu")
    check(read(every, [n - 1]), [x[n - 1][:, None] for x in expected])
    try:
        check_reading(cut, layers, WORDS, chunked=True)
    except InputError as error:
        assert "\n" not in str(error) and "which cannot read them in chunks" in str(error)
    else:
        check(read(cut, layers, 5), some)
