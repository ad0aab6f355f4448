"""What it takes to let a model write from a prompt that its probes know: token ids, options and the text as it comes.

Shapes: T tokens.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from streamprobe.data import prompts
from streamprobe.data.messages import messages
from streamprobe.data.records import FormatOptions
from streamprobe.data.tokenize import Chain, TextOptions, tokenize
from streamprobe.errors import InputError

Turn = Mapping[str, Any]  # its `role` and `content`, as chat templates take them


def encode(problem: str, prompt: str, tokenizer: Any, with_bos: bool, *, day: str | None = None) -> Tensor:
    """The token ids [T] of a problem before a response in a run of this `prompt`, `bos` and `chat_date` (`day`)."""
    head = prompts.format_prompt(problem, prompt, tokenizer, day)
    return torch.tensor(prompts.encode_head(head, prompt, tokenizer, with_bos)[0], dtype=torch.int64)


def encode_turns(turns: Sequence[Turn], tokenizer: Any, with_bos: bool, *, day: str | None = None) -> Tensor:
    """The token ids [T] of a conversation before its next answer, in a run whose `prompt` is `chat`."""
    ids, _ = prompts.encode(prompts.format_chat(turns, tokenizer, day), "chat", tokenizer, with_bos)
    return torch.tensor(ids, dtype=torch.int64)


@dataclass(frozen=True)
class PromptStyle:
    """How a run writes what stands before a response: its keys `prompt`, `bos` and `chat_date`, and its tokenizer."""

    tokenizer: Any
    prompt: str
    bos: bool
    day: str | None
    most: int  # tokens that the model takes
    read: TextOptions | None = None  # how the run reads its data, where probes look back on what they read

    @property
    def has_turns(self) -> bool:
        """Whether it can hold a conversation; a format string holds one problem."""
        return self.prompt == "chat"

    def encode(self, turns: Sequence[Turn]) -> Tensor:
        """The token ids [T] of some turns before the next answer, or of the one problem that they are.

        Raises InputError for turns that do not fit the run's `prompt`, or leave no room for an answer.
        """
        if self.has_turns:
            ids = encode_turns(turns, self.tokenizer, self.bos, day=self.day)
        elif len(turns) == 1:
            ids = encode(turns[0]["content"], self.prompt, self.tokenizer, self.bos, day=self.day)
        else:
            known = "one problem, as the run's prompt is a format string"
            raise InputError(f"{len(turns)} turns", known, "watch a run with the prompt chat")
        if len(ids) >= self.most:
            fewer, fix = f"fewer than the model's {self.most:,}", "shorten it" + ", or begin anew" * (len(turns) > 1)
            raise InputError(f"a prompt of {len(ids):,} tokens", fewer, fix)
        return ids

    def samples(self, turns: Sequence[Turn], ids: Tensor) -> Tensor | None:
        """Which tokens of a prompt, the ids [T] of some turns, the run's probes would have read: bool [T].

        They are those of earlier answers, unless only the last one counts, or with `support: all` all but special ones.
        What a chat template writes to open an answer, such as `<think>`, is none of it.  None: no probe looks back.
        """
        if self.read is None:
            return None
        if self.read.support == "all":
            return ~torch.isin(ids, torch.tensor(sorted(prompts.special_ids(self.tokenizer)), dtype=torch.int64))
        found = torch.zeros(len(ids), dtype=torch.bool)
        if self.read.support == "assistant" and any(map(_is_answer, turns)):
            record = messages({"turns": list(turns)}, FormatOptions(response="turns", labelled=False))
            so_far = tokenize(record, self.tokenizer, [], self.read)
            n = min(len(ids), len(so_far.ids))
            same = (ids[:n] == so_far.ids[:n]).int().cumprod(0).bool()  # up to where the next answer is opened
            found[:n] = so_far.support[:n] & same
        return found


def _is_answer(turn: Turn) -> bool:
    """Whether the model says something in a turn."""
    return turn["role"] == "assistant" and bool(turn["content"].strip())


def prompt_of(chain: Chain, tokenizer: Any) -> Tensor:
    """The token ids [T] of a chain up to where the model began to write: with the marker that its prompt left to it."""
    ends = range(chain.start, len(chain.ids))
    end = next((e for e in ends if chain.marker in tokenizer.decode(chain.ids[chain.start : e])), chain.start)
    return chain.ids[:end]


class Pieces:
    """The text that each new token adds; tokens that end inside of a character add nothing until it is whole.

    Only the last few tokens are decoded each time, so a long text costs no more a token than a short one.
    """

    def __init__(self, tokenizer: Any, before: Iterable[int]):
        """`before`: the prompt's tokens, since a tokenizer may leave out the space of a text's first token."""
        self.tokenizer = tokenizer
        self.ids = list(before)[-8:]
        self.read = len(self.ids)  # tokens whose text is out

    def push(self, token: int) -> str:
        """The text that this token completes."""
        self.ids.append(token)
        return self._text(partial=False)

    def rest(self) -> str:
        """What is left at the end."""
        return self._text(partial=True)

    def _text(self, partial: bool) -> str:
        old, new = (
            self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            for ids in (self.ids[: self.read], self.ids)
        )
        if new.endswith("\ufffd") and not partial:
            return ""
        self.ids = self.ids[self.read :] or self.ids
        self.read = len(self.ids)
        return new[len(old) :]
