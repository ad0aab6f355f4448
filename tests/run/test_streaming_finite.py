"""A stream over a file that ends gives the numbers of the run that reads the same chains at once."""

from pathlib import Path

import pytest
from streamed import ALL, distance, divide_by_hash, write_config

from streamprobe.cli import train as main
from streamprobe.controls.table import CONTROLS
from streamprobe.data.reservoir import Reservoir
from streamprobe.solvers.class_means import ClassMeans

pytestmark = pytest.mark.usefixtures("undrawn")
EXACT = {"max_passes": 40, "tolerance": 1e-6, "lags": [-2, 4], "targets": ["token", "onset"], "bootstrap": 20}


def launch(config: str, folder: str, *more: str) -> None:
    assert main([config, "--output_dir", folder, *more]) == 0


@pytest.fixture
def config(tmp_path: Path, model_dir: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    return write_config(tmp_path, model_dir, **EXACT | ALL | {"round_tokens": 10**6})


def test_a_stream_that_is_kept_whole_gives_the_numbers_of_the_finite_run(
    config: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All controls and several kinds; one round, so that the basis of embeddings is of the same chains."""
    more = ["--controls", *CONTROLS, "--kinds", "linear", "stack", "mlp8", "--max_passes", "20"]
    launch(config, "streamed", *more)
    divide_by_hash(monkeypatch)
    launch(config, "finite", *more, "--streaming", "false")
    assert distance("streamed", "finite") < 1e-6


FEW = ["--controls", "position", "permuted"]


def test_rounds_and_reports_between_them_change_nothing_and_another_order_does(
    config: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second half is the negative control: chains that a hash of another seed divides."""
    launch(config, "streamed", *FEW, "--round_tokens", "1024", "--report_tokens", "3000")
    divide_by_hash(monkeypatch)
    launch(config, "finite", *FEW, "--streaming", "false")
    assert distance("streamed", "finite") < 1e-6
    divide_by_hash(monkeypatch, seed=7)
    launch(config, "other", *FEW, "--streaming", "false")
    assert distance("streamed", "other") > 1e-3


def test_the_class_means_of_all_rounds_are_those_of_the_finite_run(
    config: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Anchored by them, although it has all tokens, a probe stays where it is; not by those of fewer rounds."""
    launch(config, "plain", *FEW)
    monkeypatch.setattr(Reservoir, "holds_all", False)
    launch(config, "anchored", *FEW, "--round_tokens", "1024")
    assert distance("anchored", "plain") < 1e-4
    monkeypatch.setattr(ClassMeans, "end_pass", fading)
    launch(config, "fading", *FEW, "--round_tokens", "1024")
    assert distance("fading", "plain") > 1e-2


def test_test_chains_that_validate_are_those_of_the_finite_run(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    more = [*FEW, "--validation", "test", "--round_tokens", "2048", "--lags", "4"]
    launch(config, "streamed", *more)
    divide_by_hash(monkeypatch)
    launch(config, "finite", *more, "--streaming", "false")
    assert distance("streamed", "finite") < 1e-6


def fading(means: ClassMeans) -> None:
    """Lets what earlier rounds gave fade."""
    means.sums_ *= 0.5
    means.n *= 0.5


def test_adam_on_a_stream_of_one_round_is_adam_in_its_first_pass(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    more = ["--solvers", "adam", "--max_passes", "1", "--lags", "4", "--seeds", "2"]
    launch(config, "streamed", *more)
    divide_by_hash(monkeypatch)
    launch(config, "finite", *more, "--streaming", "false")
    assert distance("streamed", "finite") < 1e-6
    launch(config, "rounds", *more, "--round_tokens", "1024")
    assert distance("rounds", "finite") > 1e-4  # negative control: other tokens stand side by side
