"""Controls know what they claim to know, and nothing of what comes later."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from streamprobe.controls.embedding import WINDOWS, EmbeddingLayers, last_tokens, recent_tokens, this_token
from streamprobe.controls.permuted import permute_labels, relabel, relabelled_columns
from streamprobe.controls.persistence import expand_ages, persistence_features
from streamprobe.controls.piecewise_linear import KNOTS, piecewise_linear
from streamprobe.controls.position import expand_position, position_features
from streamprobe.data.counts import Counts
from streamprobe.data.dataset import Dataset
from streamprobe.data.tokenize import Chain
from streamprobe.errors import InputError
from streamprobe.lags import INSIDE, ONSET, OUTSIDE, UNKNOWN, make_columns


def make_codes(seed: int, n: int = 120) -> tuple[Tensor, Tensor]:
    """Codes [T, 1] with sections, unknown stretches and a problem in front, and the samples [T]."""
    random = np.random.default_rng(seed)
    codes = np.full(n, OUTSIDE, dtype=np.int8)
    for start in random.choice(np.arange(20, n - 15), 4, replace=False):
        length = int(random.integers(2, 12))
        codes[start : start + length] = INSIDE
        codes[start] = ONSET
    codes[random.random(n) < 0.1] = UNKNOWN
    codes[:15] = UNKNOWN
    support = random.random(n) < 0.9
    support[:15] = False
    return torch.from_numpy(codes)[:, None], torch.from_numpy(support)


def chain_of(codes: Tensor, start: int = 15) -> Chain:
    """A chain with these codes [T, C], whose response begins at token `start`."""
    return Chain(
        "x", torch.zeros(len(codes), dtype=torch.int64), codes, torch.ones(len(codes), dtype=torch.bool), start
    )


def position(n: int, start: int) -> Tensor:
    """The features of `position` in a chain of n tokens."""
    return expand_position(position_features(chain_of(torch.zeros(n, 1, dtype=torch.int8), start)))


def persistence(codes: Tensor) -> Tensor:
    """The features of `persistence` in a chain with these codes [T, C]."""
    return expand_ages(persistence_features(chain_of(codes), codes.shape[1]))


# --- permuted labels ---


def circle(codes: Tensor, support: Tensor) -> list[int]:
    """The codes of the labelled samples."""
    return codes[(codes[:, 0] != UNKNOWN) & support, 0].tolist()


def turns(values: list[int]) -> set[tuple[int, ...]]:
    return {tuple(values[i:] + values[:i]) for i in range(len(values))}


@pytest.mark.parametrize("seed", range(10))
def test_permuted_labels_are_a_turn_of_the_same_circle(seed: int) -> None:
    codes, support = make_codes(seed)
    moved = permute_labels(codes, support, np.random.default_rng(seed))
    assert torch.equal(moved == UNKNOWN, codes == UNKNOWN), "what has no label still has none"
    assert tuple(circle(moved, support)) in turns(circle(codes, support))
    shuffled = np.random.default_rng(seed).permutation(circle(codes, support)).tolist()
    assert tuple(shuffled) not in turns(circle(codes, support)), "negative control: a shuffle breaks the runs"


def test_every_turn_is_as_likely_so_that_no_place_tells_a_label() -> None:
    """The mean over draws of the label at any sample is the base rate of the chain; where it stood, it is not."""
    codes, support = make_codes(3)
    random = np.random.default_rng(0)
    drawn = torch.stack([permute_labels(codes, support, random)[:, 0] >= INSIDE for _ in range(4000)]).float()
    labelled = (codes[:, 0] != UNKNOWN) & support
    rate = float((codes[labelled, 0] >= INSIDE).float().mean())
    error = (drawn.mean(0)[labelled] - rate).abs().max()
    assert error < 4.5 * (rate * (1 - rate) / 4000) ** 0.5
    assert ((codes[labelled, 0] >= INSIDE).float() - rate).abs().max() > 0.5  # negative control


def test_all_labels_move_together_and_the_chain_is_left_alone() -> None:
    codes, support = make_codes(4)
    both = torch.cat([codes, codes], dim=1)
    before = both.clone()
    moved = permute_labels(both, support, np.random.default_rng(1))
    assert torch.equal(both, before) and torch.equal(moved[:, 0], moved[:, 1]) and not torch.equal(moved, both)
    nothing = torch.full((5, 1), UNKNOWN, dtype=torch.int8)
    assert torch.equal(permute_labels(nothing, torch.ones(5, dtype=torch.bool), np.random.default_rng(1)), nothing)


def test_permuted_columns_read_arrays_of_their_own() -> None:
    columns = make_columns(["a", "b"], ["token"], [0, 4])
    twins = relabelled_columns(columns, ["permuted"], 2)
    assert twins[:4] == columns and len(twins) == 12 and relabelled_columns(columns, ["permuted"], 0) == columns
    assert Counter(c.array for c in twins) == dict.fromkeys(
        ("a", "b", "a/permuted0", "b/permuted0", "a/permuted1", "b/permuted1"), 2
    )
    assert len({str(c) for c in twins}) == 12


# --- position and persistence ---


def test_the_features_sum_to_one_and_hold_every_piecewise_linear_function() -> None:
    x = torch.cat([torch.arange(300.0), torch.tensor([5000.0, 12_288.0, 1e6])])
    shares = piecewise_linear(x)
    assert torch.allclose(shares.sum(1), torch.ones(len(x))) and (shares >= 0).all()
    values = torch.randn(len(KNOTS), generator=torch.Generator().manual_seed(0))
    expected = np.interp(x.clamp(max=float(KNOTS[-1])).numpy(), KNOTS.numpy(), values.numpy())
    np.testing.assert_allclose((shares @ values).numpy(), expected, rtol=1e-4, atol=1e-5)


def persistence_by_loop(codes: list[int]) -> list[tuple[bool, bool, int]]:
    """(inside, a section before, tokens since this one began or the last one ended) for every token."""
    result, began, ended = [], None, None
    for t, code in enumerate(codes):
        if code == ONSET:
            began = t
        inside = code >= INSIDE
        before = ended is not None and not inside
        since = t - (began or 0) if inside else t - ended if ended is not None else 0
        result.append((inside, before, since))
        if inside:
            ended = t
    return result


@pytest.mark.parametrize("seed", range(10))
def test_persistence_is_that_of_a_loop(seed: int) -> None:
    codes, _ = make_codes(seed)
    features = persistence(codes)
    width = len(KNOTS)
    for row, (inside, before, since) in zip(features, persistence_by_loop(codes[:, 0].tolist()), strict=True):
        assert row[:2].tolist() == [inside, before]
        here, there = row[2 : 2 + width], row[2 + width :]
        expected = piecewise_linear(torch.tensor([since]))[0]
        assert torch.equal(here, expected * inside) and torch.equal(there, expected * before)


def basis_by_loop(x: float) -> list[float]:
    """How near x is to the knots on both sides, in float32."""
    knots, values = KNOTS.tolist(), [0.0] * len(KNOTS)
    x = min(x, knots[-1])
    for i, (low, high) in enumerate(zip(knots, knots[1:], strict=False)):
        if x <= high:
            share = torch.tensor(x - low) / (high - low)
            values[i], values[i + 1] = float(1 - share), float(share)
            break
    return values


@pytest.mark.parametrize("start", [0, 15, 200])
def test_features_that_are_stored_compactly_are_those_that_were_fed_before(start: int) -> None:
    """Of several labels, with rare ages, number for number."""
    codes = torch.cat([make_codes(seed, 180)[0] for seed in (1, 2, 3)], dim=1)
    codes[:, 1] = torch.where(torch.arange(180) < 30, codes[:, 1], OUTSIDE)
    chain = chain_of(codes, start)
    position = [[1.0] + [0.0] * len(KNOTS) if t < start else [0.0, *basis_by_loop(t - start)] for t in range(180)]
    assert torch.equal(expand_position(position_features(chain)), torch.tensor(position))
    expected = []
    for column in codes.T.tolist():
        for t, (inside, before, since) in enumerate(persistence_by_loop(column)):
            basis = basis_by_loop(since)
            here, there = [inside * value for value in basis], [before * value for value in basis]
            expected.append((t, [inside, before, *here, *there]))
    rows = torch.tensor([row for _, row in sorted(expected, key=lambda each: each[0])]).float()
    rows = rows.reshape(180, -1)
    assert torch.equal(expand_ages(persistence_features(chain, 3)), rows)
    assert torch.equal(expand_ages(persistence_features(chain, 2)), rows[:, : 2 * rows.shape[1] // 3])
    assert position_features(chain).shape == (180, 1) and persistence_features(chain, 3).shape == (180, 3)


def knows_the_past_only(features: Tensor, cut: Tensor) -> bool:
    """Whether features [T, P] of a whole chain begin with those of its first tokens alone."""
    return torch.equal(features[: len(cut)], cut)


@pytest.mark.parametrize("n", [1, 16, 50, 119])
def test_no_side_feature_knows_what_comes(n: int) -> None:
    codes, _ = make_codes(5)
    assert knows_the_past_only(persistence(codes), persistence(codes[:n]))
    assert knows_the_past_only(position(120, 15), position(n, 15))
    share_of_length = [torch.arange(m)[:, None] / m for m in (120, n)]  # negative control
    assert n == 1 or not knows_the_past_only(*share_of_length)


def test_position_counts_from_the_response() -> None:
    a, b = position(60, 10), position(80, 30)
    assert torch.equal(a[10:], b[30:]) and not a[:10, 1:].any() and a[:, 0].sum() == 10
    assert len({tuple(row) for row in a[10:].tolist()}) == 50, "every place has features of its own"


# --- layers made of embeddings ---

BOTH = {"embed": this_token, "text": recent_tokens}
ALL = BOTH | {"order": last_tokens}


@pytest.fixture(scope="module")
def embedding() -> nn.Embedding:
    torch.manual_seed(0)
    return nn.Embedding(50, 32)


def text_by_loop(embedding: nn.Embedding, surface: EmbeddingLayers, ids: Tensor) -> Tensor:
    """[T, D] of every token's windows, one after another."""
    table = (embedding.weight.detach() - surface.mean) @ surface.directions[:, : 32 // 3]
    rows = []
    for t in range(len(ids)):
        means = [table[ids[max(0, t + 1 - window) : t + 1]].mean(0) for window in WINDOWS]
        rows.append(torch.cat([*means, torch.zeros(32 - 3 * table.shape[1])]))
    return torch.stack(rows)


def test_surface_is_the_embedding_and_means_of_the_last_tokens(embedding: nn.Embedding) -> None:
    ids = torch.randint(0, 50, (300,), generator=torch.Generator().manual_seed(1))
    surface = EmbeddingLayers.fitted(embedding, ids, 32, BOTH)
    rows = surface.rows(ids, 300)
    assert torch.equal(rows[:, 0], embedding(ids).detach())
    expected = text_by_loop(embedding, surface, ids)
    assert torch.allclose(rows[:, 1], expected, atol=1e-5)
    assert not torch.allclose(rows[:, 1], expected.roll(1, 0), atol=1e-2)  # negative control: a token off


@pytest.mark.parametrize("size", [1, 50, 130, 299])
def test_surface_is_the_same_in_chunks(embedding: nn.Embedding, size: int) -> None:
    ids = torch.randint(0, 50, (300,), generator=torch.Generator().manual_seed(2))
    surface = EmbeddingLayers.fitted(embedding, ids, 32, ALL)
    whole = surface.rows(ids, 300)
    parts = torch.cat(
        [surface.rows(ids[max(0, i - surface.before) : i + size], len(ids[i : i + size])) for i in range(0, 300, size)]
    )
    assert torch.allclose(parts, whole, atol=1e-5)
    alone = torch.cat([surface.rows(ids[i : i + size], len(ids[i : i + size])) for i in range(0, 300, size)])
    assert not torch.allclose(alone, whole, atol=1e-2)  # negative control: chunks that forget


def test_surface_knows_the_past_only_and_may_be_one_layer(embedding: nn.Embedding) -> None:
    ids = torch.randint(0, 50, (200,), generator=torch.Generator().manual_seed(3))
    surface = EmbeddingLayers.fitted(embedding, ids, 32, {"text": recent_tokens})
    whole, cut = surface.rows(ids, 200), surface.rows(ids[:90], 90)
    assert whole.shape == (200, 1, 32) and torch.allclose(whole[:90], cut, atol=1e-5)


def test_narrow_embeddings_are_filled_up_and_wide_ones_refused(embedding: nn.Embedding) -> None:
    ids = torch.arange(50)
    rows = EmbeddingLayers.fitted(embedding, ids, 40, BOTH).rows(ids, 50)
    assert rows.shape == (50, 2, 40) and not rows[..., 32:].any()
    assert torch.equal(rows[..., :32], EmbeddingLayers.fitted(embedding, ids, 32, BOTH).rows(ids, 50))
    with pytest.raises(InputError, match="embeddings of size 32 in a model of hidden size 16"):
        EmbeddingLayers.fitted(embedding, ids, 16, BOTH)


def test_the_kept_directions_are_those_of_most_variance(embedding: nn.Embedding) -> None:
    ids = torch.randint(0, 50, (500,), generator=torch.Generator().manual_seed(4))
    surface = EmbeddingLayers.fitted(embedding, ids, 32, BOTH)
    rows = embedding.weight.detach()[ids]
    centred = (rows - rows.mean(0)).double()
    for n in (32 // 3, 32 // 2):
        expected = torch.linalg.svd(centred, full_matrices=False).S.square()[:n].sum()
        kept = (centred @ surface.first(n).double()).square().sum()
        assert torch.allclose(kept, expected, rtol=1e-5)
        assert surface.first(n).is_contiguous() and torch.equal(surface.first(n), surface.directions[:, :n])
    assert surface.directions.shape == (32, 16)


@pytest.mark.parametrize("width", [32, 30])
def test_the_last_tokens_are_those_of_a_loop(width: int) -> None:
    """In order; a chain begins with zeros, and so does the end of a layer whose width cannot be divided by 8."""
    torch.manual_seed(5)
    embedding = nn.Embedding(50, width)
    ids = torch.randint(0, 50, (40,), generator=torch.Generator().manual_seed(6))
    surface = EmbeddingLayers.fitted(embedding, ids, width, {"order": last_tokens})
    table = (embedding.weight.detach() - surface.mean) @ surface.directions
    expected = torch.zeros(40, width)
    for t in range(40):
        row = [
            table[ids[t - back], : width // part] if t >= back else torch.zeros(width // part)
            for back, part in enumerate((2, 4, 8, 8))
        ]
        expected[t, : sum(map(len, row))] = torch.cat(row)
    assert torch.allclose(surface.rows(ids, 40)[:, 0], expected, atol=1e-5)
    assert torch.allclose(surface.rows(ids, 7)[:, 0], expected[-7:], atol=1e-5)
    swapped = surface.rows(ids[torch.tensor([*range(38), 39, 38])], 1)  # negative control: the order counts
    assert not torch.allclose(swapped[:, 0], expected[-1:], atol=1e-2)


def test_permuted_labels_do_not_depend_on_which_other_controls_there_are() -> None:
    chains = [replace(chain_of(make_codes(seed)[0]), row=seed) for seed in range(4)]
    plain = Dataset({"train": chains}, ["event"], Counts())

    def drawn_anew(codes: Tensor, support: Tensor, random: np.random.Generator) -> Tensor:
        return permute_labels(codes, support, random)

    alone = relabel(plain, {"permuted": permute_labels}, 2, 7)
    beside = relabel(plain, {"other": drawn_anew, "permuted": permute_labels}, 2, 7)
    assert beside.labels == ["event", "event/other0", "event/other1", "event/permuted0", "event/permuted1"]
    for one, other in zip(alone.splits["train"], beside.splits["train"], strict=True):
        assert torch.equal(one.codes[:, 1:], other.codes[:, 3:])
        assert not torch.equal(other.codes[:, 1:3], other.codes[:, 3:]), "and they are others"
