"""The demo's tokenizer and model, and its greedy answers.

Shapes: B problems in a batch, T tokens of the longest of them.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from streamprobe.demo.task import MAX_TARGET, WORDS, Problem, is_valid_trace

PROMPT = "{problem}\n\n"  # also the config's default; white space only parts words
SPECIAL = ("<s>", "</s>", "<pad>", "<unk>")
VOCABULARY = (
    *SPECIAL,
    *"reach with ? i look for . fits , take left and is too big not wait drop wrong back to without so + =".split(),
    *map(str, range(MAX_TARGET + 1)),
)


class Example(NamedTuple):
    """A text that the model learns from."""

    prompt: str
    response: str


def make_tokenizer() -> Any:
    """One token per word; a text begins with <s>."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate(VOCABULARY)}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        padding_side="left",  # a batch of problems ends where the responses begin
        clean_up_tokenization_spaces=False,
        model_max_length=256,
    )


def make_model(seed: int, blocks: int = 4, hidden: int = 128) -> Any:
    """A Llama with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=hidden,
        intermediate_size=hidden * 2,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=VOCABULARY.index("<s>"),
        eos_token_id=VOCABULARY.index("</s>"),
        pad_token_id=VOCABULARY.index("<pad>"),
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config)


def make_batch(examples: Sequence[Example], tokenizer: Any) -> tuple[Tensor, Tensor]:
    """Examples as token ids and labels: both int64 [B, T], padded at the right.

    Labels are -100 but in the response and at the </s> behind it.
    """
    ids = [[*row, tokenizer.eos_token_id] for row in tokenizer([e.prompt + e.response for e in examples])["input_ids"]]
    heads = [len(row) for row in tokenizer([e.prompt for e in examples])["input_ids"]]
    longest = max(map(len, ids))
    tokens = torch.tensor([row + [tokenizer.pad_token_id] * (longest - len(row)) for row in ids])
    labels = [[-100] * n + row[n:] + [-100] * (longest - len(row)) for n, row in zip(heads, ids, strict=True)]
    return tokens, torch.tensor(labels)


@torch.inference_mode()
def answer(model: Any, tokenizer: Any, problems: Sequence[Problem], batch_size: int = 100) -> list[str]:
    """The model's greedy response to each problem."""
    texts: list[str] = []
    for start in range(0, len(problems), batch_size):
        prompts = [PROMPT.format(problem=problem) for problem in problems[start : start + batch_size]]
        batch = tokenizer(prompts, padding=True, return_token_type_ids=False, return_tensors="pt").to(model.device)
        ids = model.generate(**batch, do_sample=False, max_new_tokens=WORDS.stop)
        texts += tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts


def share_solved(model: Any, tokenizer: Any, problems: Sequence[Problem]) -> float:
    """The share of problems that the model's greedy response solves, every step of it right."""
    answers = answer(model, tokenizer, problems)
    return sum(map(is_valid_trace, problems, answers)) / len(problems)
