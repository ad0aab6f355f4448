"""A tokenizer that is loaded says which characters each token covers."""

import pytest
from builders import make_tokenizer
from tiny_models import SIZES

from streamprobe.errors import InputError
from streamprobe.model.tokenizer import load_tokenizer


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
