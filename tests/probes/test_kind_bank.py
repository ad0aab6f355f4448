"""Probes of every kind: causal to the bit, the same in chunks, on disk and as the mean of folds."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from streamprobe.lags import Column
from streamprobe.probes.kind_bank import KindBank
from streamprobe.probes.kinds import KINDS, form_if_any, form_of, kind_names, looks_back, split_name
from streamprobe.probes.linear import ProbeBank
from streamprobe.probes.sites import ALL_LAYERS, layer_sites
from streamprobe.probes.storage import load_probes, pack_probes

L, K, D, N = 2, 3, 8, 40
COLUMNS = [Column("event", "token", lag) for lag in (0, 4, 8)]
EVERY = kind_names()


def parts_of(kind: str, n_columns: int = K, seed: int = 0) -> dict[str, Tensor]:
    """Parts of L x K probes of a kind, drawn."""
    random = torch.Generator().manual_seed(seed)
    wide = {
        "stack": {"weight": (1, n_columns, L, D), "bias": (1, n_columns)},
        "concat": {"weight": (1, n_columns, L, D), "bias": (1, n_columns)},
    }
    usual = {"weight": (L, n_columns, D), "bias": (L, n_columns)}
    units = {"inner": (L, n_columns, 5, D), "inner_bias": (L, n_columns, 5), "outer": (L, n_columns, 5)}
    heads = {"query": (L, n_columns, 2, D), "value": (L, n_columns, 2, D), "value_bias": (L, n_columns)}
    more: dict[str, Any] = {"quad": units, "mlp": units, "attn": heads | {"decay": (L, n_columns, 2)}}
    family = split_name(kind).family
    shapes = wide.get(family, usual | more.get(family, {}))
    parts = {name: torch.randn(shape, generator=random) for name, shape in shapes.items()}
    return parts | ({"decay": parts["decay"].abs() / 10} if "decay" in parts else {})


def bank_of(kind: str, columns: list[Column] = COLUMNS, seed: int = 0) -> Any:
    """Probes of a kind, drawn."""
    parts, sites = parts_of(kind, len(columns), seed), layer_sites([3, 5])
    form = form_if_any(kind)
    bank: Any = (
        ProbeBank(sites, columns, **parts, solver="newton", kind=kind)
        if form is None
        else KindBank(form, sites, columns, parts, solver="newton")
    )
    bank.threshold = torch.zeros(bank.bias.shape, dtype=torch.float64)
    return bank


@pytest.fixture
def acts() -> Tensor:
    return torch.randn(N, L, D, generator=torch.Generator().manual_seed(1))


def in_calls(bank: Any, acts: Tensor, sizes: list[int]) -> Iterator[Tensor]:
    """The logits of one chain that comes in calls of these sizes."""
    scorer = bank.scorer()
    for part in acts.split(sizes):
        yield scorer(part, torch.zeros(len(part), dtype=torch.int64))


@pytest.mark.parametrize("kind", EVERY)
def test_no_logit_depends_on_a_later_token(kind: str, acts: Tensor) -> None:
    bank, before = bank_of(kind), bank_of(kind).scores(acts)
    assert before.shape == (N, len(bank.sites), K) and before.dtype == torch.float32
    for t in (0, 7, N - 2):
        changed = acts.clone()
        changed[t + 1 :] = torch.randn(N - t - 1, L, D) * 50
        after = bank.scores(changed)
        assert torch.equal(after[: t + 1], before[: t + 1])
        assert not torch.equal(after[t + 1 :], before[t + 1 :])  # negative control: these are


@pytest.mark.parametrize("kind", EVERY)
def test_kinds_that_look_back_depend_on_earlier_tokens_and_others_do_not(kind: str, acts: Tensor) -> None:
    bank, changed = bank_of(kind), acts.clone()
    changed[3] += 1
    same = torch.equal(bank.scores(changed)[4:], bank.scores(acts)[4:])
    assert same != looks_back(kind)


@pytest.mark.parametrize("kind", EVERY)
def test_in_calls_of_any_size_the_logits_are_the_same(kind: str, acts: Tensor) -> None:
    bank = bank_of(kind)
    for sizes in ([1] * N, [7, 1, 30, 2], [N]):
        torch.testing.assert_close(
            torch.cat(list(in_calls(bank, acts, sizes))), bank.scores(acts), atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("kind", EVERY)
def test_the_mean_of_folds_says_the_mean_of_what_each_says(kind: str, acts: Tensor) -> None:
    columns = [column._replace(fold=fold) for fold in range(3) for column in COLUMNS]
    bank = bank_of(kind, columns, seed=4)
    mean = bank.mean_of_folds(3)
    said = bank.scores(acts).unflatten(2, (3, K)).mean(2)
    assert mean.columns == COLUMNS
    torch.testing.assert_close(mean.scores(acts), said, atol=1e-5, rtol=1e-5)
    assert (mean.scores(acts) - bank.scores(acts)[..., :K]).abs().max() > 0.01  # negative control: not of one fold


@pytest.mark.parametrize("kind", EVERY)
def test_a_file_holds_every_kind(kind: str, acts: Tensor, tmp_path: Path) -> None:
    path, bank = tmp_path / "probes.safetensors", bank_of(kind)
    path.write_bytes(pack_probes({"newton": bank_of("linear", seed=9), f"newton/{kind}": bank}, {"config": {}}))
    loaded = load_probes(path, kind=kind) if kind != "linear" else bank
    assert torch.equal(loaded.scores(acts), bank.scores(acts)) and loaded.kind == kind
    assert loaded.sites == ([ALL_LAYERS] if kind in ("stack", "concat") else layer_sites([3, 5]))
    chosen = loaded.choose([1], loaded.threshold[:, [1]])
    torch.testing.assert_close(chosen.scores(acts), bank.scores(acts)[..., [1]], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", [kind for kind in EVERY if form_if_any(kind)])
def test_parts_that_do_not_go_together_are_refused(kind: str) -> None:
    parts = parts_of(kind)
    for wrong in ({**parts, "bias": parts["bias"][:, :2]}, {**parts, "more": parts["bias"]}):
        with pytest.raises(ValueError, match="no grid of|tensors that are not"):
            KindBank.from_tensors(layer_sites([3, 5]), COLUMNS, wrong, solver="newton", kind=kind)


def test_names_of_kinds_are_read_with_their_numbers() -> None:
    assert split_name("top_k16") == ("top_k", 16) and split_name("stack") == ("stack", 0)
    assert form_of("ema7").kind == "ema7" and form_of("mlp3").kind == "mlp3"
    for wrong in ("mlp", "mlp0", "mlp-4", "stack2", "", "7", "mlp4x", "nested", "mixed"):
        with pytest.raises(ValueError, match="a kind that is not known"):
            split_name(wrong)
    assert len(EVERY) == len(KINDS) and EVERY[0] == "linear"
