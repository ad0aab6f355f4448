"""Every model type of transformers is read exactly, or refused in one line."""

import re
from typing import Any

import pytest
import torch
from tiny_models import CAUSAL, TYPES, save_tiny, tiny_config
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from streamprobe.backbone import check_reading, decoder_layers, load_backbone, read_config, weight_bytes
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
    "perception_lm": "its vision tower needs timm",
}
REFUSED: dict[str, str] = {}


@torch.no_grad()
def reference(whole: nn.Module, ids: Tensor, n: int) -> dict[int, Tensor]:
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
    for before in (1, 0):
        for found in outputs.values():
            if all(i in found and torch.equal(found[i], states[i + before][0]) for i in range(n - 1)):
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
    try:
        whole = save_tiny(name, str(tmp_path))
    except (ValueError, AttributeError):  # AutoModel has none
        whole = None
        tiny_config(name).save_pretrained(tmp_path)
    try:
        config = read_config(str(tmp_path))
        n = getattr(config.get_text_config(), "num_hidden_layers", 2)
        layers = [0, n // 2 - 1]
        cut = load_backbone(str(tmp_path), layers, "float32", device_map="cpu")
        assert check_reading(cut, layers, WORDS) == 32
    except InputError as error:
        assert re.search(REFUSED.get(name, "is not refused"), str(error)), str(error)
        assert "\n" not in str(error) and "; expected " in str(error) and "; fix: " in str(error)
        return
    assert name not in REFUSED and whole is not None
    expected = [reference(whole, ids, n) for ids in CHAINS]
    check(read(cut, layers), [torch.stack([x[i] for i in layers], 1) for x in expected])
    assert len(decoder_layers(cut)) == n // 2 < len(decoder_layers(whole)) == n
    assert [type(b) for b in decoder_layers(head(name))] == [type(b) for b in decoder_layers(whole)]
    size = sum(t.nbytes for t in (*cut.parameters(), *cut.buffers()))
    assert weight_bytes(config, layers)["float32"] == size
    try:
        chunks = read(cut, layers, 5)
    except InputError as error:
        assert "\n" not in str(error) and "chunks" in str(error)
    else:
        check(chunks, [torch.stack([x[i] for i in layers], 1) for x in expected])
    every = load_backbone(str(tmp_path), [n - 1], "float32", device_map="cpu")
    check(read(every, [n - 1]), [x[n - 1][:, None] for x in expected])
