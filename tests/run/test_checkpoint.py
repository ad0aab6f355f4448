"""Best probes against one early-stopping loop for each probe; files that survive a crash, bit for bit."""

import builtins
import json
import os
from collections.abc import Callable
from concurrent.futures import wait
from dataclasses import replace
from pathlib import Path
from threading import Event, Timer
from typing import Any, NamedTuple

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from streamprobe.errors import InputError
from streamprobe.lags import Column, make_columns
from streamprobe.probes.early_stopping import BestProbes
from streamprobe.probes.linear import ProbeBank
from streamprobe.probes.sites import layer_sites
from streamprobe.probes.storage import load_probes, pack_probes, raw_bytes
from streamprobe.run import checkpoint
from streamprobe.run.checkpoint import STATE, Checkpoint, Checkpoints, load_run, save_run
from streamprobe.run.memory_plan import Kept
from streamprobe.solvers.adam import AdamSolver
from streamprobe.system import files
from streamprobe.system.files import write_atomic

NAN = float("nan")
COLUMNS = make_columns(["backtracking"], ["token", "onset"], [-8, 0])
SHAPE = (3, len(COLUMNS))
NOT_CONVERGED = torch.zeros(SHAPE, dtype=torch.bool)


def bank_of(number: float) -> ProbeBank:
    """A bank whose every probe is `number`, so that a snapshot tells which pass it is from."""
    number = float(number)  # a bank is float32
    return ProbeBank(layer_sites([2, 5, 11]), list(COLUMNS), torch.full((*SHAPE, 6), number), torch.full(SHAPE, number))


def random_bank(seed: int) -> ProbeBank:
    random = torch.Generator().manual_seed(seed)
    weight, bias = torch.randn(*SHAPE, 6, generator=random), torch.randn(SHAPE, generator=random)
    return ProbeBank(layer_sites([2, 5, 11]), list(COLUMNS), weight, bias)


def scores_of(value: float) -> Tensor:
    return torch.full(SHAPE, value, dtype=torch.float64)


class Best(NamedTuple):
    number: int  # the pass of the snapshot
    score: float
    stopped_after: int  # 0: never


def early_stopping(scores: list[float], patience: int) -> Best:
    """One probe alone, as in a plain training loop that breaks."""
    best, number, misses = -1.0, 0, 0
    for i, score in enumerate(scores, 1):
        score = 0.0 if score != score else score
        if score > best:
            best, number, misses = score, i, 0
        else:
            misses += 1
        if misses == patience:
            return Best(number, best, i)
    return Best(number, best, 0)


@pytest.mark.parametrize("patience", [1, 2, 3, 10])
@pytest.mark.parametrize("seed", range(5))
def test_each_probe_is_stopped_as_by_its_own_loop(patience: int, seed: int) -> None:
    """Scores with many equals and NaN; the snapshot, its score and its pass, and the moment of the stop."""
    random = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 8, (12, *SHAPE), generator=random).double() / 8
    scores[torch.rand(scores.shape, generator=random) < 0.15] = NAN
    best = BestProbes(bank_of(0), patience)
    stopped_after = torch.zeros(SHAPE, dtype=torch.int64)
    for i, score in enumerate(scores, 1):
        best.update(i, bank_of(i), NOT_CONVERGED, score)
        stopped_after[best.stopped & (stopped_after == 0)] = i
    for at in torch.cartesian_prod(torch.arange(SHAPE[0]), torch.arange(SHAPE[1])).tolist():
        expected = early_stopping(scores[:, *at].tolist(), patience)
        assert Best(int(best.best_pass[*at]), float(best.score[*at]), int(stopped_after[*at])) == expected
        assert (best.bank.weight[*at] == expected.number).all() and best.bank.bias[*at] == expected.number
    assert len(stopped_after.unique()) > 1  # the probes do differ


def test_a_stopped_probe_never_changes_again() -> None:
    best = BestProbes(bank_of(0), patience=2)
    for number, score in enumerate([0.5, 0.4, 0.3], 1):
        best.update(number, bank_of(number), NOT_CONVERGED, scores_of(score))
    assert best.stopped.all()
    before = {name: tensor.clone() for name, tensor in best.state().items()}
    for number, score in enumerate([0.9, 1.0, NAN], 4):
        best.update(number, bank_of(number), NOT_CONVERGED, scores_of(score))
    assert all(torch.equal(before[name], tensor) for name, tensor in best.state().items())
    assert (best.best_pass == 1).all() and (best.bank.weight == 1).all()


def test_control_a_probe_with_patience_left_does_change() -> None:
    best = BestProbes(bank_of(0), patience=3)
    for number, score in enumerate([0.5, 0.4, 0.3, 0.9], 1):
        best.update(number, bank_of(number), NOT_CONVERGED, scores_of(score))
    assert (best.best_pass == 4).all() and (best.bank.weight == 4).all() and not best.stopped.any()


@pytest.mark.parametrize(
    ("scores", "best_pass"),
    [([NAN, 0.0, NAN], 1), ([0.0, NAN], 1), ([NAN, 0.1, NAN], 2), ([0.2, NAN, 0.1], 1), ([NAN], 1)],
)
def test_a_nan_score_counts_as_zero(scores: list[float], best_pass: int) -> None:
    best = BestProbes(bank_of(0), patience=5)
    for number, score in enumerate(scores, 1):
        best.update(number, bank_of(number), NOT_CONVERGED, scores_of(score))
    assert (best.best_pass == best_pass).all() and (best.bank.weight == best_pass).all()
    assert (best.score == max(0.0, *(s for s in scores if s == s), 0.0)).all()


def test_an_equal_score_is_no_rise() -> None:
    best = BestProbes(bank_of(0), patience=1)
    best.update(1, bank_of(1), NOT_CONVERGED, scores_of(0.5))
    best.update(2, bank_of(2), NOT_CONVERGED, scores_of(0.5))
    assert best.stopped.all() and (best.bank.weight == 1).all()


def test_a_snapshot_is_a_copy_of_the_live_probes() -> None:
    first, live = bank_of(7), bank_of(1)
    best = BestProbes(first, patience=1)
    first.weight.zero_(), first.bias.zero_(), first.columns.clear()
    assert (best.bank.weight == 7).all() and (best.bank.bias == 7).all() and best.bank.columns == COLUMNS
    best.update(1, live, NOT_CONVERGED, scores_of(0.5))
    live.weight.zero_(), live.bias.zero_()
    assert (best.bank.weight == 1).all() and (best.bank.bias == 1).all()


def test_control_a_shallow_copy_follows_the_live_probes() -> None:
    """The check above can fail: a copy of the bank alone still holds its tensors."""
    live = bank_of(1)
    shallow = replace(live)
    live.weight.zero_()
    assert (shallow.weight == 0).all()


def test_without_patience_the_newest_probes_are_the_best_until_they_have_converged() -> None:
    best = BestProbes(bank_of(0), patience=None)
    first = NOT_CONVERGED.clone()
    first[0, 1] = True
    for number, (score, converged) in enumerate([(0.5, NOT_CONVERGED), (0.4, first), (0.3, first)], 1):
        best.update(number, bank_of(number), converged, scores_of(score))
    assert torch.equal(best.stopped, first) and torch.equal(best.best_pass, torch.where(first, 2, 3))
    assert (best.bank.weight[0, 1] == 2).all() and (best.bank.weight[1] == 3).all()


def test_a_probe_that_is_not_a_number_is_replaced_whole() -> None:
    best = BestProbes(bank_of(NAN), patience=1)
    best.update(1, bank_of(1), NOT_CONVERGED, scores_of(0.1))
    assert (best.bank.weight == 1).all() and (best.bank.bias == 1).all()


def test_best_probes_go_on_from_a_file(tmp_path: Path) -> None:
    scores = torch.rand(10, *SHAPE, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    straight, resumed = BestProbes(bank_of(0), 3), BestProbes(random_bank(9), 3)
    for number, score in enumerate(scores, 1):
        straight.update(number, random_bank(number), NOT_CONVERGED, score)
        if number == 4:
            save_run(tmp_path, state({"best": straight.state()}))
    resumed.load(load_run(tmp_path).states["best"])
    for number, score in enumerate(scores[4:], 5):
        resumed.update(number, random_bank(number), NOT_CONVERGED, score)
    ours, theirs = resumed.state(), straight.state()
    assert ours.keys() == theirs.keys()
    assert torch.equal(resumed.stopped, straight.stopped)
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


@pytest.mark.parametrize("name", ["weight", "bias", "score", "best_pass", "misses", "stopped"])
def test_best_probes_take_no_tensor_of_another_kind(name: str) -> None:
    best = BestProbes(bank_of(1), 3)
    before, state = best.state(), best.state()
    for other in (state[name][:1], state[name].half(), state[name][None]):
        with pytest.raises(InputError, match=f"as {name}; expected"):
            best.load({key: torch.zeros_like(tensor) for key, tensor in state.items()} | {name: other})
    with pytest.raises(InputError, match=f"nothing as {name}"):
        best.load({key: tensor for key, tensor in state.items() if key != name})
    assert all(torch.equal(tensor, before[key]) for key, tensor in best.state().items())


PARTS: dict[str, dict[str, Tensor]] = {
    "solver": {
        "weight": torch.tensor([[1.0, -0.0, NAN], [float("inf"), 1e-45, 3.0]]),
        "weight.step": torch.tensor(17.0),
        "transposed": torch.arange(6.0).reshape(2, 3).T,
        "half": torch.tensor([0.1, 300.0], dtype=torch.bfloat16),
    },
    "best": {
        "score": torch.tensor([[1 / 3]], dtype=torch.float64),
        "best_pass": torch.tensor([[2**40]]),
        "stopped": torch.tensor([True, False]),
        "none": torch.zeros(0, 4),
    },
}
FACTS: dict[str, Any] = {"config": {"l2": 0.01, "name": "é"}, "versions": {"torch": "2"}}


def state(parts: dict[str, dict[str, Tensor]], **changes: Any) -> Checkpoint:
    return Checkpoint(parts, FACTS, 3, 12345678901, Kept(5, True, False, False))._replace(**changes)


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def test_a_run_comes_back_bit_for_bit(tmp_path: Path) -> None:
    save_run(tmp_path, state(PARTS))
    parts, *about = load_run(tmp_path)
    assert about == list(state({})[1:]) and parts.keys() == PARTS.keys()
    for part, tensors in PARTS.items():
        assert parts[part].keys() == tensors.keys()
        for name, tensor in tensors.items():
            loaded = parts[part][name]
            assert (loaded.dtype, loaded.shape, bits(loaded)) == (tensor.dtype, tensor.shape, bits(tensor)), name


def test_the_last_save_is_the_one_that_comes_back(tmp_path: Path) -> None:
    save_run(tmp_path, state(PARTS))
    first = load_run(tmp_path)
    save_run(tmp_path, state({"solver": {"weight": torch.ones(2)}}, passes=4))
    last = load_run(tmp_path)
    assert last.passes == 4 and last.states.keys() == {"solver"}
    assert torch.equal(last.states["solver"]["weight"], torch.ones(2))
    assert bits(first.states["solver"]["weight"]) == bits(PARTS["solver"]["weight"])  # and the first one is still whole
    assert [file.name for file in (tmp_path / STATE).parent.iterdir()] == [Path(STATE).name]


def test_equal_input_gives_equal_bytes(tmp_path: Path) -> None:
    """Also in another order and from other memory."""
    save_run(tmp_path / "a", state(PARTS))
    turned = {part: {name: PARTS[part][name].clone() for name in reversed(PARTS[part])} for part in reversed(PARTS)}
    save_run(tmp_path / "b", state(turned, facts={key: FACTS[key] for key in reversed(FACTS)}))
    assert (tmp_path / "a" / STATE).read_bytes() == (tmp_path / "b" / STATE).read_bytes()


@pytest.mark.parametrize(("part", "name"), [("solver", "weight"), ("best", "stopped")])
def test_control_another_bit_gives_other_bytes(tmp_path: Path, part: str, name: str) -> None:
    save_run(tmp_path / "a", state(PARTS))
    other = PARTS[part][name].clone()
    other.view(torch.uint8)[..., 0] ^= 1
    save_run(tmp_path / "b", state(PARTS | {part: PARTS[part] | {name: other}}))
    assert (tmp_path / "a" / STATE).read_bytes() != (tmp_path / "b" / STATE).read_bytes()


@pytest.mark.parametrize("folder", ["", "not there", "checkpoint"])
def test_without_a_checkpoint_there_is_none(tmp_path: Path, folder: str) -> None:
    (tmp_path / "checkpoint").mkdir()
    assert load_run(tmp_path / folder) is None


def test_a_solver_goes_on_from_a_file_bit_for_bit(tmp_path: Path) -> None:
    random = torch.Generator().manual_seed(0)

    def make(seed: int) -> AdamSolver:
        return AdamSolver([2, 5, 11], COLUMNS, 6, torch.full((len(COLUMNS),), 3.0), batch_size=16, seed=seed)

    chunks = [
        (torch.randn(40, 3, 6, generator=random), torch.rand(40, 4, generator=random) < 0.3, torch.ones(40, 4).bool())
        for _ in range(4)
    ]
    straight, resumed = make(0), make(1)
    for i, chunk in enumerate(chunks):
        if i == 2:
            save_run(tmp_path, state({"solver": straight.state()}))
        straight.step(*chunk)
    resumed.load(load_run(tmp_path).states["solver"])
    for chunk in chunks[2:]:
        resumed.step(*chunk)
    assert all(torch.equal(resumed.state()[name], tensor) for name, tensor in straight.state().items())


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """The file of a small checkpoint."""
    save_run(tmp_path, state(PARTS))
    return tmp_path / STATE


def refused(path: Path) -> str:
    """What loading the checkpoint is refused with, which must be one line that names the file."""
    with pytest.raises(InputError) as caught:
        load_run(path.parents[1])
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("mask", [1, 2, 4, 8, 16, 32, 64, 128, 255])
def test_a_byte_that_flips_is_found_wherever_it_lies(saved: Path, mask: int) -> None:
    whole = saved.read_bytes()
    for at in range(len(whole)):
        saved.write_bytes(whole[:at] + bytes([whole[at] ^ mask]) + whole[at + 1 :])
        refused(saved)
    saved.write_bytes(whole)
    assert load_run(saved.parents[1])


def test_a_flipped_byte_goes_unseen_without_the_checksum(saved: Path) -> None:
    """Negative control: the format alone takes another weight for the right one."""
    whole = saved.read_bytes()
    saved.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with safe_open(saved, framework="pt") as f:
        assert len({name: f.get_tensor(name) for name in f.keys()}) == sum(map(len, PARTS.values()))


def test_a_truncated_checkpoint_is_refused_wherever_it_ends(saved: Path) -> None:
    whole = saved.read_bytes()
    for end in range(len(whole)):
        saved.write_bytes(whole[:end])
        refused(saved)
    saved.write_bytes(whole + b"\0")
    refused(saved)


def rewrite(path: Path, change: Callable[[dict[str, Any], dict[str, Tensor]], Any], sealed: bool) -> None:
    """Changes what a checkpoint says and holds; `sealed`: with a checksum that is right again."""
    with safe_open(path, framework="pt") as f:
        seal, _, about_text = f.metadata()["streamprobe"].partition(" ")
        tensors = {name: f.get_tensor(name) for name in f.keys()}
    about = json.loads(about_text)
    change(about, tensors)
    text = json.dumps(about, sort_keys=True)
    save_file(tensors, path, {"streamprobe": f"{checkpoint._checksum(tensors, text) if sealed else seal} {text}"})


FOREIGN: dict[str, Callable[[dict[str, Any], dict[str, Tensor]], Any]] = {
    "without facts": lambda about, _: about.pop("facts"),
    "facts without a config": lambda about, _: about["facts"].pop("config"),
    "facts of another kind": lambda about, _: about.update(facts=[1]),
    "without a pass": lambda about, _: about.pop("pass"),
    "pass -1": lambda about, _: about.update({"pass": -1}),
    "pass true": lambda about, _: about.update({"pass": True}),
    "pass as text": lambda about, _: about.update({"pass": "3"}),
    "pass 2.5": lambda about, _: about.update({"pass": 2.5}),
    "without tokens": lambda about, _: about.pop("tokens"),
    "tokens as text": lambda about, _: about.update(tokens="9"),
    "without a plan": lambda about, _: about.pop("plan"),
    "plan of another kind": lambda about, _: about.update(plan=7),
    "a later format": lambda about, _: about.update(format=99),
    "without a format": lambda about, _: about.pop("format"),
    "a tensor of no part": lambda _, tensors: tensors.update(stray=torch.ones(1)),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_content_is_refused_though_its_checksum_is_right(saved: Path, name: str) -> None:
    rewrite(saved, FOREIGN[name], sealed=True)
    refused(saved)


@pytest.mark.parametrize("name", [*FOREIGN, "a tensor less", "another shape", "another dtype"])
def test_content_that_was_changed_is_refused(saved: Path, name: str) -> None:
    def change(about: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        if name in FOREIGN:
            FOREIGN[name](about, tensors)
        else:
            key = "solver.weight"
            shapes = {"another shape": tensors[key][None], "another dtype": tensors[key].view(torch.uint8)}
            tensors |= {key: shapes[name]} if name in shapes else {}
            if name not in shapes:
                del tensors[key]

    rewrite(saved, change, sealed=False)
    refused(saved)


def test_rewriting_alone_changes_nothing(saved: Path) -> None:
    """Negative control of the tests above."""
    for sealed in (True, False):
        rewrite(saved, lambda about, tensors: None, sealed)
        assert load_run(saved.parents[1]).facts == FACTS


def test_what_is_no_checkpoint_is_refused(saved: Path) -> None:
    for content in (b"", b"{}", b"garbage " * 100, bytes(1000), (10**6).to_bytes(8, "little") + b"[" * 10**6):
        saved.write_bytes(content)
        refused(saved)
    for metadata in (None, {}, {"streamprobe": "no JSON"}, {"streamprobe": "[" * 10**5}, {"streamprobe": "[]"}):
        save_file({"a.b": torch.ones(1)}, saved, metadata)
        refused(saved)
    saved.unlink()
    saved.mkdir()
    refused(saved)
    saved.rmdir()
    os.mkfifo(saved)  # which a reader would wait for
    refused(saved)


def test_write_atomic_makes_folders_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "file"
    for content in (b"old", b"", b"new, and longer"):
        write_atomic(path, content)
        assert path.read_bytes() == content
        assert list(path.parent.iterdir()) == [path]


def refuse(*_: Any) -> None:
    raise OSError(28, "No space left on device")


class HalfFile:
    """A file whose disk is full after half of the content."""

    def __init__(self, path: Path, mode: str):
        self.file = builtins.open(path, mode, buffering=0)  # noqa: SIM115

    def __enter__(self) -> "HalfFile":
        return self

    def __exit__(self, *_: Any) -> None:
        self.file.close()

    def write(self, content: bytes) -> int:
        self.file.write(content[: len(content) // 2])
        raise OSError(28, "No space left on device")


def fail_at(monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    if where == "write":
        monkeypatch.setattr(files, "open", HalfFile, raising=False)
    else:
        monkeypatch.setattr(os, where, refuse)


@pytest.mark.parametrize("where", ["write", "fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    path = tmp_path / "file"
    write_atomic(path, b"old " * 100)
    with monkeypatch.context() as patch, pytest.raises(InputError, match="file.*No space.*make room.*--resume"):
        fail_at(patch, where)
        write_atomic(path, b"new and longer " * 100)
    assert path.read_bytes() == b"old " * 100 and list(tmp_path.iterdir()) == [path], "and nothing of the new one"
    write_atomic(path, b"new")
    assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("where", ["write", "fsync", "replace"])
def test_a_first_write_that_fails_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    with monkeypatch.context() as patch, pytest.raises(InputError, match="state.safetensors.*No space"):
        fail_at(patch, where)
        save_run(tmp_path, state(PARTS))
    assert load_run(tmp_path) is None and not list((tmp_path / STATE).parent.iterdir())


def test_control_a_plain_write_that_fails_tears_the_file(tmp_path: Path) -> None:
    """The check above can fail: the same full disk under a file that is written in place."""
    path = tmp_path / "file"
    path.write_bytes(b"old " * 100)
    with pytest.raises(OSError, match="No space"), HalfFile(path, "wb") as f:
        f.write(b"new and longer " * 100)
    assert path.read_bytes() not in (b"old " * 100, b"new and longer " * 100)


def test_content_is_on_disk_before_the_name_moves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def noted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            calls.append(name)
            return function(*args)

        return call

    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, noted(name, getattr(os, name)))
    write_atomic(tmp_path / "file", b"content")
    assert calls.index("fsync") < calls.index("replace")


@pytest.fixture
def written(tmp_path: Path) -> tuple[Path, dict[str, ProbeBank]]:
    """A run's folder with the probes of two solvers."""
    banks = {"newton": random_bank(1), "adam": random_bank(2)}
    thresholds = {"newton": torch.zeros(SHAPE), "adam": torch.ones(SHAPE)}
    for name, bank in banks.items():
        bank.threshold = thresholds[name]
    (tmp_path / "probes.safetensors").write_bytes(pack_probes(banks, {"config": {"seed": 0}}))
    return tmp_path, banks


@pytest.mark.parametrize("solver", ["newton", "adam", None])
@pytest.mark.parametrize("name", ["", "probes.safetensors"])
def test_probes_come_back_bit_for_bit(
    written: tuple[Path, dict[str, ProbeBank]], solver: str | None, name: str
) -> None:
    """By folder or file, as text or path; without a solver the first one."""
    folder, banks = written
    expected = banks[solver or "newton"]
    for path in (folder / name, str(folder / name)):
        bank = load_probes(path, solver)
        assert (bank.layers, bank.columns) == (expected.layers, expected.columns)
        assert all(isinstance(column, Column) for column in bank.columns)
        assert bits(bank.weight) == bits(expected.weight) and bits(bank.bias) == bits(expected.bias)
        acts = torch.randn(9, 3, 6, generator=torch.Generator().manual_seed(0))
        assert torch.equal(bank.scores(acts), expected.scores(acts))


def test_control_the_two_solvers_probes_differ(written: tuple[Path, dict[str, ProbeBank]]) -> None:
    folder, banks = written
    assert bits(load_probes(folder, "adam").weight) != bits(banks["newton"].weight)


def test_an_unknown_solver_is_named(written: tuple[Path, dict[str, ProbeBank]]) -> None:
    with pytest.raises(InputError, match=r"'sgd'.*\['newton', 'adam'\]"):
        load_probes(written[0], "sgd")


@pytest.mark.parametrize("name", ["", "probes.safetensors", "elsewhere"])
def test_without_probes_there_is_no_file(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="probes.safetensors|exist"):
        load_probes(tmp_path / name)


def test_scores_are_the_dot_product_of_each_layers_own_probes() -> None:
    bank, acts = random_bank(4), torch.randn(7, 3, 6, generator=torch.Generator().manual_seed(1)).bfloat16()
    scores = bank.scores(acts)
    assert scores.dtype == torch.float32 and scores.shape == (7, *SHAPE)
    for i in range(SHAPE[0]):
        for k in range(SHAPE[1]):
            expected = acts[:, i].double() @ bank.weight[i, k].double() + bank.bias[i, k]
            assert (scores[:, i, k] - expected).abs().max() < 1e-5


def test_a_tensor_is_summed_by_its_numbers_whatever_its_strides():
    """A part of a larger tensor of which only one number is left keeps that one's strides, and counts as contiguous."""
    whole = torch.arange(129.0).reshape(1, 1, 129)
    part = whole[..., 5]
    assert part.is_contiguous() and part.stride() == (129, 129)
    assert raw_bytes(part) == torch.tensor([5.0]).numpy().tobytes()
    assert raw_bytes(whole.mT) == whole.numpy().tobytes()
    assert raw_bytes(torch.tensor(3, dtype=torch.bfloat16)) == b"\x40\x40"
    with pytest.raises(RuntimeError, match="stride"):  # negative control
        part.contiguous().flatten().view(torch.uint8)


def held_back(monkeypatch: pytest.MonkeyPatch) -> tuple[Event, list[int]]:
    """Writes wait for an event; which passes were written."""
    go, written = Event(), []

    def save(folder: Path, checkpoint: Checkpoint) -> None:
        assert go.wait(60)
        save_run(folder, checkpoint)
        written.append(checkpoint.passes)

    monkeypatch.setattr(checkpoint, "save_run", save)
    return go, written


def test_a_run_goes_on_while_its_checkpoint_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What would begin meanwhile is passed over; at the end the last one is waited for."""
    go, written = held_back(monkeypatch)
    with Checkpoints(tmp_path, seconds=0.0) as checkpoints:
        for number in (1, 2):
            checkpoints.offer(state(PARTS, passes=number))
        assert not (tmp_path / STATE).exists()
        go.set()
        checkpoints.write(state(PARTS, passes=3))
        checkpoints.wait()
        assert written == [1, 3] and load_run(tmp_path).passes == 3


def test_nothing_is_written_before_it_is_time_and_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go, written = held_back(monkeypatch)
    go.set()
    with Checkpoints(tmp_path, seconds=3600.0) as checkpoints:
        checkpoints.offer(state(PARTS, passes=1))
        checkpoints.begun -= 3600.0
        checkpoints.offer(newest := state(PARTS, passes=2))
        checkpoints.offer(state(PARTS, passes=3))
        checkpoints.write(newest)
    assert written == [2]


def test_a_write_ends_before_its_run_does_whatever_ends_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go, written = held_back(monkeypatch)
    with pytest.raises(KeyboardInterrupt), Checkpoints(tmp_path, seconds=0.0) as checkpoints:
        checkpoints.offer(state(PARTS))
        Timer(0.1, go.set).start()
        raise KeyboardInterrupt
    assert written == [3] and load_run(tmp_path).passes == 3


def test_what_was_offered_is_written_where_a_run_is_interrupted(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), Checkpoints(tmp_path, seconds=3600.0) as checkpoints:
        checkpoints.offer(state(PARTS))
        raise KeyboardInterrupt
    assert load_run(tmp_path).passes == 3


def test_what_was_offered_does_not_replace_what_was_written_after_it(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), Checkpoints(tmp_path, seconds=3600.0) as checkpoints:
        checkpoints.offer(state(PARTS, passes=1))
        checkpoints.write(state(PARTS, passes=2))
        raise KeyboardInterrupt
    assert load_run(tmp_path).passes == 2


def test_what_was_offered_is_not_written_where_a_run_ends_well(tmp_path: Path) -> None:
    with Checkpoints(tmp_path, seconds=3600.0) as checkpoints:
        checkpoints.offer(state(PARTS))
    assert load_run(tmp_path) is None


@pytest.mark.parametrize("ask", ["offer", "write", "wait"])
def test_what_was_in_the_way_of_a_write_is_reported_by_the_next_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ask: str
) -> None:
    with Checkpoints(tmp_path, seconds=0.0) as checkpoints:
        with monkeypatch.context() as patch:
            fail_at(patch, "replace")
            checkpoints.offer(state(PARTS))
            wait([checkpoints.writing])
        calls: dict[str, Callable[[], None]] = {
            "offer": lambda: checkpoints.offer(state(PARTS)),
            "write": lambda: checkpoints.write(state(PARTS)),
            "wait": checkpoints.wait,
        }
        with pytest.raises(InputError, match="state.safetensors.*No space.*make room.*--resume"):
            calls[ask]()
    assert load_run(tmp_path) is None
