"""Lags: by hand, against a double loop over the definitions, and for every way of cutting a chain."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from streamprobe.lags import INSIDE, ONSET, OUTSIDE, UNKNOWN, Column, LagBuffer, Pairs, make_columns

LABELS = ["backtracking", "deduction"]
SIX_LAGS = [Column("backtracking", "token", lag) for lag in range(-3, 3)]


def pair(columns: Sequence[Column], codes: Tensor, support: Tensor, sizes: Sequence[int] = ()) -> Pairs:
    """Pushes one chain in chunks of the given sizes, the rest as the last chunk; activation t is the number t."""
    return push(LagBuffer(columns, LABELS), codes, support, sizes)


def push(buffer: LagBuffer, codes: Tensor, support: Tensor, sizes: Sequence[int] = ()) -> Pairs:
    acts = torch.arange(6.0 * len(codes)).reshape(len(codes), 2, 3)
    borders = [0, *torch.tensor(sizes, dtype=torch.int64).cumsum(0).tolist(), len(codes)]
    chunks = [slice(a, b) for a, b in zip(borders, borders[1:], strict=False)]
    parts = [
        buffer.push(acts[chunk], codes[chunk], support[chunk], last=i == len(chunks) - 1)
        for i, chunk in enumerate(chunks)
    ]
    return Pairs(*(torch.cat(column) for column in zip(*parts, strict=True)))


def naive(columns: Sequence[Column], codes: list[list[int]], support: list[bool]) -> list[list[bool | None]]:
    """Targets [N][K] from the definitions, one token and one column at a time; None where the pair does not count."""
    return [[naive_pair(column, codes, support, t) for column in columns] for t in range(len(codes))]


def naive_pair(column: Column, codes: list[list[int]], support: list[bool], t: int) -> bool | None:
    code = [row[LABELS.index(column.label)] for row in codes]
    there = t + column.lag
    if not support[t] or there < 0 or there >= len(code):
        return None
    if column.target == "within":
        window = [code[i] for i in range(t + 1, there + 1)]
        return None if UNKNOWN in window else ONSET in window
    if code[there] == UNKNOWN:
        return None
    if column.target == "token":
        return code[there] in (INSIDE, ONSET)
    return None if column.lag > 0 and code[t] != OUTSIDE else code[there] == ONSET


def as_table(pairs: Pairs) -> list[list[bool | None]]:
    """Targets [N][K], None where the pair does not count."""
    both = zip(pairs.targets.tolist(), pairs.valid.tolist(), strict=True)
    return [[y if v else None for y, v in zip(*row, strict=True)] for row in both]


LABELLED = ([OUTSIDE, ONSET, INSIDE, OUTSIDE, ONSET], [True] * 5)
WITH_GAPS = ([UNKNOWN, OUTSIDE, ONSET, UNKNOWN, OUTSIDE], [False, True, True, True, True])
TWO_SECTIONS = ([ONSET, ONSET, INSIDE, OUTSIDE, OUTSIDE], [True, True, False, True, True])


@pytest.mark.parametrize(
    ("chain", "target", "lag", "expected"),
    [
        # `.` falls off the chain, has no label or does not count; else the target
        (LABELLED, "token", +1, "1101."),
        (LABELLED, "onset", +1, "1..1."),
        (LABELLED, "within", +1, "1001."),
        (LABELLED, "token", -1, ".0110"),
        (LABELLED, "onset", -1, ".0100"),
        (LABELLED, "token", 0, "01101"),
        (LABELLED, "onset", 0, "01001"),
        (LABELLED, "within", +2, "101.."),
        (LABELLED, "token", +5, "....."),
        (LABELLED, "token", -5, "....."),
        (LABELLED, "within", +5, "....."),
        (WITH_GAPS, "token", +1, ".1.0."),
        (WITH_GAPS, "onset", +1, ".1..."),
        (WITH_GAPS, "within", +1, ".1.0."),
        (WITH_GAPS, "token", -1, "..01."),
        (WITH_GAPS, "onset", -1, "..01."),
        (WITH_GAPS, "token", 0, ".01.0"),
        (WITH_GAPS, "within", +2, "....."),
        (TWO_SECTIONS, "token", +1, "11.0."),
        (TWO_SECTIONS, "onset", +1, "...0."),
        (TWO_SECTIONS, "within", +1, "10.0."),
        (TWO_SECTIONS, "token", -1, ".1.10"),
        (TWO_SECTIONS, "onset", -1, ".1.00"),
    ],
)
def test_five_tokens_by_hand(chain: tuple[list[int], list[bool]], target: str, lag: int, expected: str) -> None:
    codes, support = torch.tensor(chain[0], dtype=torch.int8)[:, None], torch.tensor(chain[1])
    pairs = push(LagBuffer([Column("a", target, lag)], ["a"]), codes, support)
    assert "".join("." if y is None else str(int(y)) for [y] in as_table(pairs)) == expected
    assert torch.equal(pairs.acts[:, 0, 0], 6.0 * torch.arange(5))


def test_the_activation_at_t_stands_beside_the_label_at_t_plus_lag() -> None:
    codes = torch.tensor([OUTSIDE, OUTSIDE, OUTSIDE, ONSET, OUTSIDE], dtype=torch.int8)[:, None]
    pairs = push(LagBuffer([Column("a", "token", 2)], ["a"]), codes, torch.ones(5, dtype=torch.bool), [1, 1, 2])
    assert (pairs.acts[pairs.targets[:, 0]][:, 0, 0] / 6).tolist() == [1.0]


def a_column() -> st.SearchStrategy[Column]:
    plain = {"control": st.just(""), "seed": st.just(0)}
    every = st.sampled_from(["token", "onset", "within"])
    ahead = st.builds(Column, st.sampled_from(LABELS), every, st.integers(1, 6), **plain)
    back = st.builds(Column, st.sampled_from(LABELS), st.sampled_from(["token", "onset"]), st.integers(-6, 0), **plain)
    return ahead | back


@st.composite
def a_chain(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    n = draw(st.integers(0, 25))
    code = st.sampled_from([UNKNOWN, OUTSIDE, OUTSIDE, INSIDE, ONSET])
    codes = draw(st.lists(st.tuples(code, code), min_size=n, max_size=n))
    support = draw(st.lists(st.sampled_from([True, True, True, False]), min_size=n, max_size=n))
    return torch.tensor(codes, dtype=torch.int8).reshape(n, 2), torch.tensor(support, dtype=torch.bool)


@st.composite
def a_cut_chain(draw: st.DrawFn) -> tuple[Tensor, Tensor, list[int]]:
    """A chain, and chunk sizes (zero too) that sum to at most its length."""
    codes, support = draw(a_chain())
    borders = sorted(draw(st.lists(st.integers(0, len(codes)), max_size=12)))
    return codes, support, [b - a for a, b in zip([0, *borders], borders, strict=False)]


some_columns = st.lists(a_column(), min_size=1, max_size=8)


def seeded(examples: int) -> settings:
    return settings(max_examples=examples, deadline=None, derandomize=True, database=None)


@seeded(80)
@given(some_columns, a_cut_chain())
def test_any_chunks_give_the_pairs_of_the_double_loop(
    columns: list[Column], chain: tuple[Tensor, Tensor, list[int]]
) -> None:
    codes, support, sizes = chain
    whole, cut = pair(columns, codes, support), pair(columns, codes, support, sizes)
    assert all(torch.equal(a, b) for a, b in zip(whole, cut, strict=True))
    assert not (whole.targets & ~whole.valid).any()
    assert as_table(whole) == naive(columns, codes.tolist(), support.tolist())
    assert torch.equal(whole.acts, torch.arange(6.0 * len(codes)).reshape(-1, 2, 3))


@seeded(30)
@given(some_columns, a_cut_chain(), a_cut_chain())
def test_a_second_chain_sees_nothing_of_the_first(
    columns: list[Column], first: tuple[Tensor, Tensor, list[int]], second: tuple[Tensor, Tensor, list[int]]
) -> None:
    used = LagBuffer(columns, LABELS)
    push(used, *first)
    again, fresh = push(used, *second), pair(columns, *second)
    assert all(torch.equal(a, b) for a, b in zip(again, fresh, strict=True))


def test_a_second_chain_fails_without_the_end_of_the_first() -> None:
    """The check above can fail: two chains pushed as one pair labels across their border."""
    columns = SIX_LAGS
    codes = torch.tensor([OUTSIDE, ONSET, INSIDE, OUTSIDE], dtype=torch.int8)[:, None].repeat(1, 2)
    support = torch.ones(4, dtype=torch.bool)
    joined = pair(columns, torch.cat([codes, codes]), torch.cat([support, support]))
    assert as_table(joined)[4:] != as_table(pair(columns, codes, support))


@pytest.mark.parametrize("target", ["token", "onset"])
@pytest.mark.parametrize("lag", [1, 2, 5])
def test_pairing_fails_without_the_sign_of_the_lag(target: str, lag: int) -> None:
    random = torch.Generator().manual_seed(lag)
    codes = torch.randint(0, 3, (60, 2), generator=random, dtype=torch.int8)
    support = torch.ones(60, dtype=torch.bool)
    ahead, back = (pair([Column(LABELS[0], target, sign * lag)], codes, support) for sign in (1, -1))
    expected = naive([Column(LABELS[0], target, lag)], codes.tolist(), support.tolist())
    assert as_table(ahead) == expected
    assert as_table(back) != expected
    both = ahead.valid & back.valid
    assert (ahead.targets != back.targets)[both].any()


@pytest.mark.parametrize("lags", [[-3, 0, 4], [2], [0], [-5, -1]])
@pytest.mark.parametrize("size", [1, 3, 7])
def test_a_token_leaves_as_soon_as_its_furthest_label_has_come(lags: list[int], size: int) -> None:
    """No more activations wait than the longest lag ahead, and no more labels are kept than can be looked back on."""
    buffer = LagBuffer([Column(LABELS[0], "token", lag) for lag in lags], LABELS)
    ahead, behind = max(0, *lags), max(0, *(-lag for lag in lags))
    seen = out = 0
    for _ in range(9):
        codes = torch.zeros(size, 2, dtype=torch.int8)
        out += len(buffer.push(torch.zeros(size, 1), codes, torch.ones(size, dtype=torch.bool)).acts)
        seen += size
        assert out == max(0, seen - ahead)
        assert len(buffer.waiting) == len(buffer.support) == seen - out <= ahead
        assert len(buffer.codes) <= ahead + behind


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int64])
def test_activations_pass_through_unchanged(dtype: torch.dtype) -> None:
    acts = torch.arange(20).to(dtype).reshape(10, 2)
    buffer = LagBuffer(SIX_LAGS, LABELS)
    codes, support = torch.zeros(10, 2, dtype=torch.int8), torch.ones(10, dtype=torch.bool)
    parts = [buffer.push(acts[i : i + 1], codes[i : i + 1], support[i : i + 1], last=i == 9).acts for i in range(10)]
    assert torch.equal(torch.cat(parts), acts) and torch.cat(parts).dtype == dtype


@pytest.mark.parametrize("lag", [0, -1])
def test_within_only_looks_ahead(lag: int) -> None:
    with pytest.raises(AssertionError, match="positive"):
        LagBuffer([Column(LABELS[0], "within", lag)], LABELS)


def test_make_columns_by_label_then_target_then_rising_lag() -> None:
    assert make_columns(["b", "a"], ["token", "within"], [4, -2, 0, 1]) == [
        Column("b", "token", -2),
        Column("b", "token", 0),
        Column("b", "token", 1),
        Column("b", "token", 4),
        Column("b", "within", 1),
        Column("b", "within", 4),
        Column("a", "token", -2),
        Column("a", "token", 0),
        Column("a", "token", 1),
        Column("a", "token", 4),
        Column("a", "within", 1),
        Column("a", "within", 4),
    ]


@pytest.mark.parametrize(("targets", "lags"), [(["within"], [0, -4]), ([], [1]), (["token"], [])])
def test_make_columns_may_be_none(targets: list[str], lags: list[int]) -> None:
    assert make_columns(["a"], targets, lags) == []


def test_a_column_names_its_lag_with_a_sign() -> None:
    assert [str(Column("a", "onset", lag)) for lag in (-16, 0, 8)] == [
        "a/onset/lag-16",
        "a/onset/lag+00",
        "a/onset/lag+08",
    ]
