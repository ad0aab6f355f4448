"""What a model wrote as text: the exact decoding of its tokens, and the characters that each of them stands for.

A model may write tokens that its tokenizer would not make of the same text, such as `wa` and `it`.  A chain of what it
wrote is made of its own tokens, so their text is put together piece by piece.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from streamprobe.data.prompts import special_ids
from streamprobe.data.records import Written

CONTEXT = 8  # tokens of the prompt that are decoded too: a tokenizer may leave out the space of a text's first token
PARTIAL = "\ufffd"  # what stands, in a decoding, for a letter of which bytes are missing


class Spelling:
    """The text of tokens that come one by one.

    Special tokens stand for no text.  A token that holds a part of a letter's bytes covers that letter, as tokenizers
    count; its text is known once the letter is whole.

    Attributes:
        text: what is known of it.
        spans: the characters start .. end of the text that each token covers, (0, 0) where it stands for none.
    """

    def __init__(self, tokenizer: Any, before: Sequence[int] = ()):
        """`before`: the tokens of the prompt."""
        self.tokenizer, self.special = tokenizer, special_ids(tokenizer)
        self.text, self.spans = "", list[tuple[int, int]]()
        self.before = [token for token in before if token not in self.special][-CONTEXT:]
        self.open: list[int] = []  # tokens behind `before` whose text is not known
        self.whole = 0  # letters of theirs that are

    def push(self, token: int) -> str:
        """Takes the next token; returns the text that it completes."""
        if token in self.special:
            self.spans.append((0, 0))
            return ""
        self.open.append(token)
        added = self._decode([*self.before, *self.open])[len(self._decode(self.before)) :]
        whole = len(added.rstrip(PARTIAL))
        start, end = len(self.text) + self.whole, len(self.text) + whole + (whole < len(added))
        self.spans.append((start, end) if start < end else (0, 0))
        self.whole = whole
        return "" if whole < len(added) else self._take(added)

    def end(self) -> str:
        """No token comes any more; returns the text that is left: letters that are not whole are replacement signs."""
        if not self.open:
            return ""
        added = self._take(self._decode([*self.before, *self.open])[len(self._decode(self.before)) :])
        self.spans = [(start, min(end, len(self.text))) for start, end in self.spans]
        self.spans = [(start, end) if start < end else (0, 0) for start, end in self.spans]
        return added

    def _take(self, added: str) -> str:
        """Appends to the text what the open tokens stand for."""
        self.text += added
        self.before, self.open, self.whole = self.open if added else self.before, [], 0
        return added

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def spell(tokenizer: Any, prompt: Sequence[int], ids: Iterable[int]) -> Spelling:
    """The text that a model wrote as these tokens, behind the tokens of a prompt."""
    spelling = Spelling(tokenizer, prompt)
    for token in ids:
        spelling.push(token)
    spelling.end()
    return spelling


def written_as(spelling: Spelling, head: str, ids: Sequence[int]) -> Written:
    """What a record holds of a response that was written as these tokens behind the text `head`."""
    return Written(head, tuple(ids), tuple(spelling.spans))
