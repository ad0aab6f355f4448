"""The joint controls hold what they say, number for number, and only `joint+chain` knows anything of what comes."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from streamprobe.activations.batch import TokenBatch
from streamprobe.controls.chosen import ChosenControls
from streamprobe.controls.embedding import EmbeddingLayers
from streamprobe.controls.permuted import relabel
from streamprobe.controls.piecewise_linear import piecewise_linear
from streamprobe.controls.table import CONTROLS
from streamprobe.data.counts import Counts
from streamprobe.data.dataset import Dataset
from streamprobe.data.tokenize import Chain
from streamprobe.evaluation.lift import compare_with_controls
from streamprobe.evaluation.rows import COMPARED, Judged
from streamprobe.lags import INSIDE, ONSET, OUTSIDE, UNKNOWN
from streamprobe.run.reads import make_reads

LABELS, SECTIONS = 2, 3  # probed, and known
WIDTH, HIDDEN, VOCABULARY = 32, 40, 50
SIDE = [name for name, control in CONTROLS.items() if control.features]


def make_chain(seed: int, n: int = 150) -> Chain:
    """A chain with sections of three labels, of which two are probed, unknown stretches, and sentence ends."""
    random = np.random.default_rng(seed)
    sections = np.full((n, SECTIONS), OUTSIDE, dtype=np.int8)
    for label in range(SECTIONS):
        for start in random.choice(np.arange(20, n - 15), 4, replace=False):
            length = int(random.integers(2, 12))
            sections[start : start + length, label] = INSIDE
            sections[start, label] = ONSET
    sections[random.random(n) < 0.1] = UNKNOWN
    sections[:10] = UNKNOWN
    return Chain(
        str(seed),
        torch.from_numpy(random.integers(0, VOCABULARY, n)),
        torch.from_numpy(sections[:, :LABELS].copy()),
        torch.from_numpy(random.random(n) < 0.9),
        start=8,
        row=seed,
        sections=torch.from_numpy(sections),
        sentence_end=torch.from_numpy((random.random(n) < 0.08) & (np.arange(n) > 4)),
    )


def choose(*names: str) -> ChosenControls:
    return ChosenControls(names, LABELS, SECTIONS)


def features_of(name: str, chain: Chain) -> Tensor:
    """The features [T, P] of a control that is made by hand."""
    controls = choose(name)
    return controls.expand(name, controls.features(chain))


def basis(x: float) -> list[float]:
    return piecewise_linear(torch.tensor([x]))[0].tolist()


def flagged(x: int | None) -> list[float]:
    """Whether a number is missing, and else the number."""
    return [0.0, *basis(x)] if x is not None else [1.0, *([0.0] * len(basis(0)))]


def smoothed(k: int, n: int) -> float:
    return math.log((k + 0.5) / (n - k + 0.5))


def label_by_loop(codes: list[int], t: int) -> tuple[list[float], list[float]]:
    """What is known at t of one label: the age of its section, and the chain so far."""
    began = ended = None
    begun = known = inside = 0
    for u, code in enumerate(codes[: t + 1]):
        known += code != UNKNOWN
        begun += code == ONSET
        inside += code >= INSIDE
        began = u if code == ONSET else began
        ended = u if code >= INSIDE else ended
    here = codes[t] >= INSIDE
    after = ended is not None and not here
    since = t - (began or 0) if here else t - ended if ended is not None else 0
    age = [here, after, *(here * x for x in basis(since)), *(after * x for x in basis(since))]
    return age, [math.log1p(begun), smoothed(begun, known), inside / max(1, known)]


def joint_by_loop(chain: Chain, whole: bool) -> Tensor:
    """[T, P] of every token alone, one after another."""
    columns, rows = chain.sections.T.tolist(), []
    ends = [t for t, end in enumerate(chain.sentence_end.tolist()) if end]
    for t in range(len(chain.ids)):
        known = [label_by_loop(codes, t) for codes in columns]
        last = max((end for end in ends if end <= t), default=None)
        row = flagged(t - chain.start if t >= chain.start else None)
        row += [x for age, _ in known for x in age] + [x for _, so_far in known for x in so_far]
        row += flagged(None if last is None else t - last)
        for codes in columns if whole else ():
            n = sum(code != UNKNOWN for code in codes)
            inside, begun = sum(code >= INSIDE for code in codes), sum(code == ONSET for code in codes)
            row += [smoothed(inside, n), smoothed(begun, n)]
        rows.append(row)
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("name", ["joint", "joint+chain"])
@pytest.mark.parametrize("seed", range(3))
def test_the_features_are_those_of_a_loop(name: str, seed: int) -> None:
    chain = make_chain(seed)
    expected = joint_by_loop(chain, whole=name == "joint+chain")
    assert torch.allclose(features_of(name, chain).double(), expected, atol=1e-6, rtol=1e-6)
    assert not torch.allclose(features_of(name, make_chain(seed + 9)).double(), expected, atol=1e-2)


def test_without_a_label_or_a_sentence_they_are_finite() -> None:
    chain = Chain("x", torch.arange(5), torch.full((5, LABELS), UNKNOWN), torch.ones(5, dtype=torch.bool))
    chain = replace(chain, sections=torch.full((5, SECTIONS), UNKNOWN, dtype=torch.int8))
    assert features_of("joint+chain", chain).isfinite().all()
    none = ChosenControls(["joint+chain"], LABELS, 0)
    bare = replace(chain, sections=chain.sections[:, :0])
    assert none.expand("joint+chain", none.features(bare)).shape == (5, 2 * 29)


def change_after(chain: Chain, t: int) -> Chain:
    """The chain with other tokens, labels and sentences behind t, and a longer one."""
    other = make_chain(99, 180)
    names = ("ids", "codes", "support", "sections", "sentence_end")
    return replace(
        chain, **{name: torch.cat([getattr(chain, name)[: t + 1], getattr(other, name)[t + 1 :]]) for name in names}
    )


def layers_of(name: str) -> list[str]:
    """Which layers made of embeddings a control is, or is given."""
    return list(choose(name).embedded)


def read_at(name: str, chain: Chain, t: int) -> Tensor:
    """All that the probes of a control read at one token."""
    torch.manual_seed(0)
    embedding, controls = nn.Embedding(VOCABULARY, WIDTH), choose(name)
    parts = []
    if controls.embedded:
        layers = EmbeddingLayers.fitted(embedding, torch.arange(VOCABULARY), WIDTH, controls.embedded)
        parts.append(layers.rows(chain.ids, len(chain.ids))[t].flatten())
    if name in SIDE:
        parts.append(features_of(name, chain)[t])
    return torch.cat(parts)


def knows_what_comes(name: str, seed: int) -> bool:
    """Whether what a control is given at a token changes where only later tokens and labels do."""
    chain = make_chain(seed)
    return any(
        not torch.allclose(read_at(name, chain, t), read_at(name, change_after(chain, t), t), atol=1e-5)
        for t in (0, 30, 77, 149)
    )


@pytest.mark.parametrize("name", [name for name in CONTROLS if name not in ("permuted", "joint+chain")])
def test_a_control_knows_nothing_after_t(name: str) -> None:
    """`permuted` reads the probed layer; `joint+chain` is exempt by name."""
    assert not any(knows_what_comes(name, seed) for seed in range(3))


def test_knowing_nothing_after_t_fails_without_leaving_out_the_whole_chain() -> None:
    assert knows_what_comes("joint+chain", 0)
    assert "after t" in CONTROLS["joint+chain"].about and "after t" not in CONTROLS["joint"].about


def test_both_are_stored_once() -> None:
    both, first, second = choose("joint", "joint+chain"), choose("joint"), choose("joint+chain")
    assert first.width == 2 + 4 * SECTIONS and both.width == second.width == first.width + 2 * SECTIONS
    assert both.places == {"joint": slice(0, first.width), "joint+chain": slice(0, both.width)}
    assert both.widths == first.widths | second.widths
    chain = make_chain(4)
    stored = both.features(chain)
    for name, alone in (("joint", first), ("joint+chain", second)):
        assert torch.equal(both.expand(name, stored), alone.expand(name, alone.features(chain)))
    every = ChosenControls(list(CONTROLS), LABELS, SECTIONS)
    assert every.width == 1 + LABELS + both.width and every.features(chain).shape == (150, every.width)
    assert torch.equal(every.expand("joint", every.features(chain)), both.expand("joint", stored))


def test_what_is_known_of_every_label_does_not_move_with_the_permuted_ones() -> None:
    chains = [make_chain(seed) for seed in range(4)]
    dataset = Dataset({"train": chains}, ["a", "b"], Counts(), ["a", "b", "c"])
    moved = relabel(dataset, {"permuted": CONTROLS["permuted"].relabel}, 2, 7)
    assert moved.section_labels == dataset.section_labels
    for before, now in zip(chains, moved.splits["train"], strict=True):
        assert not torch.equal(now.codes[:, :2], now.codes[:, 2:4])
        for name in SIDE:
            assert torch.equal(features_of(name, before), features_of(name, now))


def test_layers_are_there_without_a_control_of_their_name() -> None:
    alone = choose("embed", "joint")
    assert list(alone.embedded) == ["embed", "text", "order"] and alone.with_layers == ["embed"]
    assert alone.layers_given("joint") == [1, 2]
    every = ChosenControls(list(CONTROLS), LABELS, SECTIONS)
    assert list(every.embedded) == ["embed", "text", "order"] and every.with_layers == ["embed", "text"]
    assert list(choose("position", "persistence").embedded) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_probes_read_the_layers_without_their_padding_and_then_what_is_made_by_hand(dtype: torch.dtype) -> None:
    controls, chain = choose("text", "joint", "joint+chain"), make_chain(5)
    torch.manual_seed(0)
    embedding = nn.Embedding(VOCABULARY, WIDTH).to(dtype)
    layers = EmbeddingLayers.fitted(embedding, chain.ids, HIDDEN, controls.embedded)
    rows = layers.rows(chain.ids, 150)
    acts = torch.cat([torch.full((150, 1, HIDDEN), 7.0, dtype=dtype), rows], dim=1)
    side, none = controls.features(chain), torch.zeros(150, 0, dtype=torch.bool)
    at = torch.arange(150)
    batch, reads = TokenBatch(acts, side, none, none, at, at, at, at.float()), make_reads(controls, 1, WIDTH)
    read = reads["joint+chain"](batch)
    assert read.dtype == torch.float32 and read.shape == (150, 1, 2 * WIDTH + controls.widths["joint+chain"])
    assert torch.equal(read[:, 0, :WIDTH], rows[:, 0, :WIDTH].float())
    assert torch.equal(read[:, 0, WIDTH : 2 * WIDTH], rows[:, 1, :WIDTH].float())
    assert torch.equal(read[:, 0, 2 * WIDTH :], features_of("joint+chain", chain))
    joint = reads["joint"](batch)
    assert torch.equal(joint, make_reads(choose("text", "joint"), 1, WIDTH)["joint"](batch))
    assert joint.data_ptr() == read.data_ptr()  # made once for both
    other = reads["joint"](batch._replace(side=side + 1))
    assert not torch.equal(other, joint) and torch.equal(reads["joint"](batch), joint)


@pytest.mark.parametrize("name", SIDE)
def test_the_host_looks_at_no_number_that_is_expanded(name: str) -> None:
    """On a device that has none."""
    controls = ChosenControls([name], LABELS, SECTIONS)
    nothing = torch.zeros(7, controls.width, device="meta")
    assert controls.expand(name, nothing).shape == (7, controls.widths[name])


@pytest.mark.parametrize("size", [1, 7, 64])
def test_what_is_stored_is_expanded_alike_in_chunks(size: int) -> None:
    """Whichever tokens stand beside a token, and in whatever order."""
    controls, chain = ChosenControls(SIDE, LABELS, SECTIONS), make_chain(6)
    stored = controls.features(chain)
    order = torch.randperm(150, generator=torch.Generator().manual_seed(1))
    for name in SIDE:
        parts = torch.cat([controls.expand(name, part) for part in stored[order].split(size)])
        assert torch.equal(parts, controls.expand(name, stored)[order])


def judged_at(lag: int, control: str, layer: object, area: float) -> Judged:
    """A probe or control with this AUROC, in 30 resamples too."""
    place = {
        "kind": "linear",
        "site": "resid_post",
        "solver": "newton",
        "label": "a",
        "target": "token",
        "lag": lag,
        "control": control,
        "layer": layer,
    }
    row = {**COMPARED, **place, "auroc": area, "n_positive_chains": 50}
    return Judged(row, area + 0.001 * torch.linspace(-1, 1, 30, dtype=torch.float64))


@pytest.mark.parametrize("others", [["text"], ["text", "joint"], ["text", "joint", "joint+chain"]])
def test_a_lift_is_over_single_controls_alone(others: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    areas = {"text": 0.7, "joint": 0.85, "joint+chain": 0.95}
    family = [judged_at(4, "", 3, 0.9), *(judged_at(4, name, "", areas[name]) for name in others)]
    compare_with_controls(family)
    row = family[0].row
    assert row["lift"] == pytest.approx(0.2) and row["best_control"] == "text" and row["lift_low_corrected"] > 0.1
    if "joint" in others:  # the negative control
        for name in ("joint", "joint+chain"):
            monkeypatch.setitem(CONTROLS, name, replace(CONTROLS[name], under_lift=True))
        compare_with_controls(family)
        assert row["lift"] < 0.06 and row["best_control"] == others[-1]
