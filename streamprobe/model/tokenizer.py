"""The model's tokenizer, with the characters that each token covers."""

import json
from copy import deepcopy
from typing import Any

from streamprobe.errors import InputError, first_line
from streamprobe.model.gguf_file import parsed_once
from streamprobe.model.loading import readable_errors
from streamprobe.system.shipped import shipped_path


def load_tokenizer(model: str, **where: Any) -> Any:
    """The model's tokenizer, which says of every token which characters it covers, white space included.

    Raises InputError if it cannot, and for files that are no tokenizer's.
    """
    from transformers import AutoTokenizer

    with readable_errors(model), parsed_once(where.get("gguf_file")):
        try:
            tokenizer = AutoTokenizer.from_pretrained(shipped_path(model), **where)
        except Exception as error:
            if type(error) not in (Exception, TypeError, AttributeError):  # bare ones are those of `tokenizers`
                raise
            raise InputError(
                f"model {model} with a tokenizer that cannot be read ({first_line(error)})",
                "the tokenizer's files as they were saved",
                "check tokenizer.json and tokenizer_config.json",
            ) from error
    _check_kind(tokenizer, f"model {model} with the tokenizer")
    keep_white_space(tokenizer.backend_tokenizer)
    return tokenizer


def with_white_space(tokenizer: Any) -> Any:
    """A tokenizer that someone else has loaded, or a copy of it, as `load_tokenizer` would give it."""
    _check_kind(tokenizer, "the tokenizer")
    behind = tokenizer.backend_tokenizer.post_processor
    if behind is None or b'"trim_offsets":true' not in behind.__getstate__():
        return tokenizer
    own = deepcopy(tokenizer)
    keep_white_space(own.backend_tokenizer)
    return own


def _check_kind(tokenizer: Any, whose: str) -> None:
    """Raises InputError for a tokenizer without offsets, and for one of bytes that is taken for one of letters.

    Some versions of transformers go by the class that the settings name (`LlamaTokenizerFast`), whatever the files
    describe; then the blanks of a text are in no token.
    """
    if not tokenizer.is_fast:
        raise InputError(
            f"{whose} {type(tokenizer).__name__}, which has no offset mapping",
            "a fast tokenizer (it says which characters each token covers)",
            "use a model with a tokenizer.json",
        )
    backend = tokenizer.backend_tokenizer
    written = [backend.token_to_id(blank) is not None for blank in ("\u0120", "\u2581")]  # by bytes, by letters
    divider = b"" if backend.pre_tokenizer is None else backend.pre_tokenizer.__getstate__()
    if written == [True, False] and b"Metaspace" in divider:
        raise InputError(
            f"{whose} {type(tokenizer).__name__}, of which the blanks of a text are in no token",
            "byte-level tokens, as its tokenizer.json describes them",
            'update transformers, or write "tokenizer_class": "PreTrainedTokenizerFast" into its tokenizer_config.json',
        )


def keep_white_space(backend: Any) -> None:
    """Lets a `tokenizers.Tokenizer` (changed in place) count white space to the characters of a token.

    A byte-level post-processor with `trim_offsets` leaves it out, so that a token of white space alone covers nothing.
    The token ids stay as they are.
    """
    from tokenizers import Tokenizer, models

    def untrimmed(entry: dict[str, Any]) -> dict[str, Any]:
        return entry | {"trim_offsets": False} if "trim_offsets" in entry else entry

    now = json.loads(backend.to_str())["post_processor"]
    then = json.loads(json.dumps(now), object_hook=untrimmed)
    if then != now:
        empty = json.loads(Tokenizer(models.BPE()).to_str())
        backend.post_processor = Tokenizer.from_str(json.dumps(empty | {"post_processor": then})).post_processor
