"""A tokenizer that is loaded says which characters each token covers."""

import pytest
import transformers
from builders import make_letters, make_tokenizer
from hub_models import save_like
from tiny_models import SIZES

from streamprobe.errors import InputError
from streamprobe.model.tokenizer import load_tokenizer, with_white_space


def test_slow_tokenizer(tmp_path):
    from transformers import ByT5Tokenizer, LlamaConfig

    LlamaConfig(**SIZES).save_pretrained(tmp_path)
    with pytest.raises(InputError):
        load_tokenizer(str(tmp_path))  # no tokenizer at all
    ByT5Tokenizer().save_pretrained(tmp_path)
    with pytest.raises(InputError, match="ByT5Tokenizer, which has no offset mapping; expected a fast tokenizer"):
        load_tokenizer(str(tmp_path))


def test_fast_tokenizer(model_dir, tokenizer):
    loaded = load_tokenizer(model_dir)
    text = "wait no. é\n\nthen"
    names = {"return_offsets_mapping": True}
    assert loaded(text, **names)["input_ids"] == tokenizer(text, **names)["input_ids"]
    assert loaded(text, **names)["offset_mapping"] == tokenizer(text, **names)["offset_mapping"]
    assert loaded.bos_token_id == 0
    assert make_tokenizer()(text)["input_ids"] == tokenizer(text)["input_ids"]  # training it is deterministic


def test_a_tokenizer_that_loses_blanks_is_refused(tmp_path, monkeypatch):
    """Of another class than its files describe, which their own settings name."""
    folder = save_like("deepseek-ai/DeepSeek-R1-Distill-Llama-8B", tmp_path)
    text = "one two"
    right = load_tokenizer(folder)  # negative control
    assert right.decode(right(text)["input_ids"], skip_special_tokens=True) == text
    wrong = transformers.LlamaTokenizer.from_pretrained(folder)
    assert wrong.decode(wrong(text)["input_ids"], skip_special_tokens=True) == "onetwo"
    with pytest.raises(
        InputError, match="^the tokenizer LlamaTokenizer, of which the blanks of a text are in no token;"
    ):
        with_white_space(wrong)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *_, **__: wrong)
    with pytest.raises(InputError, match="LlamaTokenizer, of which the blanks .* fix: update transformers"):
        load_tokenizer(folder)


def test_the_refusal_fails_without_a_vocabulary_of_bytes():
    """One of letters has its blanks in tokens."""
    assert with_white_space(make_letters()) is not None
