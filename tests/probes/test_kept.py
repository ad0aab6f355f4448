"""What a run keeps of its probes and controls comes back bit for bit, and what is damaged is refused in a line."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import sites_of
from safetensors import safe_open
from torch import Tensor

from streamprobe.errors import InputError
from streamprobe.lags import Column, make_columns
from streamprobe.probes.kept import CONTROLS_FILE, FinalProbes, KeptProbes, load_kept, pack_controls, shared_probes
from streamprobe.probes.linear import ProbeBank
from streamprobe.probes.storage import pack_probes, pack_tensors

ABOUT = {"data_fingerprint": "d", "model_fingerprint": "m", "config": {"seed": 0}}
REAL = make_columns(["backtracking"], ["token", "onset"], [0, 8])
TWINS = [column._replace(control="permuted", seed=seed) for seed in (0, 1) for column in REAL]
OTHER_SEEDS = [column._replace(seed=1) for column in REAL]
NAN = float("nan")


def final_of(solver: str, feed: str, sites: list[int | str], columns: list[Column], width: int = 5) -> FinalProbes:
    """Random probes; a threshold and a norm that are nan, as they may be, among their numbers."""
    random = torch.Generator().manual_seed(len(columns) + width + len(solver))
    shape = (len(sites), len(columns))
    threshold = torch.randn(shape, generator=random, dtype=torch.float64)
    threshold[0, -1] = NAN
    weight, bias = torch.randn(*shape, width, generator=random), torch.randn(shape, generator=random)
    bank = ProbeBank(sites_of(sites), columns, weight, bias, threshold, solver)
    passes = torch.randint(1, 9, shape, generator=random)
    return FinalProbes(solver, feed, bank, torch.randn(shape[1], generator=random), passes, torch.full(shape, NAN))


KEPT = KeptProbes(
    [
        final_of("newton", "layers", [3, 12], [*REAL, *TWINS]),
        final_of("newton", "embeddings", ["embed", "text"], REAL),
        final_of("newton", "persistence", ["persistence"], REAL[1::2], 7),
        final_of("adam", "layers", [3, 12], [*REAL, *TWINS, *OTHER_SEEDS]),
    ],
    torch.tensor([-7, 3, 2**62]),
    {"mean": torch.arange(5.0), "directions": torch.ones(5, 1)},
    ["backtracking", "déduction"],
)
PLAIN = KeptProbes([final_of("newton", "layers", [0], REAL)], torch.zeros(0, dtype=torch.int64), {})


def write(folder: Path, kept: KeptProbes, about: dict[str, Any] = ABOUT) -> Path:
    """Both files of a run."""
    (folder / "probes.safetensors").write_bytes(pack_probes(shared_probes(kept.final), about))
    (folder / CONTROLS_FILE).write_bytes(pack_controls(kept, about))
    return folder


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


@pytest.mark.parametrize("kept", [KEPT, PLAIN], ids=["with controls", "without"])
def test_what_was_kept_comes_back(tmp_path: Path, kept: KeptProbes) -> None:
    found = load_kept(write(tmp_path, kept))
    assert same(found.seen, kept.seen) and found.words.keys() == kept.words.keys()
    assert all(same(found.words[name], kept.words[name]) for name in kept.words)
    assert list(found.section_labels) == list(kept.section_labels)
    for a, b in zip(found.final, kept.final, strict=True):
        assert (a.solver, a.feed, a.bank.sites, a.bank.columns) == (b.solver, b.feed, b.bank.sites, b.bank.columns)
        assert a.bank.threshold is not None and b.bank.threshold is not None
        assert same(a.bank.threshold, b.bank.threshold)
        assert all(same(x, y) for x, y in zip(a.bank.tensors().values(), b.bank.tensors().values(), strict=True))
        assert all(same(getattr(a, name), getattr(b, name)) for name in ("half", "best_pass", "gradient_norm"))


def test_equal_probes_make_equal_bytes_and_no_probe_is_written_twice() -> None:
    assert pack_controls(KEPT, ABOUT) == pack_controls(KEPT, ABOUT)
    assert len(pack_controls(KEPT, ABOUT)) > len(pack_controls(PLAIN, ABOUT))
    assert {name: bank.columns for name, bank in shared_probes(KEPT.final).items()} == {"newton": REAL, "adam": REAL}


def edited(folder: Path, **changes: Any) -> None:
    """Writes controls.safetensors with changes of `about`, or of a tensor by its name (None: without it)."""
    path = folder / CONTROLS_FILE
    with safe_open(path, framework="pt") as f:
        about, tensors = json.loads(f.metadata()["streamprobe"]), {name: f.get_tensor(name) for name in f.keys()}
    for name, value in changes.items():
        where = about if name in about else tensors
        where[name] = value
    path.write_bytes(pack_tensors({k: v for k, v in tensors.items() if v is not None}, about))


JOB = {"solver": "newton", "feed": "layers", "kind": "linear", "sites": [["layer03", 3, False]], "columns": []}
DAMAGED = {
    "another format": {"format": 99},
    "another run": {"model_fingerprint": "other"},
    "jobs that are none": {"jobs": 3},
    "no jobs": {"jobs": []},
    "a job of other layers": {"jobs": [JOB]},
    "a job of an unknown solver": {"jobs": [JOB | {"solver": "magic"}]},
    "a site that is none": {"jobs": [JOB | {"sites": [[1, "x", 2]]}]},
    "a column that is none": {"jobs": [JOB | {"columns": [["a", "token", "0"]]}]},
    "an unknown kind": {"jobs": [JOB | {"kind": "magic", "sites": [["x", None, True]]}]},
    "no hashes": {"seen": None},
    "hashes that are none": {"seen": torch.zeros(2)},
    "half of the words": {"words.directions": None},
    "words that do not go together": {"words.mean": torch.zeros(9)},
    "words that are infinite": {"words.mean": torch.full((5,), NAN)},
    "no weights": {"newton.embeddings.weight": None},
    "weights of another shape": {"newton.layers.weight": torch.zeros(2, 8, 6)},
    "weights that are infinite": {"newton.layers.weight": torch.full((2, 8, 5), float("inf"))},
    "whole weights": {"newton.embeddings.weight": torch.zeros(2, 4, 5, dtype=torch.int64)},
    "thresholds of another shape": {"newton.persistence.threshold": torch.zeros(1, 3)},
    "passes with fractions": {"newton.persistence.best_pass": torch.zeros(1, 2)},
}


@pytest.mark.parametrize("how", DAMAGED)
def test_a_damaged_file_is_refused_in_a_line(tmp_path: Path, how: str) -> None:
    edited(write(tmp_path, KEPT))  # without a change it can be read
    load_kept(tmp_path)
    edited(tmp_path, **DAMAGED[how])
    with pytest.raises(InputError, match=rf"{CONTROLS_FILE}, which cannot be read .*; expected .*; fix: ") as refused:
        load_kept(tmp_path)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("content", [b"", b"x" * 100, "half"])
def test_a_file_that_is_no_whole_one_is_refused_in_a_line(tmp_path: Path, content: bytes | str) -> None:
    path = write(tmp_path, KEPT) / CONTROLS_FILE
    path.write_bytes(content if isinstance(content, bytes) else path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(InputError, match="which cannot be read"):
        load_kept(tmp_path)


def test_the_files_of_two_runs_are_refused(tmp_path: Path) -> None:
    write(tmp_path, KEPT)
    (tmp_path / CONTROLS_FILE).write_bytes(pack_controls(KEPT, ABOUT | {"config": {"seed": 1}}))
    with pytest.raises(InputError, match=r"of another run than probes\.safetensors"):
        load_kept(tmp_path)


def test_a_run_from_before_is_refused_with_what_to_do(tmp_path: Path) -> None:
    (write(tmp_path, KEPT) / CONTROLS_FILE).unlink()
    with pytest.raises(InputError, match="run it again: streamprobe train .*config.yaml"):
        load_kept(tmp_path)
