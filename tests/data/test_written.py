"""The text of tokens that a model wrote, and the characters that each stands for."""

import pytest
import torch
from builders import make_tokenizer

from streamprobe.data.annotations import Annotation
from streamprobe.data.records import Record
from streamprobe.data.tokenize import TextOptions, tokenize
from streamprobe.data.written import Spelling, spell, written_as
from streamprobe.lags import UNKNOWN


def by_bytes(tokenizer, text: str) -> list[int]:
    """A text as tokens of one byte each."""
    letters = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
    return [tokenizer.convert_tokens_to_ids(letter) for piece, _ in letters for letter in piece]


def record_of(tokenizer, head: str, ids: list[int], problem: str = "why?") -> Record:
    """The record of a response that was written as these tokens behind a text."""
    spelling = spell(tokenizer, tokenizer(head)["input_ids"], ids)
    return Record(spelling.text, Annotation([]), problem, complete=True, written=written_as(spelling, head, ids))


def test_a_letter_belongs_to_every_token_that_holds_a_byte_of_it(tokenizer):
    text = "a🙂é b"
    spelling = Spelling(tokenizer)
    pieces = [spelling.push(token) for token in by_bytes(tokenizer, text)]
    assert pieces == ["a", "", "", "", "🙂", "", "é", " ", "b"] and spelling.end() == ""
    assert spelling.spans == [(0, 1), *[(1, 2)] * 4, *[(2, 3)] * 2, (3, 4), (4, 5)]
    assert spelling.text == text


def test_letters_that_are_never_whole_are_replacement_signs_at_the_end(tokenizer):
    ids = by_bytes(tokenizer, "a🙂")[:-1]
    spelling = Spelling(tokenizer)
    assert [spelling.push(token) for token in ids] == ["a", "", "", ""]
    assert spelling.end() == "\ufffd" == spelling.text[1:]
    assert spelling.spans == [(0, 1), (1, 2), (1, 2), (1, 2)]
    spelling = spell(tokenizer, [], [*ids, *by_bytes(tokenizer, "b")])  # something else comes instead of its last byte
    assert spelling.text == "a\ufffdb"


def test_special_tokens_stand_for_no_text_and_are_no_samples(tokenizer):
    words = tokenizer("wait no", add_special_tokens=False)["input_ids"]
    ids = [*words, tokenizer.bos_token_id, *words]
    record = record_of(tokenizer, "why?\n\n", ids)
    assert record.response == "wait nowait no"
    chain = tokenize(record, tokenizer, ["x"])
    own = torch.tensor([True] * len(words) + [False] + [True] * len(words))
    assert torch.equal(chain.support[-len(ids) :], own)
    assert chain.codes[-len(words) - 1] == UNKNOWN and chain.codes[-1] != UNKNOWN


def test_a_text_that_opens_the_thinking_counts_to_its_region(tokenizer):
    ids = tokenizer(" so it is</think> yes", add_special_tokens=False)["input_ids"]
    record = record_of(tokenizer, "why? <think>", ids)
    for region, expected in (("think", " so it is"), ("answer", " yes")):
        chain = tokenize(record, tokenizer, ["x"], TextOptions("{problem} <think>", region=region))
        assert tokenizer.decode(chain.ids[chain.support]).strip() == expected.strip()


@pytest.mark.parametrize("adds", ["<s> $A", "$A", "<s> $A </s>"])
@pytest.mark.parametrize("bos", [True, False])
def test_what_was_written_stands_behind_what_was_read(adds, bos):
    tokenizer = make_tokenizer(adds)
    ids = by_bytes(tokenizer, "wait no")  # letter by letter, as its tokenizer would not
    chain = tokenize(record_of(tokenizer, "why?\n\n", ids), tokenizer, ["x"], TextOptions(bos=bos))
    head = tokenizer("why?\n\n", add_special_tokens=False)["input_ids"]
    assert chain.ids.tolist() == [tokenizer.bos_token_id] * bos + head + ids
    assert chain.start == bos + len(head) and chain.support.sum() == len(ids)
