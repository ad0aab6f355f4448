"""Every text is used, or refused by name: texts without a section, without an id, or with half a character."""

import json
import re
from typing import Any

import pytest
import torch
from builders import load_chains, make_rows

from streamprobe.data.preflight import refusals
from streamprobe.data.records import FormatOptions
from streamprobe.data.tokenize import TextOptions

FIELDS = ("task_id", "problem", "reasoning_chain", "annotated_chain")
LABELS = ["backtracking"]


def test_records_that_are_not_unicode_are_refused_by_name(tokenizer):
    rows: list[dict[str, Any]] = [row | {"kind": "a"} for row in make_rows(20, seed=2)]
    rows[0]["task_id"] += "\ud83d"
    rows[1]["kind"] = "\ud83d"
    rows[2]["annotated_chain"] = rows[2]["annotated_chain"].replace("deduction", "deduc\ud83dtion", 1)
    rows[3]["problem"] += "\udc00"
    _, counts = load_chains(rows, tokenizer, LABELS, 512, fields=FormatOptions(category="kind"))
    assert counts.refused == {
        "with an id or a category that is not Unicode": [r"alpha_0\ud83d", "beta_0"],
        "with text that is not Unicode": ["delta_0"],
    }
    assert counts.strange_tags == {'["deduc\\ud83dtion"]': 1}  # no label, and shown as what it is
    json.dumps(counts.as_dict(), ensure_ascii=False).encode()  # what is written can be written
    refusals(counts).encode()


def plain_rows(n: int = 60, n_plain: int = 12) -> list[dict[str, str]]:
    """Annotated rows, the first of them without a tag."""
    rows = make_rows(n, seed=9)
    for row in rows[:n_plain]:
        row["annotated_chain"] = row["reasoning_chain"]
    return rows


def letter_tokenizer() -> Any:
    """Every letter is a token, so that a share of tokens is one of letters."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=core)


def base_rate(rows: list[dict[str, str]], unlabelled: str) -> tuple[float, Any]:
    """Positives over labelled letters, and the counts."""
    splits, counts = load_chains(rows, letter_tokenizer(), LABELS, 9999, text=TextOptions(unlabelled=unlabelled))
    codes = torch.cat([chain.codes[:, 0] for split in splits.values() for chain in split])
    return float((codes > 0).sum() / (codes >= 0).sum()), counts


def test_texts_without_a_section_are_negatives_where_unlabelled_text_is():
    rows = plain_rows()
    rate, counts = base_rate(rows, "negative")
    assert counts.used == 60 and counts.without_sections == 12 and not counts.refused
    hits = "".join("".join(re.findall(r'\["backtracking"\](.*?)\["end', r["annotated_chain"], re.S)) for r in rows)
    assert rate == pytest.approx(len(hits) / sum(len(row["reasoning_chain"]) for row in rows), abs=1e-6)


def test_base_rate_fails_without_the_texts_that_have_no_section():
    """The negative control: without them it is higher by a quarter."""
    right, wrong = (base_rate(rows, "negative")[0] for rows in (plain_rows(), plain_rows()[12:]))
    assert wrong > 1.15 * right


def test_texts_without_a_section_are_refused_by_name_where_unlabelled_text_is_ignored():
    rows = plain_rows()
    _, counts = base_rate(rows, "ignore")
    assert counts.refused == {"without a section": [row["task_id"] for row in rows[:12]]}
    assert refusals(counts) == "12 without a section (alpha_0, beta_0, gamma_0, ...)"


@pytest.mark.parametrize("unlabelled", ["ignore", "negative"])
def test_texts_none_of_whose_sections_is_found_are_refused_either_way(unlabelled):
    rows = plain_rows(n_plain=0)
    rows[7]["annotated_chain"] = '["backtracking"]1234 5678 90["end-section"]'
    _, counts = base_rate(rows, unlabelled)
    assert counts.refused == {"none of whose sections is found in the response": [rows[7]["task_id"]]}


def test_rejoined_sections_of_a_text_without_any_are_no_text(tokenizer):
    options = {"fields": FormatOptions(rejoined=True), "text": TextOptions(unlabelled="negative")}
    _, counts = load_chains(plain_rows(), tokenizer, LABELS, 512, **options)
    assert {reason: len(ids) for reason, ids in counts.refused.items()} == {"without a section": 12}


def test_rows_without_an_id_are_named_by_their_place(tokenizer):
    rows: list[dict[str, Any]] = [dict(row) for row in plain_rows(n_plain=2)]
    del rows[1]["task_id"]
    _, counts = load_chains(rows, tokenizer, LABELS, 512)
    assert counts.refused == {"without a section": ["alpha_0", "#2"]}
