"""The memory of a stream does not grow with what has come: neither Python's nor that of tensors."""

import gc
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import make_rows
from streamed import write_config

from streamprobe.bench.stream_memory import measure_streams, table
from streamprobe.cli import train as main
from streamprobe.data.reservoir import Reservoir
from streamprobe.errors import InputError
from streamprobe.run.streaming import loop

pytestmark = pytest.mark.usefixtures("undrawn")
FIRST, LAST = 10, 28  # rounds between which it is looked at


def tensor_bytes() -> int:
    """Of all tensors that there are."""
    gc.collect()
    found = [each for each in gc.get_objects() if type(each) is torch.Tensor]
    return sum({each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in found}.values())


def growth(argv: list[str], patch: pytest.MonkeyPatch) -> int:
    """Bytes by which a run grows between two of its rounds; it ends there."""
    take, grown = loop.take_round, [0]

    def watched(run: Any, found: Any) -> None:
        take(run, found)
        if run.reached.rounds == FIRST:
            tracemalloc.start()
            grown[0] = -tensor_bytes()
        if run.reached.rounds == LAST:
            grown[0] += tensor_bytes() + tracemalloc.get_traced_memory()[0]
            tracemalloc.stop()
            run.ended = True

    with patch.context() as own:
        own.setattr(loop, "take_round", watched)
        own.setattr(loop, "end", lambda run: None)
        assert main(argv) == 0
    return grown[0]


@pytest.fixture
def config(tmp_path: Path, model_dir: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("streamprobe.run.streaming.samples.MOST_SEEN", 64)
    more: dict[str, Any] = {"solvers": ["newton", "adam"], "bad_chains": "skip", "reservoir_tokens": 1024}
    return write_config(tmp_path, model_dir, make_rows(450, seed=7), **more)


def test_memory_is_flat_and_grows_without_a_bound_on_what_is_kept(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second half is the negative control: reservoirs that let no chain go."""
    flat = growth([config, "--output_dir", "flat"], monkeypatch)
    assert flat < 400_000
    add: Callable[..., None] = Reservoir.add

    def keeping(self: Reservoir, chain: Any, number: int) -> None:
        self.most = 10**9
        add(self, chain, number)

    monkeypatch.setattr(Reservoir, "add", keeping)
    assert growth([config, "--output_dir", "growing"], monkeypatch) > flat + 700_000


def test_the_benchmark_measures_runs_of_any_length() -> None:
    found = measure_streams([10_000])
    assert found[0]["peak_memory_gb"] > 0.1 and found[0]["seconds"] > 0
    assert "10,000" in table(found) and table(found).endswith("1.000")
    with pytest.raises(InputError, match="tokens 10; expected 10,000 to"):
        measure_streams([10])
