"""A text is read in chunks where that changes nothing; other models are refused before their weights load."""

import pytest
from tiny_models import tiny_config

from streamprobe.errors import InputError
from streamprobe.model.chunks import check_chunks


@pytest.mark.parametrize("name", ["rwkv", "xlstm", "mamba", "minimax", "jamba", "recurrent_gemma", "reformer"])
def test_chunks_are_refused_before_the_weights_load(name):
    with pytest.raises(
        InputError, match="^chains longer than max_batch_tokens, and a .* model, which cannot read them"
    ):
        check_chunks(tiny_config(name))


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3_text", "mixtral", "mpt"])
def test_the_refusal_of_chunks_fails_without_a_running_state(name):
    """These models read the same in chunks."""
    check_chunks(tiny_config(name))
