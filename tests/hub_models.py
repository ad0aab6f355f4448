"""Folders like those of models on the hub: their architecture, depth and kind of tokenizer, and random weights.

    folder = save_like("Qwen/Qwen3-8B", path)        # config.json, model.safetensors, tokenizer.json, tokenizer_config.json

The blocks are a few dozen wide and the vocabularies learned from the made-up chains; all else is as in the hub's files.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from builders import make_rows
from tiny_models import tiny_config
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForImageTextToText,
    Gemma3Config,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

WORDS = r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
WIDTH = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "initializer_range": 0.05,
}
LLAMA_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def texts() -> list[str]:
    return [row[name] for row in make_rows(30, seed=1) for name in ("problem", "reasoning_chain")]


def special(*names: str) -> list[AddedToken]:
    return [AddedToken(name, special=True, normalized=False) for name in names]


def byte_level(digits: str) -> Tokenizer:
    """Byte-level BPE, as of Llama 3 and of Qwen, which take so many digits for a word; special tokens come behind."""
    core = Tokenizer(models.BPE(ignore_merges=True))
    words = pre_tokenizers.Split(Regex(WORDS.replace("DIGITS", digits)), "isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.pre_tokenizer = pre_tokenizers.Sequence([words, level])
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        texts(), trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    return core


def begun_by(core: Tokenizer, bos: str, *before: Any) -> None:
    """Lets a tokenizer put this token before a text, by itself."""
    template = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, core.token_to_id(bos))])
    core.post_processor = processors.Sequence([*before, template])


def llama3() -> Tokenizer:
    core = byte_level(r"\p{N}{1,3}")
    core.add_special_tokens(special("<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>"))
    begun_by(core, "<|begin_of_text|>", processors.ByteLevel(trim_offsets=True))
    return core


def deepseek() -> Tokenizer:
    core = byte_level(r"\p{N}{1,3}")
    core.add_special_tokens(special("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"))
    core.add_tokens(
        [AddedToken(name, normalized=False) for name in ("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>")]
    )
    begun_by(core, "<｜begin▁of▁sentence｜>", processors.ByteLevel(trim_offsets=True))
    return core


def qwen() -> Tokenizer:
    core = byte_level(r"\p{N}")
    core.normalizer = normalizers.NFC()
    core.add_special_tokens(special("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
    core.add_tokens([AddedToken(name, normalized=False) for name in ("<think>", "</think>")])
    core.post_processor = processors.ByteLevel(trim_offsets=False)
    return core


def gemma() -> Tokenizer:
    """BPE of letters, in which `▁` stands for a blank, and of the bytes of letters that it does not know."""
    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    learned.train_from_iterator(texts(), trainers.BpeTrainer(vocab_size=300, show_progress=False))
    found = json.loads(learned.to_str())["model"]
    entries = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocab = {entry: i for i, entry in enumerate(dict.fromkeys([*entries, *found["vocab"], "\n"]))}
    merges = [tuple(pair) for pair in found["merges"]]
    core = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    core.normalizer = normalizers.Replace(" ", "▁")
    core.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    core.add_special_tokens(special("<pad>", "<eos>", "<bos>", "<unk>", "<mask>"))
    core.add_tokens([AddedToken(text, normalized=False) for text in ("\n\n", "▁▁")])
    core.add_special_tokens(special("<start_of_turn>", "<end_of_turn>", "<image_soft_token>"))
    begun_by(core, "<bos>")
    return core


class Like(NamedTuple):
    """What a model on the hub is made of."""

    blocks: int
    model: Callable[[int, int], Any]  # of so many blocks and tokens
    tokenizer: Callable[[], Tokenizer]
    bos: str | None  # that the tokenizer puts before a text
    settings: dict[str, Any]  # tokenizer_config.json


def make_llama(blocks: int, tokens: int) -> Any:
    heads = {"head_dim": 32}  # all widths multiples of 64, as 4-bit kernels of a CPU want them
    positions = {"max_position_embeddings": 131_072, "rope_parameters": LLAMA_ROPE}
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=blocks, vocab_size=tokens, **WIDTH, **heads, **positions))


def make_qwen(blocks: int, tokens: int) -> Any:
    return Qwen3ForCausalLM(Qwen3Config(num_hidden_layers=blocks, vocab_size=tokens, head_dim=16, **WIDTH))


def make_gemma(blocks: int, tokens: int) -> Any:
    """Text blocks, of which every sixth sees more than a window, behind a part that sees pictures."""
    text = {"num_hidden_layers": blocks, "vocab_size": tokens, "head_dim": 16, "max_position_embeddings": 131_072}
    config = tiny_config("gemma3", text_config=text | WIDTH | {"sliding_window": 16})
    assert isinstance(config, Gemma3Config) and set(config.text_config.layer_types[5::6]) == {"full_attention"}
    return AutoModelForImageTextToText.from_config(config)


LLAMA3_SETTINGS = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<|begin_of_text|>",
    "eos_token": "<|end_of_text|>",
}
DEEPSEEK_SETTINGS = {
    "tokenizer_class": "LlamaTokenizerFast",
    "add_bos_token": True,
    "add_eos_token": False,
    "bos_token": "<｜begin▁of▁sentence｜>",
    "eos_token": "<｜end▁of▁sentence｜>",
    "pad_token": "<｜end▁of▁sentence｜>",
    "unk_token": None,
    "legacy": True,
    "sp_model_kwargs": {},
}
QWEN_SETTINGS = {
    "tokenizer_class": "Qwen2Tokenizer",
    "add_bos_token": False,
    "add_prefix_space": False,
    "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
    "bos_token": None,
    "eos_token": "<|im_end|>",
    "pad_token": "<|endoftext|>",
    "unk_token": None,
    "split_special_tokens": False,
}
GEMMA_SETTINGS = {
    "tokenizer_class": "GemmaTokenizer",
    "add_bos_token": True,
    "add_eos_token": False,
    "bos_token": "<bos>",
    "eos_token": "<eos>",
    "pad_token": "<pad>",
    "unk_token": "<unk>",
    "extra_special_tokens": {"image_token": "<image_soft_token>"},
    "processor_class": "Gemma3Processor",
}
MODELS = {
    "meta-llama/Llama-3.1-8B": Like(32, make_llama, llama3, "<|begin_of_text|>", LLAMA3_SETTINGS),
    "meta-llama/Llama-3.1-70B": Like(80, make_llama, llama3, "<|begin_of_text|>", LLAMA3_SETTINGS),
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": Like(
        32, make_llama, deepseek, "<｜begin▁of▁sentence｜>", DEEPSEEK_SETTINGS
    ),
    "Qwen/Qwen3-8B": Like(36, make_qwen, qwen, None, QWEN_SETTINGS),
    "google/gemma-3-4b-it": Like(34, make_gemma, gemma, "<bos>", GEMMA_SETTINGS),
}


def save_like(name: str, folder: Path) -> str:
    """A folder with a model like this one of the hub; returns its path."""
    like = MODELS[name]
    core = like.tokenizer()
    torch.manual_seed(0)
    like.model(like.blocks, core.get_vocab_size()).to(torch.bfloat16).save_pretrained(folder)
    core.save(str(folder / "tokenizer.json"))
    settings = json.dumps({"model_max_length": 131_072, **like.settings})
    (folder / "tokenizer_config.json").write_text(settings, encoding="utf-8")
    return str(folder)
