"""On pretended CUDA devices: a run crosses none but where it must, ends with the CPU's bytes, and hardly ever waits."""

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import yaml
from accelerate import dispatch_model
from accelerate.hooks import remove_hook_from_module
from fake_device import DEVICE, Seen, aside, fake_cuda

from streamprobe import cli, trainer
from streamprobe.errors import InputError
from streamprobe.model.backbone import load_backbone
from streamprobe.model.hooks import read, steer, tap
from streamprobe.probes.early_stopping import BestProbes
from streamprobe.probes.linear import ProbeBank
from streamprobe.probes.storage import load_probes
from streamprobe.solvers.nested import NestedSolver

pytestmark = pytest.mark.usefixtures("undrawn")
STORES = {"kept": "auto", "streamed": "0.003"}  # by memory_gb
WAITING = {"hooks.py"}  # transformers looks at the positions of every batch
FEW = ("--targets", "token", "--lags", "0", "4", "--batch_size", "256")  # columns, and steps of Adam
SECOND = torch.device("cuda:1")


def load_on_device(name: str, layers: Any, **options: Any) -> Any:
    with aside():
        loaded = load_backbone(name, layers, **options | {"device_map": "cpu"})
    return loaded.to(DEVICE)


def load_on_two(name: str, layers: Any, **options: Any) -> Any:
    """The model with blocks 0 and 1 on the first device and all behind them on the second, as `from_pretrained` does."""
    with aside():
        loaded: Any = load_backbone(name, layers, **options | {"device_map": "cpu"})
    base = loaded.base_model
    start = "" if base is loaded else f"{loaded.base_model_prefix}."
    places = {f"{start}{part}": DEVICE for part in ("embed_tokens", "rotary_emb")}
    places |= {f"{start}layers.{i}": DEVICE if i < 2 else SECOND for i in range(len(base.layers))}
    places |= {f"{start}norm": SECOND} | ({"lm_head": SECOND} if start else {})
    return dispatch_model(loaded, places, DEVICE, skip_keys=loaded._skip_keys_device_placement)


@contextmanager
def devices(n: int, load: Callable[..., Any]) -> Iterator[Seen]:
    """So many devices, with every model on what `load` chooses of them."""
    places = [patch(f"streamprobe.{module}.load_backbone", load) for module in ("model.served", "run.opened")]
    with fake_cuda(devices=n) as seen, places[0], places[1]:
        yield seen


@pytest.fixture
def device() -> Iterator[Seen]:
    """The device, with every model that is loaded on it."""
    with devices(1, load_on_device) as seen:
        yield seen


@pytest.fixture
def two_devices() -> Iterator[Seen]:
    """Two of them, with every model spread over both."""
    with devices(2, load_on_two) as seen:
        yield seen


@pytest.fixture
def config(tmp_path: Path, model_dir: str, chains_file: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    keys = {
        "model": model_dir,
        "data": str(chains_file),
        "max_chains": 50,  # every operator takes many times as long here
        "dtype": "float32",
        "attn_implementation": "eager",
        "layers": [0, 2],
        "lags": [-2, 0, 4],
        "labels": ["backtracking"],
        "targets": ["token", "onset"],
        "max_passes": 2,
        "max_batch_tokens": 512,
        "bootstrap": 10,
        "solvers": ["adam", "newton"],
    }
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(yaml.safe_dump(keys))
    return "tiny.yaml"


@pytest.mark.parametrize("store", STORES)
def test_a_run_on_the_device_ends_as_on_the_cpu(config: str, store: str, request: pytest.FixtureRequest) -> None:
    argv = [config, "--memory_gb", STORES[store]]
    assert cli.train([*argv, "--output_dir", "near"]) == 0
    request.getfixturevalue("device")
    assert cli.train([*argv, "--output_dir", "far"]) == 0
    for name in ("results.csv", "controls.safetensors"):  # in which nested probes are, too
        assert Path("near", name).read_bytes() == Path("far", name).read_bytes()
    about = json.loads(Path("far/summary.json").read_text())["run"]
    assert (
        "cuda:0" in Path("far/summary.json").read_text() and store in about["activations"] and "nested_passes" in about
    )


def test_a_run_whose_activations_lie_in_host_ram_ends_as_on_the_cpu(
    config: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.setattr(
        "streamprobe.run.memory_plan.memory_room", lambda gb, home, reserve=0: 10**9 * (home.type == "cpu")
    )
    monkeypatch.setattr("streamprobe.run.solver_sizes.Matrices.must_share", lambda *_: False)
    assert cli.train([config, "--output_dir", "near"]) == 0
    request.getfixturevalue("device")
    assert cli.train([config, "--output_dir", "far"]) == 0
    assert Path("near/results.csv").read_bytes() == Path("far/results.csv").read_bytes()
    assert "tokens on cpu, kept" in Path("far/summary.json").read_text()


def test_a_run_of_several_folds_on_the_device_ends_as_on_the_cpu(config: str, request: pytest.FixtureRequest) -> None:
    argv = [config, *FEW, "--folds", "3", "--max_chains", "30"]
    assert cli.train([*argv, "--output_dir", "near"]) == 0
    request.getfixturevalue("device")
    assert cli.train([*argv, "--output_dir", "far"]) == 0
    for name in ("results.csv", "probes.safetensors", "controls.safetensors"):
        assert Path("near", name).read_bytes() == Path("far", name).read_bytes()


def test_every_kind_of_probe_is_trained_and_judged_on_the_device(config: str, device: Seen) -> None:
    kinds = "linear meandiff ema4 stack concat quad2 mlp4 attn2 top_k4".split()
    argv = [config, *FEW, "--solvers", "newton", "--max_chains", "30", "--max_passes", "4", "--kinds", *kinds]
    assert cli.train([*argv, "--output_dir", "far"]) == 0
    assert cli.main(["evaluate", "far", "--split", "test", "--out", "again"]) == 0
    near = [line.split(",")[:8] for line in Path("far/results.csv").read_text().splitlines()]
    assert near == [line.split(",")[:8] for line in Path("again/results.csv").read_text().splitlines()]
    for kind in kinds:
        bank = load_probes("far", kind=kind)
        acts = torch.randn(6, 2, bank.n_features)
        assert torch.equal(bank.scores(acts.to(DEVICE)).cpu(), load_probes("far", kind=kind).scores(acts)), kind


@pytest.mark.parametrize(
    ("store", "words"),
    [("kept", "--layers 0 2"), ("streamed", "--layers 1 3 --solvers newton --memory_gb 0.0028")],  # on both devices
    ids=["kept", "streamed"],
)
def test_a_run_over_two_devices_ends_as_on_the_cpu(
    config: str, store: str, words: str, request: pytest.FixtureRequest
) -> None:
    argv = [config, *FEW, *words.split(), "--max_chains", "55"]
    assert cli.train([*argv, "--output_dir", "near"]) == 0
    seen = request.getfixturevalue("two_devices")
    assert cli.train([*argv, "--output_dir", "far"]) == 0
    for name in ("results.csv", "controls.safetensors"):
        assert Path("near", name).read_bytes() == Path("far", name).read_bytes()
    assert store in json.loads(Path("far/summary.json").read_text())["run"]["activations"]
    assert all(each.calls["aten.mm.default"] for each in seen.devices)  # blocks of both have run


@pytest.mark.parametrize(
    ("place", "words"),
    [("device", []), ("two_devices", [*FEW, "--layers", "2", "3", "--max_chains", "40"])],
    ids=["one", "two"],
)
def test_probes_of_a_run_are_used_on_devices(
    config: str, place: str, words: list[str], request: pytest.FixtureRequest
) -> None:
    """Evaluated on other chains, scoring, watching and steering, as on the CPU; of two, all layers are on the second."""
    assert cli.train([config, "--output_dir", "run", "--solvers", "newton", *words]) == 0
    Path("texts.jsonl").write_text(json.dumps({"text": "wait , so it is ."}) + "\n")
    data = yaml.safe_load(Path(config).read_text())["data"]
    commands = [
        ["evaluate", "run", "--data", data, "--out", "evaluated"],
        ["score", "run", "texts.jsonl", "--out", "scores.csv", "--max_batch_tokens", "3"],  # in chunks, with a cache
        ["watch", "run", "--prompt", "so it is", "--max_new_tokens", "4"],
        ["steer", "run", "--strengths", "0", "1", "--problems", "2", "--max_new_tokens", "4", "--json", "steered.json"],
    ]
    for words in commands:
        assert cli.main(words) == 0, words
    near = {name: Path(name).read_bytes() for name in ("evaluated/results.csv", "scores.csv", "steered.json")}
    shutil.rmtree("evaluated")
    Path("scores.csv").unlink()
    request.getfixturevalue(place)
    for words in commands:
        assert cli.main(words) == 0, words
    assert near == {name: Path(name).read_bytes() for name in near}


def waits_in_training(argv: list[str], device: Seen) -> tuple[Counter[str], int]:
    """How often the host waited for the chunks of a pass, by the file that it waited in, and how many there were."""
    found, chunks = Counter[str](), 0

    def feed(jobs: Any, parts: Any, tracker: Any, tokens: int) -> int:
        nonlocal chunks
        before = device.waits.copy()
        for part in parts:
            for batch in part.chunks:
                chunks += 1
                tokens += len(batch.chain)
                for job in jobs:
                    job.solver.step(*job.feed.of(batch))
        for (line, _operator), n in (device.waits - before).items():
            found[line.split(":")[0]] += n
        for job in jobs:
            job.solver.end_pass()
        return tokens

    with patch.object(trainer, "train_pass", feed):
        assert cli.train(argv) == 0
    return found, chunks


@pytest.mark.parametrize("store", STORES)
def test_the_host_does_not_wait_while_the_device_is_fed(config: str, store: str, device: Seen) -> None:
    found, chunks = waits_in_training([config, "--memory_gb", STORES[store]], device)
    assert chunks and sum(n for name, n in found.items() if name not in WAITING) <= chunks, found
    assert not found["stream.py"] and not found["finite.py"] and not found["adam.py"]
    assert found["hooks.py"]  # negative control: waits are seen


@pytest.mark.parametrize("store", STORES)
def test_the_host_does_not_wait_for_the_chunks_of_nested_probes(config: str, store: str, device: Seen) -> None:
    found, chunks, step = Counter[str](), 0, NestedSolver.step
    memory = STORES[store] if store == "kept" else "0.0036"  # of more chains: several chunks a pass

    def counted(self: NestedSolver, *given: Any) -> None:
        nonlocal chunks, found
        before = device.waits.copy()
        step(self, *given)
        found += Counter({line: n for (line, _), n in (device.waits - before).items()})
        chunks += 1

    with patch.object(NestedSolver, "step", counted):
        argv = [config, "--memory_gb", memory, "--max_chains", "60", "--solvers", "newton", "--max_passes", "4"]
        assert cli.train(argv) == 0
    assert chunks > 4 and not found, found
    assert any(line.startswith("block_matrices.py") for line, _ in device.waits)  # negative control: waits are seen


def test_a_mask_that_is_left_on_the_cpu_is_caught(device: Seen) -> None:
    """Negative control: the pretence refuses what CUDA would."""
    bank = ProbeBank([], [], torch.zeros(1, 2, 3, device=DEVICE), torch.zeros(1, 2, device=DEVICE))
    best = BestProbes(bank, None)
    with pytest.raises(RuntimeError, match="same device"):
        best.bank.take(torch.ones(1, 2, dtype=torch.bool), bank)


def test_each_device_has_memory_of_its_own() -> None:
    with fake_cuda(memory=100, devices=2) as seen:
        x = torch.ones(20, device=DEVICE)
        y = x.to(SECOND)
        assert x.copy_(y).device == DEVICE and [each.peak for each in seen.devices] == [80, 80]
        assert torch.cuda.device_count() == 2 and torch.cuda.mem_get_info(SECOND) == (20, 100)
        with pytest.raises(torch.OutOfMemoryError):
            torch.ones(20, device=SECOND)
        with pytest.raises(RuntimeError, match="same device"):  # negative control of the copies
            x + y


def test_a_model_over_two_devices_fails_without_what_moves_its_activations(two_devices: Seen, model_dir: str) -> None:
    model, ids = load_on_two(model_dir, None, dtype="float32"), torch.tensor([[4, 5, 6]], device=DEVICE)
    block = model.base_model.layers[2]
    with tap({2: block}) as taken, steer(block, add=torch.ones(32, device=DEVICE)):
        read(model, ids)
        assert taken[2].device == SECOND
        with pytest.raises(RuntimeError, match="same device"):
            taken[2] + torch.ones(32, device=DEVICE)
    remove_hook_from_module(model, recurse=True)
    with pytest.raises(InputError, match="same device"):
        read(model, ids)


def test_layers_that_are_left_on_two_devices_are_caught(config: str, two_devices: Seen) -> None:
    """Negative control: what gathers the layers must move them."""
    with patch("streamprobe.activations.stream._gather", lambda sources, _device: torch.stack([x for x, _ in sources])):
        with pytest.raises(RuntimeError, match="same device"):
            cli.train([config])
