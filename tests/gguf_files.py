"""A tiny Llama in a GGUF file, with a vocabulary of bytes."""

from pathlib import Path

import pytest
import torch

NAME = "model.gguf"
WORDS = ("wait", "the")  # that have a token of their own, merged letter by letter
BLOCKS = 6


def save_gguf(folder: Path) -> str:
    """Writes a Llama with random weights in float32 into a folder; returns it."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(folder / NAME, "llama")
    merges = [(word[:i], word[i]) for word in WORDS for i in range(1, len(word))]
    tokens = ["<s>", "</s>", *bytes_to_unicode().values(), *(a + b for a, b in merges)]
    tokens += [f"unused {i}" for i in range(300 - len(tokens))]
    for name, value in {
        "context_length": 2048,
        "embedding_length": 32,
        "block_count": BLOCKS,
        "feed_forward_length": 64,
        "head_count": 4,
        "head_count_kv": 4,
        "vocab_size": len(tokens),
        "tokenizer_model": "gpt2",
        "token_list": tokens,
        "token_types": [3, 3, *[1] * (len(tokens) - 2)],
        "token_merges": [" ".join(merge) for merge in merges],
        "bos_token_id": 0,
        "eos_token_id": 1,
    }.items():
        getattr(writer, f"add_{name}")(value)
    writer.add_layer_norm_rms_eps(1e-6)
    random = torch.Generator().manual_seed(0)
    shapes = {"token_embd": (len(tokens), 32), "output_norm": (32,), "output": (len(tokens), 32)}
    for i in range(BLOCKS):
        shapes |= {f"blk.{i}.attn_{x}": (32, 32) for x in ("q", "k", "v", "output")}
        shapes |= {f"blk.{i}.attn_norm": (32,), f"blk.{i}.ffn_norm": (32,), f"blk.{i}.ffn_down": (32, 64)}
        shapes |= {f"blk.{i}.ffn_{x}": (64, 32) for x in ("gate", "up")}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", (torch.randn(*shape, generator=random) * 0.3).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(folder)
