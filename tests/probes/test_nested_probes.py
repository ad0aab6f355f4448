"""Nested probes: what they score, and that they come back from the file of a run bit for bit, or are refused."""

import math
from pathlib import Path

import pytest
import torch
from test_kept import ABOUT, edited, same, write
from torch import Tensor

from streamprobe.errors import InputError
from streamprobe.lags import make_columns
from streamprobe.probes.kept import CONTROLS_FILE, NESTED, FinalProbes, KeptProbes, load_kept, pack_controls
from streamprobe.probes.linear import ProbeBank
from streamprobe.probes.nested import Blocks, NestedProbes
from streamprobe.probes.sites import control_sites, layer_sites

N, L, K, P, D = 7, 2, 3, 4, 5
S = L + 1
COLUMNS = make_columns(["backtracking"], ["token"], [4, 8, 16])
SITES = [*control_sites(["joint+chain"]), *layer_sites([3, 12])]


def random_probes(seed: int = 0) -> NestedProbes:
    random = torch.Generator().manual_seed(seed)
    control, weight = torch.randn(S, K, P, generator=random), torch.randn(S, K, D, generator=random)
    weight[0] = 0
    threshold = torch.full((S, K), math.nan, dtype=torch.float64)
    return NestedProbes(
        SITES, COLUMNS, control, weight, torch.randn(S, K, generator=random), threshold, solver="newton"
    )


def random_blocks(dtype: torch.dtype = torch.float32) -> Blocks:
    random = torch.Generator().manual_seed(9)
    return Blocks(torch.randn(N, P, generator=random), torch.randn(N, L, D, generator=random).to(dtype))


def by_loop(probes: NestedProbes, blocks: Blocks) -> Tensor:
    """The logits [N, S, K] one by one."""
    found = torch.zeros(N, S, K)
    for n in range(N):
        for s in range(S):
            for k in range(K):
                found[n, s, k] = probes.control_weight[s, k] @ blocks.control[n] + probes.bias[s, k]
                if s:
                    found[n, s, k] += probes.weight[s, k] @ blocks.layers[n, s - 1].float()
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_are_those_of_a_plain_loop(dtype: torch.dtype) -> None:
    probes, blocks = random_probes(), random_blocks(dtype)
    torch.testing.assert_close(probes.scores(blocks), by_loop(probes, blocks))
    torch.testing.assert_close(probes.probabilities(blocks), by_loop(probes, blocks).sigmoid())


def test_scores_fail_to_be_those_with_the_layers_turned_around() -> None:
    probes, blocks = random_probes(), random_blocks()
    turned = probes.scores(Blocks(blocks.control, blocks.layers.flip(1)))
    assert torch.equal(turned[:, 0], probes.scores(blocks)[:, 0]) and not torch.allclose(
        turned, by_loop(probes, blocks)
    )


def test_the_scores_of_a_probe_lie_side_by_side() -> None:
    assert random_probes().scores(random_blocks()).stride(0) == 1


def test_chosen_columns_score_as_before() -> None:
    probes, blocks = random_probes(), random_blocks()
    chosen = probes.choose([2, 0], torch.ones(S, 2))
    assert chosen.columns == [COLUMNS[2], COLUMNS[0]] and torch.equal(chosen.threshold, torch.ones(S, 2))
    torch.testing.assert_close(chosen.scores(blocks), probes.scores(blocks)[:, :, [2, 0]])


def test_mapped_and_shifted_logits() -> None:
    probes, blocks, random = random_probes(), random_blocks(), torch.Generator().manual_seed(1)
    slope, offset = torch.rand(2, S, K, generator=random, dtype=torch.float64)
    torch.testing.assert_close(
        probes.mapped(slope, offset).scores(blocks), probes.scores(blocks) * slope.float() + offset.float()
    )
    added = torch.tensor([1.0, -2.0, 0.0])
    torch.testing.assert_close(probes.add_to_logits(added).scores(blocks), probes.scores(blocks) + added)


def test_a_clone_shares_nothing_and_takes_probes_of_others() -> None:
    probes, other = random_probes(), random_probes(1)
    kept, where = probes.clone(), torch.rand(S, K, generator=torch.Generator().manual_seed(2)) < 0.5
    probes.take(where, other)
    assert where.any() and not where.all()
    for name, tensor in probes.tensors().items():
        wide = where if name == "bias" else where[..., None]
        assert torch.equal(tensor, torch.where(wide, other.tensors()[name], kept.tensors()[name]))
        assert not torch.equal(tensor, kept.tensors()[name])
    assert other.to("cpu").to(torch.device("cpu")).n_features == P + D and probes.layers == [3, 12]


def test_a_probe_is_found_by_its_place() -> None:
    probes = random_probes()
    assert probes.place(12, 8) == (2, 1) and probes.place(3, 4, "backtracking", "token") == (1, 0)
    for wrong in ((4, 8), (12, 0)):
        with pytest.raises(InputError, match="a nested probe of the run"):
            probes.place(*wrong)


def test_tensors_make_the_same_probes_and_others_are_refused() -> None:
    probes = random_probes()
    again = NestedProbes.from_tensors(SITES, COLUMNS, probes.tensors(), solver="newton")
    assert all(torch.equal(a, b) for a, b in zip(again.tensors().values(), probes.tensors().values(), strict=True))
    for name in probes.tensors():
        wrong = probes.tensors() | {name: probes.tensors()[name][:, :2]}
        with pytest.raises(ValueError, match="no grid of 3 sites x 3 columns"):
            NestedProbes.from_tensors(SITES, COLUMNS, wrong, solver="newton")


def kept_with_nested() -> KeptProbes:
    """Of a run; two of its nested probes are the control itself."""
    random = torch.Generator().manual_seed(4)
    weight, bias = torch.randn(L, K, D, generator=random), torch.randn(L, K, generator=random)
    threshold = torch.zeros(L, K, dtype=torch.float64)
    bank = ProbeBank(layer_sites([3, 12]), COLUMNS, weight, bias, threshold, solver="newton")
    passes = torch.ones(L, K, dtype=torch.int64)
    penalty = torch.tensor([[math.inf] * 3, [10, 1, math.inf], [0.1, 0.01, math.inf]], dtype=torch.float64)
    norm = torch.full((S, K), 1e-4, dtype=torch.float64)
    of_nested = FinalProbes(
        "newton", NESTED, random_probes(), torch.zeros(K), torch.zeros(S, K, dtype=torch.int64), norm, penalty
    )
    layers = FinalProbes("newton", "layers", bank, torch.zeros(K), passes, torch.full((L, K), math.nan))
    return KeptProbes([layers, of_nested], torch.tensor([1, 2]), {})


def test_they_come_back_from_the_file_of_a_run(tmp_path: Path) -> None:
    kept = kept_with_nested()
    found = load_kept(write(tmp_path, kept)).final[1]
    before = kept.final[1]
    assert isinstance(found.bank, NestedProbes) and (found.feed, found.solver) == (NESTED, "newton")
    assert found.bank.sites == SITES and found.bank.columns == COLUMNS and not found.shared
    pairs = zip(found.bank.tensors().values(), before.bank.tensors().values(), strict=True)
    assert all(same(a, b) for a, b in pairs)
    for name in ("half", "best_pass", "gradient_norm", "penalty"):
        assert same(getattr(found, name), getattr(before, name))
    assert found.bank.threshold is not None and found.bank.threshold.isnan().all()
    assert pack_controls(kept, ABOUT) == pack_controls(load_kept(tmp_path), ABOUT)


DAMAGED = {
    "no weights of the control": {"newton.nested.control_weight": None},
    "weights of the control of fewer columns": {"newton.nested.control_weight": torch.zeros(S, K - 1, P)},
    "weights that are no grid": {"newton.nested.weight": torch.zeros(S, K)},
    "weights of fewer sites": {"newton.nested.weight": torch.zeros(L, K, D)},
    "weights that are infinite": {"newton.nested.weight": torch.full((S, K, D), math.inf)},
    "weights that are none": {"newton.nested.control_weight": torch.full((S, K, P), math.nan)},
    "whole weights": {"newton.nested.bias": torch.zeros(S, K, dtype=torch.int64)},
    "thresholds of another shape": {"newton.nested.threshold": torch.zeros(L, K)},
    "penalties of another shape": {"newton.nested.penalty": torch.zeros(L, K)},
    "norms of another shape": {"newton.nested.gradient_norm": torch.zeros(S)},
}


@pytest.mark.parametrize("how", DAMAGED)
def test_a_damaged_file_is_refused_in_a_line(tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where its checksum is right."""
    monkeypatch.setattr("streamprobe.probes.kept._digest", lambda *_: "any")
    edited(write(tmp_path, kept_with_nested()))
    load_kept(tmp_path)
    edited(tmp_path, **DAMAGED[how])
    with pytest.raises(InputError, match=rf"{CONTROLS_FILE}, which cannot be read .*; expected .*; fix: ") as refused:
        load_kept(tmp_path)
    assert "\n" not in str(refused.value)
