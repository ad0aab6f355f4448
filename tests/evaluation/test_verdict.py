"""What the sentence below a table says, and when it says nothing."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from nested_samples import group, rows_of

from streamprobe.evaluation.results import judge
from streamprobe.evaluation.rows import COMPARED, JOINT_CHAIN, Judged
from streamprobe.evaluation.verdict import is_certain, probe_of_verdict, verdicts
from streamprobe.lags import Column

LAGS = (2, 4, 8)
BEYOND = "beyond text, position, sections so far and the chain's own rate"
LOOKED = "[newton, corrected for the 6 probes looked at]"
KNOWN = {"solver": "newton", "label": "back", "target": "onset", "n_positive_chains": 40, "gradient_norm": 1e-4}


def row(layer: int | str, lag: int, low: float = -0.001, gain: float = 0.0312, **other: Any) -> dict[str, Any]:
    """A row with a corrected low end of both gains, and the fields that a verdict reads."""
    bounds = {f"gain_{name}_low_corrected": low for name in ("bits", "within")}
    own = {
        "kind": "linear",
        "site": "resid_post",
        "layer": layer,
        "lag": lag,
        "control": "",
        "auroc": 0.7,
        "gain_bits": gain,
        "penalty": 1.0,
    }
    return {**COMPARED, **KNOWN, **own, **bounds, "nested_gradient_norm": 1e-4, **other}


def control(lag: int, **other: Any) -> dict[str, Any]:
    """A row of the joint control."""
    return {**row("", lag), **COMPARED, "control": JOINT_CHAIN, "gradient_norm": 1e-5, **other}


def family(certain: Mapping[int, float], lags: Sequence[int] = LAGS, **other: Any) -> list[dict[str, Any]]:
    """Layers 3 and 15 and the joint control at some lags; layer 15 has the low ends of `certain` at its lags."""
    layers = [row(layer, lag, certain.get(lag, -0.001) if layer == 15 else -0.001) for layer in (3, 15) for lag in lags]
    return [each | other for each in [*layers, *(control(lag) for lag in lags)]]


def said(rows: Sequence[Mapping[str, Any]], resampled: int = 10, **more: Any) -> str:
    [sentence] = verdicts([Judged(dict(each), torch.zeros(resampled)) for each in rows], 1e-3, **more)
    return sentence


def claim(start: str, gain: str = "0.031", low: str = "0.012", rest: str = "") -> str:
    return f"back: {start} (layer 15; {BEYOND}), by {gain} bits a token, at least {low}{rest} {LOOKED}"


# --- a claim ---


@pytest.mark.parametrize(
    ("certain", "expected"),
    [
        (
            {4: 0.0129},
            claim("onset is foreseen 4 tokens ahead", rest="; not at 2; from 8 tokens on nothing is certain"),
        ),
        (
            {2: 0.1, 4: 0.0129},
            claim("onset is foreseen 4 tokens ahead", rest="; also at 2; from 8 tokens on nothing is certain"),
        ),
        ({2: 0.1, 4: 0.2, 8: 0.0129}, claim("onset is foreseen 8 tokens ahead", rest="; also at 2 and 4")),
        ({2: 0.1, 8: 0.0129}, claim("onset is foreseen 8 tokens ahead", rest="; also at 2, not at 4")),
        ({8: 0.0129}, claim("onset is foreseen 8 tokens ahead", rest="; not at 2 and 4")),
        ({2: 0.0129}, claim("onset is foreseen 2 tokens ahead", rest="; from 4 tokens on nothing is certain")),
    ],
)
def test_the_furthest_certain_lag_is_named_with_the_others(certain: dict[int, float], expected: str) -> None:
    assert said(family(certain)) == expected


def test_one_token_is_one_token() -> None:
    assert said(family({1: 0.0129}, (1, 2, 3))) == claim(
        "onset is foreseen 1 token ahead", rest="; from 2 tokens on nothing is certain"
    )
    assert "; from 1 token on" not in said(family({1: 0.1}, (-1, 0, 1, 2, 3)))


@pytest.mark.parametrize(
    ("target", "start", "rest"),
    [
        ("token", "a token inside back is foreseen 4 tokens ahead", "; not at 2; from 8 tokens on nothing is certain"),
        (
            "within",
            "a beginning within the next 4 tokens is foreseen",
            "; not within 2; from 8 tokens on nothing is certain",
        ),
    ],
)
def test_each_target_is_said_in_its_own_words(target: str, start: str, rest: str) -> None:
    assert said(family({4: 0.0129}, target=target)) == claim(start, rest=rest)


def test_the_probe_that_is_named_has_the_largest_low_end() -> None:
    rows = [*family({4: 0.0129}), row(20, 4, 0.02, 0.1), row(21, 4, 0.019, 0.4), row(22, 2, 0.9)]
    assert "(layer 20; " in said(rows) and "by 0.100 bits a token, at least 0.020" in said(rows)
    assert probe_of_verdict([each for each in rows if not each["control"]])["layer"] == 20


def test_small_numbers_show_two_digits_and_low_ends_are_rounded_down() -> None:
    small = [each | {"gain_bits": 0.00123456} for each in family({8: 0.000129})]
    assert "by 0.00123 bits a token, at least 0.00012;" in said(small)


@pytest.mark.parametrize("lacking", ["gain_bits_low_corrected", "gain_within_low_corrected"])
def test_a_claim_fails_without_one_of_the_two_gains(lacking: str) -> None:
    rows = family({4: 0.0129})
    for each in rows:
        if not each["control"]:
            each[lacking] = -1e-9
    assert "nothing certain" in said(rows) and not any(map(is_certain, rows))


def test_lift_claims_nothing() -> None:
    rows = [each | {"lift": 0.3, "lift_low": 0.2, "lift_low_corrected": 0.2} for each in family({})]
    assert "nothing certain" in said(rows)


def test_lags_that_do_not_look_ahead_are_not_looked_at() -> None:
    rows = [*family({}), row(3, 0, 0.5), row(15, -4, 0.5), control(0), control(-4)]
    assert "nothing certain" in said(rows) and LOOKED in said(rows)
    assert not is_certain(row(3, 0, 0.5)) and is_certain(row(3, 1, 0.5))  # negative control


# --- nothing to claim ---


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("onset", "nothing certain is foreseen of onset, 2 to 8 tokens ahead"),
        ("token", "nothing certain is foreseen of a token inside back, 2 to 8 tokens ahead"),
        ("within", "nothing certain is foreseen of a beginning, within the next 2 to 8 tokens"),
    ],
)
def test_nothing_certain_is_said_with_how_many_were_looked_at(target: str, expected: str) -> None:
    assert said(family({}, target=target)) == f"back: {expected} ({BEYOND}) {LOOKED}"


def test_a_single_probe_is_one_probe() -> None:
    assert said([row(3, 4), control(4)]) == (
        f"back: nothing certain is foreseen of onset, 4 tokens ahead ({BEYOND}) "
        "[newton, corrected for the 1 probe looked at]"
    )


def unknown(rows: Sequence[Mapping[str, Any]], **other: Any) -> list[dict[str, Any]]:
    """The rows without corrected low ends."""
    return [
        {**each, "gain_bits_low_corrected": math.nan, "gain_within_low_corrected": math.nan} | other for each in rows
    ]


def without_gains(rows: Sequence[Mapping[str, Any]], **other: Any) -> list[dict[str, Any]]:
    """The rows as they are where there are no nested probes."""
    return [{**each, **COMPARED, **other} for each in rows]


def test_no_verdict_says_what_is_missing() -> None:
    rows, start = family({4: 0.1}), "back: no verdict on onset, since "
    assert said([each | {"lag": -each["lag"]} for each in rows]) == f"{start}no lag is above 0 (--lags) [newton]"
    assert said(without_gains([each for each in rows if not each["control"]])) == (
        f"{start}the control joint+chain was not trained (--controls) [newton]"
    )
    assert said(without_gains(rows, solver="adam")) == (
        f"{start}adam trains no probe that reads joint+chain and a layer (--solvers newton) [adam]"
    )
    assert said(unknown(rows, n_positive_chains=3)) == (
        f"{start}at most 3 test chains hold a positive, and 10 are needed [newton]"
    )
    assert said(unknown(rows)) == (f"{start}fewer than 10 test chains hold both a positive and a negative [newton]")
    assert said(unknown(rows), resampled=0) == f"{start}nothing was resampled (--bootstrap) [newton]"
    for n, held in ((0, "no test chain holds"), (1, "at most 1 test chain holds")):
        found = said(without_gains(rows, n_positive_chains=n), resampled=0)
        assert found == f"{start}{held} a positive, and 10 are needed [newton]"
    assert said(without_gains(rows, target="token"), whole_texts=["back"]) == (
        "back: no verdict on a token inside back, since every text is all inside or all outside: "
        "nothing of it lies ahead [newton]"
    )
    assert "no verdict on a beginning, since" in said(without_gains(rows, target="within"), whole_texts=["back"])


def test_each_family_has_its_sentence() -> None:
    """That of Adam has no nested probes, though the joint control was trained with Newton."""
    newton, adam = family({4: 0.1}), without_gains([row(3, 4), row(15, 4)], solver="adam")
    other = family({}, target="token")
    found = verdicts([Judged(each, torch.zeros(5)) for each in [*newton, *adam, *other]], 1e-3)
    assert [sentence.split("[")[1].split(",")[0].rstrip("]") for sentence in found] == ["adam", "newton", "newton"]
    assert "adam trains no probe" in found[0] and "foreseen 4 tokens" in found[1] and "a token inside" in found[2]


# --- not converged ---

WARNING = " WARNING: not converged (gradient norm 6.8e-02, tolerance 1.0e-0{}): raise --max_passes"
PERHAPS = " WARNING: perhaps not converged (gradient norm unknown, tolerance 1.0e-03): raise --max_passes"


def put(rows: Sequence[dict[str, Any]], layer: object, lag: int, **fields: Any) -> list[dict[str, Any]]:
    """The rows with other fields at one place."""
    return [each | (fields if (each["layer"], each["lag"]) == (layer, lag) else {}) for each in rows]


@pytest.mark.parametrize(
    ("layer", "lag", "warns"),
    [(15, 4, True), (15, 2, True), (15, 8, False), (3, 4, False), ("", 4, True), ("", 2, True), ("", 8, False)],
)
def test_a_claim_warns_where_it_rests_on_a_probe_that_is_not_converged(layer: object, lag: int, warns: bool) -> None:
    field = "nested_gradient_norm" if layer else "gradient_norm"
    rows = family({2: 0.1, 4: 0.0129})
    assert "WARNING" not in said(rows)
    assert said(put(rows, layer, lag, **{field: 0.068})) == said(rows) + (
        WARNING.format(3 if layer else 4) if warns else ""
    )
    assert said(put(rows, layer, lag, **{field: math.nan})) == said(rows) + (PERHAPS if warns else "")


@pytest.mark.parametrize(("layer", "lag"), [(15, 4), (3, 8), ("", 2)])
def test_nothing_certain_warns_of_any_probe_that_is_not_converged(layer: object, lag: int) -> None:
    field, rows = "nested_gradient_norm" if layer else "gradient_norm", family({})
    warning = WARNING.format(3 if layer else 4)
    assert said(put(rows, layer, lag, **{field: 0.068})) == said(rows) + warning
    assert said(put(put(rows, 3, 2, nested_gradient_norm=math.nan), layer, lag, **{field: 0.068})).endswith(warning)


@pytest.mark.parametrize("low, claimed", [(2e-6, True), (5e-7, False)])
def test_no_gain_is_claimed_that_is_less_than_training_leaves_open(low: float, claimed: bool) -> None:
    rows = put(family({4: 0.0129}), 15, 4, gain_bits_low_corrected=low)
    assert ("nothing certain" in said(rows)) != claimed


def test_the_control_is_to_be_solved_more_exactly() -> None:
    rows = family({4: 0.0129})
    assert said(put(rows, "", 4, gradient_norm=5e-4)) == said(rows) + WARNING.format(4).replace("6.8e-02", "5.0e-04")
    assert said(put(rows, 15, 4, nested_gradient_norm=5e-4)) == said(rows)  # negative control


def test_a_probe_that_is_the_control_needs_no_passes_of_its_own() -> None:
    rows = family({})
    assert said(put(rows, 3, 2, nested_gradient_norm=0.068, penalty=math.inf)) == said(rows)


def test_another_tolerance_is_another_warning() -> None:
    judged = [Judged(each, torch.zeros(5)) for each in put(family({}), 3, 2, nested_gradient_norm=5e-4)]
    assert "WARNING" not in verdicts(judged, 1e-3)[0] and "tolerance 1.0e-04" in verdicts(judged, 1e-4)[0]


# --- of scores ---


def claims_of_chains(seed: int, foresees: float, n: int = 60, length: int = 25) -> tuple[str, list[dict[str, Any]]]:
    """The verdict on chains whose rates two layers know better than the control; one of them foresees at lag 4."""
    random = torch.Generator().manual_seed(seed)
    chain = torch.arange(n).repeat_interleave(length)
    rate, ahead = torch.randn(n, generator=random)[chain], torch.randn(len(chain), generator=random)
    logits = torch.stack([rate - 1 + foresees * ahead, rate - 1], 1)
    targets = torch.rand(len(chain), 2, generator=random) < logits.sigmoid()
    control = (rate - 1 + 0.7 * torch.randn(n, generator=random)[chain])[:, None].expand(-1, 2)
    scores = torch.stack([control, (rate - 1)[:, None].expand(-1, 2), logits], 1)
    columns = [Column("back", "onset", lag) for lag in (4, 8)]
    nested = group(scores, targets, chain, columns=columns, layers=[3, 5])
    judged = judge([*rows_of(nested), nested], n, 200, seed)
    [sentence] = verdicts(judged, 1e-3)
    return sentence, [each.row for each in judged if not each.row["control"]]


def test_foresight_is_claimed_and_knowing_the_rate_of_a_chain_is_not() -> None:
    """A layer that knows a chain's rate better has certain bits, which would be a claim without the second gain."""
    found = [claims_of_chains(seed, foresees=1.0) for seed in range(5)]
    assert all("onset is foreseen 4 tokens ahead (layer 5;" in sentence for sentence, _ in found)
    assert all("from 8 tokens on nothing is certain" in sentence for sentence, _ in found)
    blind = [claims_of_chains(seed, foresees=0.0) for seed in range(10)]
    assert all("nothing certain is foreseen of onset" in sentence for sentence, _ in blind)
    by_bits_alone = [any(row["gain_bits_low_corrected"] > 0 for row in rows) for _, rows in blind]
    assert np.mean(by_bits_alone) > 0.8  # negative control
