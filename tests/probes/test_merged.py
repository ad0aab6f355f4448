"""Probes of sites of several widths lie in one bank, and say what they said apart; what does not go together is refused."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from streamprobe.activations.reading import side_by_side
from streamprobe.errors import InputError
from streamprobe.lags import make_columns
from streamprobe.probes.joined import Joined
from streamprobe.probes.kept import CONTROLS_FILE, FinalProbes, KeptProbes, load_kept, pack_controls, shared_probes
from streamprobe.probes.kind_bank import KindBank
from streamprobe.probes.linear import ProbeBank
from streamprobe.probes.merged import cut_out, merged, widths_of
from streamprobe.probes.sites import Site, layer_sites
from streamprobe.probes.storage import load_probes, pack_probes, read_about

COLUMNS = make_columns(["backtracking"], ["token"], [0, 4])
NARROW = [Site("layers.1.mlp.gate", 1, point="mlp.gate"), Site("layers.2.mlp.gate", 2, point="mlp.gate")]
ABOUT = {"data_fingerprint": "d", "model_fingerprint": "m", "config": {}}


def bank_of(sites: list[Site], width: int) -> ProbeBank:
    random = torch.Generator().manual_seed(width)
    weight, bias = torch.randn(len(sites), 2, width, generator=random), torch.randn(len(sites), 2, generator=random)
    return ProbeBank(sites, COLUMNS, weight, bias, torch.zeros(len(sites), 2, dtype=torch.float64), "newton")


BANKS = [bank_of(layer_sites([1, 2]), 5), bank_of(NARROW, 3)]


def acts(n: int = 7) -> list[Tensor]:
    return list(torch.randn(2, n, 2, 5, generator=torch.Generator().manual_seed(1)).unbind())


def test_merged_probes_say_what_they_say_apart() -> None:
    wide, narrow = acts()[0], acts()[1][..., :3]
    both = merged(BANKS)
    assert both.n_features == 5 and widths_of(both) == [5, 5, 3, 3] and both.reads == [*layer_sites([1, 2]), *NARROW]
    apart = torch.cat([bank.scores(x) for bank, x in zip(BANKS, (wide, narrow), strict=True)], 1)
    read = side_by_side([*wide.unbind(1), *narrow.unbind(1)])
    torch.testing.assert_close(both.scores(read), apart, rtol=0, atol=1e-6)
    read[:, 2:, 3:] = 9.0  # what is no activation of the narrow sites is not heard
    torch.testing.assert_close(both.scores(read), apart, rtol=0, atol=1e-6)
    read[:, 2:, :3] += 1  # negative control
    assert not torch.allclose(both.scores(read), apart, atol=1e-2)


def test_a_file_of_them_comes_back(tmp_path: Path) -> None:
    (tmp_path / "probes.safetensors").write_bytes(pack_probes({"newton": merged(BANKS)}, ABOUT))
    found = load_probes(tmp_path)
    assert found.sites == [*layer_sites([1, 2]), *NARROW] and widths_of(found) == [5, 5, 3, 3]
    for bank in BANKS:
        own = cut_out(found, bank.sites, bank.tensors() | {"threshold": bank.bias})
        assert torch.equal(own["weight"], bank.weight) and torch.equal(own["bias"], bank.bias)
    assert found.place(2, 4) == (1, 1) and found.place(2, 4, site="mlp.gate") == (3, 1)
    with pytest.raises(InputError, match="^site mlp; expected one of resid_post mlp.gate, as in the run"):
        found.place(2, 4, site="mlp")
    with pytest.raises(InputError, match="^layer 3; expected one of 1 2, as in the run"):
        found.place(3, 4, site="mlp.gate")


def test_a_file_of_the_outputs_of_blocks_says_nothing_of_sites(tmp_path: Path) -> None:
    """As it did before there were others."""
    path = tmp_path / "probes.safetensors"
    path.write_bytes(pack_probes({"newton": BANKS[0]}, ABOUT))
    assert read_about(path).keys() == {*ABOUT, "solvers", "layers", "columns"}
    path.write_bytes(pack_probes({"newton": BANKS[1]}, ABOUT))  # negative control
    assert read_about(path).keys() == {*ABOUT, "solvers", "layers", "columns", "sites"}


@pytest.mark.parametrize(
    "wrong",
    [
        {"sites": [["a", 1, False, "x"]] * 2},
        {"sites": [["a", 1, False, "x"]]},
        {"sites": [["a", 2, False, "x"], ["b", 1, False, "x"]]},
        {"sites": [["a", 1, True, "x"], ["b", 2, False, "x"]]},
        {"sites": "no"},
        {"widths": [3]},
        {"widths": [3, -1]},
        {"widths": [3, "4"]},
    ],
    ids=str,
)
def test_sites_that_cannot_be_are_refused(wrong: dict[str, object], tmp_path: Path) -> None:
    from streamprobe.probes.storage import pack_tensors

    path = tmp_path / "probes.safetensors"
    columns = [column.saved for column in COLUMNS]
    layout = {"solvers": ["newton"], "layers": [1, 2], "columns": columns, "sites": [list(site) for site in NARROW]}
    tensors = BANKS[1].tensors() | {"threshold": torch.zeros(2, 2, dtype=torch.float64)}
    named = {f"newton.{name}": tensor for name, tensor in tensors.items()}
    path.write_bytes(pack_tensors(named, {**ABOUT, **layout}))
    assert load_probes(path).sites == NARROW  # negative control
    path.write_bytes(pack_tensors(named, {**ABOUT, **layout, **wrong}))
    with pytest.raises(InputError, match="which holds no probes"):
        load_probes(path)


def test_all_that_a_run_keeps_of_them_comes_back(tmp_path: Path) -> None:
    grid = torch.zeros(2, 2)
    final = [
        FinalProbes("newton", feed, bank, torch.zeros(2), grid.long(), grid)
        for feed, bank in zip(("layers", "layers/3"), BANKS, strict=True)
    ]
    kept = KeptProbes(final, torch.zeros(0, dtype=torch.int64), {})
    (tmp_path / "probes.safetensors").write_bytes(pack_probes(shared_probes(kept.final), ABOUT))
    (tmp_path / CONTROLS_FILE).write_bytes(pack_controls(kept, ABOUT))
    found = load_kept(tmp_path).final
    assert [each.feed for each in found] == ["layers", "layers/3"]
    for each, bank in zip(found, BANKS, strict=True):
        assert each.bank.sites == bank.sites and torch.equal(each.bank.weight, bank.weight)


def test_probes_that_read_several_sites_fail_without_one_width() -> None:
    banks = [
        KindBank(Joined("concat"), bank.sites, COLUMNS, {"weight": bank.weight[None], "bias": bank.bias[:1]})
        for bank in BANKS
    ]
    assert merged(banks[:1]) is banks[0]
    with pytest.raises(InputError, match="^concat probes of sites of several widths; expected one width"):
        merged(banks)
