"""A small slice of the real thing: SmolLM2-135M over real annotated chains."""

import csv
import os
from pathlib import Path

import pytest
import torch

from streamprobe.cli import main

ROOT = Path(__file__).parents[1]
MODEL = ROOT / ".cache" / "smollm2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
CHAINS = ROOT.parent / "shared" / "data" / "all_annotated_chains.json"


@pytest.fixture
def all_threads():
    """The forward passes of a real model are worth more than one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    yield
    torch.set_num_threads(before)


@pytest.mark.real
@pytest.mark.skipif(not (MODEL / GGUF).exists(), reason=f"no SmolLM2 in {MODEL}")
@pytest.mark.skipif(not CHAINS.exists(), reason=f"no annotated chains in {CHAINS}")
def test_backtracking_is_found_in_a_slice_of_the_real_chains(tmp_path, all_threads):
    """100 chains, of which 20 are held out: few, so the bounds are wide (all 1,000 give .865, see README)."""
    argv = [
        str(ROOT / "configs/smollm2-135m.yaml"), "--model", str(MODEL), "--gguf_file", GGUF, "--data", str(CHAINS),
        "--layers", "11", "--lags", "0", "48", "--max_chains", "100", "--max_passes", "4", "--bootstrap", "100",
        "--output_dir", str(tmp_path / "run"),
    ]  # fmt: skip
    assert main(argv) == 0
    now, later = csv.DictReader((tmp_path / "run" / "results.csv").open())
    assert 0.80 < float(now["auroc"]) < 0.95
    assert float(later["auroc"]) < float(now["auroc"])
