"""The chains to read are those that the probe got most right and most wrong, with what every probe says of them."""

import math
from itertools import groupby
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scored_chains import LABEL, LENGTH
from torch import Tensor

from streamprobe.data.tokenize import Chain
from streamprobe.evaluation.results import Row, ScoredProbes
from streamprobe.evaluation.verdict import is_certain
from streamprobe.lags import INSIDE, UNKNOWN
from streamprobe.reporting.transcripts import LEVELS, UNASKED, collect, encode, pick, pieces, reference


def pick_by_loop(scores: Tensor, targets: Tensor, chain: Tensor, token: Tensor) -> dict[str, Any]:
    """The first hit, miss and false alarm, by going through all runs of all chains."""
    at = {(int(c), int(t)): (float(s), bool(y)) for s, y, c, t in zip(scores, targets, chain, token, strict=True)}
    runs = []
    places = sorted(place for place, (_, y) in at.items() if y)
    for (c, _), own in groupby(places, key=lambda p: (p[0], p[1] - sum(q[0] == p[0] and q[1] < p[1] for q in places))):
        tokens = [t for _, t in own]
        runs.append(((c, tokens[0], tokens[-1]), [at[c, t][0] for t in tokens]))
    quiet = [place for place, (_, y) in at.items() if not y]
    hit, _ = max(runs, key=lambda run: np.mean(run[1]))
    miss, _ = min(runs, key=lambda run: max(run[1]))
    return {"hit": hit, "miss": miss, "false alarm": max(quiet, key=lambda place: at[place][0])}


def random_tokens() -> dict[str, Tensor]:
    """1,100 tokens of 30 chains in no order, with scores that know nothing."""
    random = torch.Generator().manual_seed(3)
    chain, token = torch.arange(30).repeat_interleave(40), torch.arange(40).repeat(30)
    targets = torch.rand(1200, generator=random) < 0.4
    scores = torch.randn(1200, generator=random)
    kept = torch.randperm(1200, generator=random)[:1100]
    return {"scores": scores[kept], "targets": targets[kept], "chain": chain[kept], "token": token[kept]}


def test_picks_are_the_extremes_and_name_no_chain_twice() -> None:
    tokens = random_tokens()
    picks = pick(**tokens)
    assert [p.kind for p in picks] == ["hit"] * 4 + ["miss"] * 3 + ["false alarm"] * 3
    assert len({p.chain for p in picks}) == 10
    best = pick_by_loop(**tokens)
    assert (picks[0].chain, picks[0].first, picks[0].last) == best["hit"]
    assert best["miss"][0] in {p.chain for p in picks[:5]} and best["false alarm"][0] in {p.chain for p in picks[:8]}
    in_order = (40 * tokens["chain"] + tokens["token"]).argsort()
    assert picks == pick(**{name: values[in_order] for name, values in tokens.items()})


def test_picks_fail_to_be_the_extremes_without_the_right_sign() -> None:
    tokens = random_tokens()
    first, *_ = pick(**{**tokens, "scores": -tokens["scores"]})
    assert (first.chain, first.first, first.last) != pick_by_loop(**tokens)["hit"]


def test_few_chains_give_few_picks() -> None:
    chain = torch.tensor([0, 0, 1, 1])
    picks = pick(torch.arange(4.0), torch.tensor([True, False, False, False]), chain, torch.tensor([0, 1, 0, 1]))
    assert [(p.kind, p.chain, p.first, p.last) for p in picks] == [("hit", 0, 0, 0), ("false alarm", 1, 1, 1)]


@given(st.text(st.characters(codec="utf-8", exclude_characters="\ufffd"), max_size=40))
def test_pieces_join_to_the_text(tokenizer: Any, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    texts = pieces(ids, tokenizer)
    assert len(texts) == len(ids) and "".join(texts) == tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def test_a_letter_of_several_tokens_is_whole(tokenizer: Any) -> None:
    ids = tokenizer("a 中 b", add_special_tokens=False)["input_ids"]
    texts = pieces(ids, tokenizer)
    assert "".join(texts) == "a 中 b" and "\ufffd" not in "".join(texts) and "" in texts


def test_a_letter_of_several_tokens_fails_to_be_whole_without_its_neighbours(tokenizer: Any) -> None:
    ids = tokenizer("a 中 b", add_special_tokens=False)["input_ids"]
    assert "\ufffd" in "".join(piece for i in ids for piece in pieces([i], tokenizer))


PROBABILITY = torch.linspace(0, 1, 1001)


def decode(text: str) -> Tensor:
    """What report.html makes of letters: probabilities, -1 where a probe is not asked."""
    return torch.tensor([-1.0 if letter == UNASKED else (LEVELS.index(letter) / 63) ** 2 for letter in text])


def test_a_letter_stands_for_a_probability() -> None:
    read = decode(encode(PROBABILITY, torch.arange(1001) != 500, None))
    assert read[500] == -1 and len(set(LEVELS)) == 64 and UNASKED not in LEVELS
    error = (read - PROBABILITY).abs()
    error[500] = 0
    assert error.max() < 1 / 63 and error[:10].max() < 0.003, "finest where events are rare"


@pytest.mark.parametrize("threshold", [0.003, 0.1234, 0.9])
def test_a_letter_is_on_the_side_of_the_threshold_of_its_probability(threshold: float) -> None:
    near = decode(encode(PROBABILITY, torch.ones(1001, dtype=torch.bool), threshold))
    assert torch.equal(near >= threshold, PROBABILITY >= threshold) and (near - PROBABILITY).abs().max() < 2.1 / 63


@pytest.mark.parametrize("threshold", [0.003, 0.1234, 0.9])
def test_a_letter_fails_to_be_on_that_side_without_the_threshold(threshold: float) -> None:
    near = decode(encode(PROBABILITY, torch.ones(1001, dtype=torch.bool), None))
    assert not torch.equal(near >= threshold, PROBABILITY >= threshold)


def test_transcripts_hold_what_every_probe_says(
    transcripts: dict[str, Any], groups: list[ScoredProbes], rows: list[Row], chains: list[Chain]
) -> None:
    assert [(p["layer"], p["lag"]) for p in transcripts["probes"]] == [(3, 0), (12, 0), (3, 8), (12, 8)]
    assert transcripts["probes"][0]["threshold"] == round(1 / (1 + math.e), 4)
    best = max((r for r in rows if not r["control"]), key=lambda r: r["lift"])
    assert {name: best[name] for name in ("layer", "lag")}.items() <= transcripts["reference"].items()
    scored = groups[0].scored
    for shown in transcripts["chains"]:
        number = int(shown["id"].split()[0])
        assert shown["id"] == chains[number].id and shown["first"] == 0 and shown["length"] == LENGTH
        codes = [UNKNOWN if letter == "-" else int(letter) for letter in shown["codes"][0]]
        assert codes == chains[number].codes[:, 0].tolist()
        own = scored.chain == number
        for said, (i, k) in zip(shown["said"], ((0, 0), (1, 0), (0, 1), (1, 1)), strict=True):
            expected = scored.scores[own, i, k].sigmoid().tolist()
            for letter, p, asked in zip(said, expected, scored.valid[own, k].tolist(), strict=True):
                assert (letter == UNASKED) == (not asked)
                assert not asked or abs((LEVELS.index(letter) / 63) ** 2 - p) < 1 / 63
        positive = [codes[t] >= INSIDE for t in range(shown["at"][0], shown["at"][1] + 1)]
        assert all(positive) if shown["kind"] != "false alarm" else not any(positive)


def test_excerpts_get_shorter_rather_than_the_file_large(
    groups: list[ScoredProbes], rows: list[Row], chains: list[Chain], tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streamprobe.reporting.transcripts.ROOM", 4 * 10 * 45)  # probes, chains, tokens
    few = collect(groups, rows, chains, labels=[LABEL], tokenizer=tokenizer)["chains"]
    assert len(few) == 10 and all(len(c["tokens"]) == len(c["said"][0]) == len(c["codes"][0]) == 45 for c in few)
    assert all(c["first"] <= c["at"][0] and c["at"][1] < c["first"] + 45 for c in few)
    monkeypatch.setattr("streamprobe.reporting.transcripts.ROOM", 4 * 2 * 40)
    assert len(collect(groups, rows, chains, labels=[LABEL], tokenizer=tokenizer)["chains"]) == 2


def test_what_the_probe_that_picks_has_is_said(
    groups: list[ScoredProbes], gained_rows: list[Row], chains: list[Chain], tokenizer: Any
) -> None:
    further = {**next(row for row in gained_rows if is_certain(row)), "kind": "mlp64", "lag": 40}
    further["over_linear_low_corrected"] = 0.01
    for rows, said in (
        (gained_rows, "the verdict"),
        ([*gained_rows, further], "the furthest certain lag of all linear"),
    ):
        found = collect(groups, rows, chains, labels=[LABEL], tokenizer=tokenizer)
        assert found["picked_by"].startswith(said) and found["reference"]["lag"] == 8


def test_without_a_class_nothing_is_picked(rows: list[Row], chains: list[Chain], tokenizer: Any) -> None:
    blank = [{**row, "auroc": math.nan, "lift": math.nan} for row in rows]
    assert reference(blank) is None
    empty = collect([], blank, chains, labels=[LABEL], tokenizer=tokenizer)
    assert empty["chains"] == [] and empty["reference"] is None
    assert empty["picked_by"] == "the highest AUROC"
    bare = [{**row, "lift": math.nan} for row in rows]
    assert reference(bare)["auroc"] == max(row["auroc"] for row in rows if not row["control"])
