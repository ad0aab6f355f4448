"""What is shown of the chains that will be fed is what the probes get, token by token."""

from typing import Any

import numpy as np
import pytest
import torch
from builders import load_chains, make_rows

from streamprobe.data.tokenize import Chain
from streamprobe.lags import INSIDE, ONSET, OUTSIDE, UNKNOWN, Column, make_columns
from streamprobe.reporting import fed_tokens
from streamprobe.reporting.fed_tokens import NEGATIVE, NOT_ASKED, POSITIVE, Word, choose, collect, words

LABELS = ["backtracking", "deduction"]
COLUMNS = make_columns(LABELS, ["token", "onset", "within"], [-3, 0, 2, 5])
ODD = "wait, é 中文 🙂\n\n\tso  naïve \ufffd \\x41 <b>"


def by_hand(codes: list[int], support: list[bool], t: int, column: Column) -> int:
    """What a column asks of token t, as docs/data.md says it; codes [T] of its label."""
    there = t + column.lag
    if not support[t] or not 0 <= there < len(codes):
        return NOT_ASKED
    if column.target == "within":
        ahead = codes[t + 1 : there + 1]
        return NOT_ASKED if UNKNOWN in ahead else POSITIVE if ONSET in ahead else NEGATIVE
    if codes[there] == UNKNOWN or (column.target == "onset" and column.lag > 0 and codes[t] != OUTSIDE):
        return NOT_ASKED
    return POSITIVE if codes[there] >= (ONSET if column.target == "onset" else INSIDE) else NEGATIVE


def shown(tokenizer: Any, most: int = 8) -> tuple[dict[str, Any], list[Any]]:
    splits, _ = load_chains(make_rows(40, seed=3), tokenizer, LABELS)
    return splits, collect(splits, COLUMNS, labels=LABELS, arrays=LABELS, tokenizer=tokenizer, most=most)


def differences(chain: Any, lag: int = 0) -> int:
    """How many of its tokens are asked otherwise than by hand, for columns that look `lag` further."""
    codes, support = chain.codes.T.tolist(), chain.support.tolist()
    return sum(
        int(chain.asked[t, k]) != by_hand(codes[LABELS.index(c.label)], support, t, c._replace(lag=c.lag + lag))
        for k, c in enumerate(COLUMNS)
        for t in range(len(support))
    )


def test_each_token_is_shown_as_it_is_fed(tokenizer: Any) -> None:
    splits, chains = shown(tokenizer)
    assert len(chains) == 8
    for each in chains:
        fed = next(chain for chain in splits[each.split] if chain.id == each.id)
        assert (each.first, each.length, each.start) == (0, len(fed.ids), fed.start)
        assert each.ids == fed.ids.tolist()
        assert torch.equal(each.codes, fed.codes) and torch.equal(each.support, fed.support)
        assert differences(each) == 0


def test_what_is_asked_fails_without_the_right_lag(tokenizer: Any) -> None:
    _, chains = shown(tokenizer)
    assert all(differences(chain, lag=1) for chain in chains)


def test_the_words_of_a_byte_level_tokenizer_join_to_its_text(tokenizer: Any) -> None:
    ids = tokenizer(ODD, add_special_tokens=False)["input_ids"]
    found = words(ids, tokenizer)
    read = b"".join(
        word.text.encode().decode("unicode_escape").encode("latin-1") if word.kind == "bytes" else word.text.encode()
        for word in found
    )
    assert read.decode() == ODD
    assert {word.kind for word in found} == {"text", "bytes"} and any("\\x" in word.text for word in found)


def test_the_words_fail_to_join_without_the_bytes_of_split_characters(tokenizer: Any) -> None:
    ids = tokenizer(ODD, add_special_tokens=False)["input_ids"]
    assert "".join(tokenizer.decode([token]) for token in ids) != ODD


def byte_fallback() -> Any:
    """A tokenizer that marks spaces by ▁ and writes letters that it does not know as bytes, as Llama 2's does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["<unk>", *(f"<0x{n:02X}>" for n in range(256)), "▁", "▁so", "▁it", "so", "s", "o", "i", "t"]
    model = models.BPE({piece: n for n, piece in enumerate(pieces)}, [], byte_fallback=True, unk_token="<unk>")
    core = Tokenizer(model)
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")


def test_spaces_and_bytes_of_other_tokenizers_are_shown() -> None:
    tokenizer = byte_fallback()
    ids = tokenizer.convert_tokens_to_ids(["▁so", "so", "▁it", "<0xC3>", "<0xA9>", "<0x41>"])
    texts = [(" so", "text"), ("so", "text"), (" it", "text"), ("\\xc3", "bytes"), ("\\xa9", "bytes"), ("A", "text")]
    assert words(ids, tokenizer) == [Word(*each) for each in texts]
    assert tokenizer.decode(ids[:1]) == "so", "of which a space is lost, decoded alone"


def test_special_tokens_are_shown_by_their_names(tokenizer: Any) -> None:
    assert words([0, 1], tokenizer) == [Word("<s>", "special"), Word("</s>", "special")]


# --- which chains ---


def made(row: int, positive: bool, length: int = 12, onset: int = 4) -> Chain:
    codes = torch.zeros(length, 1, dtype=torch.int8)
    if positive:
        codes[onset], codes[onset + 1] = ONSET, INSIDE
    return Chain(str(row), torch.full((length,), 5), codes, torch.ones(length, dtype=torch.bool), row=row)


def test_chains_are_of_every_split_with_sections_first() -> None:
    train = [made(row, row % 2 == 0) for row in range(50)]
    held_out = [made(row, row % 10 == 0) for row in range(50, 80)]
    splits = {"train": train, "validation": held_out[:10], "test": held_out[10:]}
    chosen = choose(splits, 8, 1)
    has = [(name, bool((chain.codes >= INSIDE).any())) for name, chain in chosen]
    assert has == [
        *[("train", True)] * 2,
        ("train", False),
        ("validation", True),
        *[("validation", False)] * 2,
        *[("test", True)] * 2,
    ]
    rows = [chain.row for _, chain in chosen]
    assert len(set(rows)) == 8 and rows[0] < 20 < rows[1], "spaced"


@pytest.mark.parametrize("most, n", [(1, 1), (2, 2), (8, 8), (100, 12)])
def test_no_chain_is_shown_twice_where_validation_is_the_test(most: int, n: int) -> None:
    test = [made(row, True) for row in range(8, 12)]
    chosen = choose({"train": [made(row, row == 3) for row in range(8)], "validation": test, "test": test}, most, 1)
    assert len({chain.row for _, chain in chosen}) == len(chosen) == n


def test_other_label_arrays_make_no_section() -> None:
    chain = made(0, False)
    permuted = torch.cat([chain.codes, torch.full_like(chain.codes, INSIDE)], 1)
    both = [Chain("0", chain.ids, permuted, chain.support), made(1, True)]
    assert [chain.row for _, chain in choose({"train": both}, 2, 1)] == [1, 0]


@pytest.mark.parametrize("onset", [2, 500, 1190])
def test_a_long_chain_is_cut_to_where_a_section_begins(tokenizer: Any, monkeypatch, onset: int) -> None:
    monkeypatch.setattr(fed_tokens, "ROOM", 0)
    chain = made(0, True, length=1200, onset=onset)
    [found] = collect(
        {"test": [chain]}, [Column("a", "token", 3)], labels=["a"], arrays=["a"], tokenizer=tokenizer, most=1
    )
    n = len(found.ids)
    assert n == fed_tokens.SHORTEST == len(found.codes) == len(found.words) == len(found.asked) == len(found.support)
    where = np.flatnonzero(found.codes[:, 0].numpy() == ONSET)
    assert where.tolist() == [onset - found.first] and 0 <= found.first <= 1200 - n
    before = np.flatnonzero(found.asked[:, 0].numpy() == POSITIVE)
    assert {int(t) + 3 + found.first for t in before} <= {onset, onset + 1}
