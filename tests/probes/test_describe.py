"""Probes in words."""

from pathlib import Path

import torch

from streamprobe import load_probes
from streamprobe.lags import Column
from streamprobe.probes.linear import ProbeBank
from streamprobe.probes.sites import layer_sites
from streamprobe.probes.storage import pack_probes


def test_probes_of_a_run_say_what_they_are_where_they_come_from_and_how_to_use_one(run_folder):
    probes = load_probes(run_folder)
    said = str(probes)
    assert said == repr(probes) and 8 <= said.count("\n") + 1 <= 14
    assert said.startswith(f"18 linear probes from {run_folder}, 3 layers x 6 columns\n")
    for line in ("solver    newton", "layers    0 1 2", "labels    backtracking", "lags      -2 0 +4", "features  32"):
        assert f"\n  {line}" in said
    assert "targets   token onset" in said and "data      chains.json" in said
    (line,) = [line for line in said.splitlines() if "probes.place(" in line]
    place = line.split("l, k = ")[1].split(";")[0]
    assert eval(place, {"probes": probes}) in [(2, k) for k in range(6)]


def test_what_the_file_says_is_kept_by_every_copy(run_folder):
    probes = load_probes(run_folder)
    for copy in (probes.clone(), probes.to("cpu"), probes.choose([0], probes.threshold[:, :1])):
        assert copy.about is probes.about and copy.about["source"] == str(run_folder)


def test_probes_of_no_file_are_described_too():
    columns = [Column("a", "token", 0), Column("b", "within", -3)]
    bank = ProbeBank(layer_sites([5]), columns, torch.zeros(1, 2, 4), torch.zeros(1, 2))
    assert "2 linear probes, 1 layers x 2 columns" in str(bank) and "lags      0 -3" in str(bank)
    assert "from" not in str(bank) and "tensor" not in str(bank)


def test_a_strangers_file_cannot_command_the_terminal(tmp_path):
    bank = ProbeBank(layer_sites([5]), [Column("a\x1b[2J", "token", 0)], torch.zeros(1, 1, 4), torch.zeros(1, 1))
    bank.threshold = torch.zeros(1, 1)
    path = Path(tmp_path / "probes.safetensors")
    path.write_bytes(pack_probes({"newton": bank}, {"config": {"model": "m\n\x1b]0;x", "prompt": "p\x1b", "data": 3}}))
    said = str(load_probes(path))
    assert "\x1b" not in said and "m \ufffd]0;x" in said and "data      3" in said
