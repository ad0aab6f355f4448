"""Labels that arrive late are those of the whole text read afterwards, token by token."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from builders import make_letters
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from streamprobe.data.annotations import Annotation
from streamprobe.data.label_rules import LabelRule, apply_rules, parse_rule
from streamprobe.data.late_labels import LateCodes, LateLabels, Settled
from streamprobe.data.records import Record
from streamprobe.data.tokenize import Chain, tokenize
from streamprobe.data.written import Spelling, spell, written_as
from streamprobe.lags import Column, LagBuffer, Pairs

RULES = [  # of each the match may end after the tokens that it labels, or depend on what comes
    "wrong=sentence:is wrong",
    "wrong=sentence:wait(?! for)",
    "wrong=sentence:(?i)\\bno\\b",
    "wrong=paragraph:mistake\\b",
    "wrong=paragraph:(?m)^no$",
    "wrong=match:so[^.]*\\.",
    "wrong=match:(?<=wait )no+",
    "wrong=after:is wrong(?=\\.)",
    "wrong=after:wait",
    "wrong=sentence:no.*\\Z",  # known at the end alone
    "wrong=match:é🙂+",
    "wrong=sentence:漢",
]
PIECES = ["wait", " for", " no", "noo", " is wrong", ".", ". ", "! ", "\n", "\n\n", " \n \n", " so", " é🙂", "🙂", "漢字", "。", " mistake", "s", '."', " ", ") ", "No"]  # fmt: skip
COLUMNS = [
    Column("wrong", target, lag)
    for target in ("token", "onset", "within")
    for lag in (-3, 0, 2, 5)
    if target != "within" or lag > 0
]
texts = st.lists(st.sampled_from(PIECES), min_size=1, max_size=25).map("".join).filter(str.strip)


def labelled(text: str, rules: Sequence[LabelRule], **more: Any) -> Record:
    """The text as a record whose labels are those of the rules."""
    return apply_rules(Record(text, Annotation([]), "why?", complete=True, **more), rules)


def whole(chain: Chain) -> Pairs:
    """What a chain that is read afterwards gives."""
    return LagBuffer(COLUMNS, ["wrong"]).push(numbers(len(chain.ids)), chain.codes, chain.support, last=True)


def numbers(n: int, start: int = 0) -> Tensor:
    """Activations that say which token is which."""
    return torch.arange(start, start + n)[:, None].float()


def as_written(tokenizer: Any, chain: Chain, ids: Sequence[int], codes: LateCodes) -> Pairs:
    """What the same tokens give as they come one by one: codes go to the buffer when they are settled, not before."""
    buffer, spelling = LagBuffer(COLUMNS, ["wrong"]), Spelling(tokenizer, chain.ids[: chain.start].tolist())
    n = len(chain.ids) - len(ids)
    found = [buffer.push(numbers(n), chain.codes[:n], chain.support[:n])]

    def take(settled: Tensor, last: bool = False) -> None:
        nonlocal n
        support = chain.support[n : n + len(settled)]
        found.append(buffer.push(numbers(len(settled), n), settled, support, last=last))
        n += len(settled)

    for token in ids:
        piece = spelling.push(token)
        take(codes.push(piece, spelling.spans[-1]))
    take(codes.end(spelling.end()), last=True)
    assert n == len(chain.ids)
    return Pairs(*map(torch.cat, zip(*found, strict=True)))


def equal(a: Pairs, b: Pairs) -> bool:
    return all(map(torch.equal, a, b))


def cut(tokenizer: Any, text: str, places: Sequence[int]) -> list[int]:
    """The ids of a text that is tokenised in stretches, and so otherwise than as a whole; every fifth letter by bytes."""
    bounds = [0, *sorted({place % (len(text) + 1) for place in places}), len(text)]
    parts = [text[i:j] for i, j in zip(bounds, bounds[1:], strict=False) if j > i]
    return [id for part in parts for id in tokenizer(part, add_special_tokens=False)["input_ids"]]


@given(text=texts, rule=st.sampled_from(RULES), places=st.lists(st.integers(0, 60), max_size=8))
def test_pairs_of_tokens_as_they_come_are_those_of_the_whole_text(tokenizer, text, rule, places):
    rules, ids = [parse_rule(rule)], cut(tokenizer, text, places)
    chain = chain_of(tokenizer, ids, rules)
    assert equal(as_written(tokenizer, chain, ids, LateCodes(rules, ["wrong"])), whole(chain))


def chain_of(tokenizer: Any, ids: Sequence[int], rules: Sequence[LabelRule]) -> Chain:
    """The chain of a response that was written as these tokens."""
    head = "why?\n\n"
    spelling = spell(tokenizer, tokenizer(head)["input_ids"], ids)
    return tokenize(labelled(spelling.text, rules, written=written_as(spelling, head, ids)), tokenizer, ["wrong"])


class HastyLabels(LateLabels):
    """One that settles every character at once, by what the rules say of the text so far."""

    def push(self, piece: str) -> Settled:
        self.text += piece
        return Settled(len(self.text), list(apply_rules(Record(self.text, Annotation([])), RULE).sections))


RULE = [parse_rule("wrong=sentence:is wrong")]


def test_pairs_fail_without_waiting_for_labels_to_settle(tokenizer):
    text = "so wait, that is wrong. no more of it."
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    chain, codes = chain_of(tokenizer, ids, RULE), LateCodes(RULE, ["wrong"])
    codes.late = HastyLabels(RULE)
    hasty, right = as_written(tokenizer, chain, ids, codes), whole(chain)
    assert not equal(hasty, right) and len(hasty.token) == len(right.token)
    assert equal(as_written(tokenizer, chain, ids, LateCodes(RULE, ["wrong"])), right)


@given(
    text=texts,
    rules=st.lists(st.sampled_from(RULES), min_size=1, max_size=3),
    places=st.lists(st.integers(0, 60), max_size=8),
)
def test_what_is_settled_is_what_the_rules_say_of_the_whole_text(text, rules, places):
    parsed = [parse_rule(rule) for rule in rules]
    expected = list(labelled(text, parsed).sections)
    late, bounds = LateLabels(parsed), [0, *sorted({place % (len(text) + 1) for place in places}), len(text)]
    before = 0
    for start, end in zip(bounds, bounds[1:], strict=False):
        settled = late.push(text[start:end])
        assert before <= settled.upto <= end
        assert of_characters(settled.sections, settled.upto) == of_characters(expected, settled.upto)
        before = settled.upto
    assert late.end() == (len(text), expected)


def of_characters(sections: Sequence[Any], upto: int) -> list[int]:
    """For each character the place where its section begins, or -1."""
    found = [-1] * upto
    for _, start, end in sections:
        found[start : min(end, upto)] = [start] * (min(end, upto) - start)
    return found


@pytest.mark.parametrize(
    ("rule", "text", "upto"),
    [
        ("wrong=match:wait", "so wai", 3),
        ("wrong=match:wait", "so wait, ", 9),
        ("wrong=sentence:is wrong", "that is wrong", 0),
        ("wrong=sentence:is wrong", "that is wrong. ", 0),  # more white space may come: it is in no sentence
        ("wrong=sentence:is wrong", "that is wrong. so", 15),
        ("wrong=sentence:is wrong. no", "that is wrong. no", 0),  # the match ends in the next sentence, and may grow
        ("wrong=sentence:is wrong. no", "that is wrong. no, ", 15),
        ("wrong=paragraph:wait", "wait. no. no\nno", 0),
        ("wrong=paragraph:wait", "wait. no. no\n\nno", 14),
        ("wrong=after:wait", "so it is", 8),
        ("wrong=after:wait", "so wai", 3),
        ("wrong=after:wait", "so wait, so wa", 14),  # all behind the first match, whatever comes
        ("wrong=match:no\\Z", "all but no", 0),
    ],
)
def test_how_far_labels_are_settled(rule, text, upto):
    late = LateLabels([parse_rule(rule)])
    settled = [late.push(letter) for letter in text]
    assert settled[-1].upto == upto
    assert late.end().upto == len(text)


def test_several_rules_wait_for_each_other():
    late = LateLabels([parse_rule("a=match:x"), parse_rule("b=paragraph:y")])
    assert late.push("x x. y\nx") == (0, [])
    assert [section.label for section in late.push("\n\nx ").sections] == ["a", "b", "a", "a"]


def test_without_rules_all_is_settled():
    assert LateLabels([]).push("abc") == (3, [])


@given(text=texts, rule=st.sampled_from(RULES))
def test_a_chain_of_written_tokens_equals_that_of_the_text_read_afterwards(tokenizer, text, rule):
    """In every tensor, where the model wrote the tokens that its tokenizer would have made."""
    rules, head = [parse_rule(rule)], "why?\n\n"
    read = tokenize(labelled(text, rules), tokenizer, ["wrong"], section_labels=["wrong"])
    n = len(tokenizer(head)["input_ids"])
    ids = read.ids[n:].tolist()
    spelling = spell(tokenizer, read.ids[:n].tolist(), ids)
    if [*tokenizer(head)["input_ids"], *ids] != tokenizer(head + text)["input_ids"]:
        return  # the first letters of the text are in a token with the prompt's last ones
    written = labelled(spelling.text, rules, written=written_as(spelling, head, ids))
    chain = tokenize(written, tokenizer, ["wrong"], section_labels=["wrong"])
    assert spelling.text == text
    same_chain(chain, read)


def same_chain(chain: Chain, other: Chain) -> None:
    """All tensors of two chains are the same."""
    for name in ("ids", "codes", "support", "sections", "sentence_end"):
        assert torch.equal(getattr(chain, name), getattr(other, name)), name
    assert chain.start == other.start


@pytest.mark.parametrize("model", ["bpe", "unigram"])
@pytest.mark.parametrize("text", [" so é is 漢🙂. no\n wait", " a🙂🙂b. Ω", " .\n\n é"])
def test_tokens_of_letters_and_bytes_spell_what_they_were_made_of(model, text):
    tokenizer, rules = make_letters(model), [parse_rule("wrong=sentence:is|Ω")]
    read = tokenize(labelled(text, rules), tokenizer, ["wrong"])
    n = read.start
    spelling = spell(tokenizer, read.ids[:n].tolist(), read.ids[n:].tolist())
    assert spelling.text == text
    head = "why?\n\n"
    assert tokenizer(head, add_special_tokens=False)["input_ids"] == read.ids[1:n].tolist()
    written = labelled(text, rules, written=written_as(spelling, head, read.ids[n:].tolist()))
    same_chain(tokenize(written, tokenizer, ["wrong"]), read)
