"""Many texts, a window at a time: the order of the data, and what became of each text."""

import json

import pytest
import torch
from builders import make_record, make_rows
from transformers import AutoModelForCausalLM

from streamprobe.data.records import Refused
from streamprobe.data.tokenize import TextOptions
from streamprobe.tools import score_windows
from streamprobe.tools.score import ScoredText, score
from streamprobe.tools.score_tables import ScoredRecord
from streamprobe.tools.score_windows import Scorer, Summary, Tally, score_records

ROWS = make_rows(12, seed=3)


@pytest.fixture
def scorer(model_dir, tokenizer, bank):
    """In float64, so that the rounding of padded batches stays far below what is tested."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float64).eval()
    return Scorer(model, tokenizer, bank, TextOptions(), 300)


@pytest.fixture
def records():
    """Twelve texts of different lengths, the third and the sixth of which cannot be scored."""
    made = [make_record(row["problem"], row["reasoning_chain"], id=row["task_id"]) for row in ROWS]
    made[2] = Refused("without any text", id="empty")
    made[5] = make_record("", "wait " * 600, id="long")
    return [type(each)(**vars(each) | {"row": row}) for row, each in enumerate(made)]


@pytest.fixture(params=[(4, 10**6), (256, 200), (256, 2**16)], ids=["texts", "tokens", "one window"])
def small(request, monkeypatch):
    monkeypatch.setattr(score_windows, "TEXTS", request.param[0])
    monkeypatch.setattr(score_windows, "TOKENS", request.param[1])


def test_texts_come_in_the_order_of_the_data_scored_as_alone(scorer, records, small):
    tally, seen = Tally(), []
    for window in score_records(records, scorer, tally):
        seen += window
        assert tally.scored == len(seen)
    assert [each.record.row for each in seen] == [0, 1, 3, 4, 6, 7, 8, 9, 10, 11]
    for each in seen:
        own = score(scorer.probes, scorer.model, scorer.tokenizer, (each.record.problem, each.record.response))
        torch.testing.assert_close(each.text.probabilities, own.probabilities, atol=1e-6, rtol=0)
    assert tally.read == 12 and tally.tokens == sum(len(each.text.tokens) for each in seen)
    assert tally.left_out == {
        "without any text": ["empty"],
        "longer than the model's context of 512 tokens": ["long"],
    }


def test_a_second_beginning_between_two_windows_gives_the_same_rest(scorer, records, small):
    whole, part, tally = [], [], Tally()
    for window in score_records(records, scorer, tally):
        whole.append(window)
        if len(whole) == 1:
            state = json.loads(json.dumps(tally.as_dict()))
    again = Tally(**state)
    part = [whole[0], *score_records(records, scorer, again)]
    assert again == tally and list(map(len, part)) == list(map(len, whole))
    for a, b in zip(sum(part, []), sum(whole, []), strict=True):
        assert a.record is b.record and torch.equal(a.text.probabilities, b.text.probabilities)


def test_no_more_than_a_window_is_held(scorer, records, monkeypatch):
    monkeypatch.setattr(score_windows, "TEXTS", 3)
    sizes = [len(window) for window in score_records(records, scorer, Tally())]
    assert max(sizes) == 3 and len(sizes) == 4
    monkeypatch.setattr(score_windows, "TEXTS", 12)
    assert [len(window) for window in score_records(records, scorer, Tally())] == [10]  # negative control


def test_a_text_with_activations_that_are_no_numbers_is_named(scorer, records):
    word = scorer.tokenizer("Puzzle 3:")["input_ids"][2]
    with torch.no_grad():
        scorer.model.model.embed_tokens.weight[word] = torch.inf
    tally = Tally()
    seen = [each for window in score_records(records, scorer, tally) for each in window]
    reason = "with activations that are infinite or not numbers"
    assert tally.n_left_out[reason] == 10 - len(seen) > 0 and tally.left_out[reason]
    assert all(each.text.probabilities.isfinite().all() for each in seen)


def test_the_tally_in_words():
    tally = Tally(read=1020, scored=1000, tokens=70000, without_problem=7)
    for number in range(20):
        tally.leave_out(Refused("", id=f"t{number}"), "without any text")
    first, second, third = tally.lines("{problem}\n\n")
    assert first == "1,000 of 1,020 texts scored, 70,000 tokens"
    assert second == "7 of these have no problem: the prompt stands around an empty one"
    assert third.startswith("not scored: 20 texts without any text: t0, t1, ") and third.endswith("t9 and 10 more")
    assert len(tally.lines("no problem in it")) == 2 and len(tally.lines("chat")) == 3


def texts(values, id="a", row=0):
    """A text of one letter a token, with these probabilities."""
    response = "abcdefghijklmnopqrstuvwxyz"[: len(values)]
    offsets = torch.tensor([(i, i + 1) for i in range(len(values))])
    given = torch.tensor(values).reshape(-1, 1, 1)
    record = make_record("", response, id=id)
    text = ScoredText(offsets[:, 0], list(response), offsets, given)
    return ScoredRecord(type(record)(**vars(record) | {"row": row}), text, record.response)


def test_a_summary_counts_alarms_where_they_begin_and_shows_where_the_probability_is_highest():
    summary = Summary(0.5)
    summary.add(texts([0.5, 0.6, 0.1, 0.9, 0.2, 0.7], "x"))
    summary.add(texts([0.1, 0.2], "y"))
    head, first, second = summary.lines()
    assert first.split() == ["x", "6", "0.900", "3", "abc▲def"] and second.split() == ["y", "2", "0.200", "0", "a▲b"]
    assert summary.alarmed == 1 and head.startswith("text")


def test_a_summary_keeps_the_highest_whatever_their_number():
    summary, values = Summary(0.5), torch.rand(500, generator=torch.Generator().manual_seed(0))
    for row, value in enumerate(values.tolist()):
        summary.add(texts([0.0, value], f"t{row}", row))
    shown = [line.split()[0] for line in summary.lines()[1:]]
    assert shown == [f"t{row}" for row in values.argsort(descending=True)[:20].tolist()]
    assert len(summary.peaks) == 20 and summary.alarmed == int((values >= 0.5).sum())
    for row in range(600, 630):
        summary.add(texts([2.0], f"t{row}", row))
    assert [line.split()[0] for line in summary.lines()[1:]] == [f"t{row}" for row in range(600, 620)]  # the first ones


def test_without_a_threshold_nothing_is_an_alarm():
    summary = Summary(float("nan"))
    summary.add(texts([0.5, 0.99]))
    assert summary.alarmed == 0
