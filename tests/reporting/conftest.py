"""The results of a run over chains that say what an attacker would, and the events of another."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from probe_grids import AREAS, GRIDS, LAYERS, SCORED, values_of
from scored_chains import HOSTILE, LABEL, N_CHAINS, REAL, chains_of, scored_probes
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from streamprobe.data.tokenize import Chain
from streamprobe.evaluation.results import ScoredProbes, TestResults, judge
from streamprobe.evaluation.rows import Judged, Row
from streamprobe.evaluation.texts import POOLINGS, TEXT_FIELDS
from streamprobe.probes.kept import KeptProbes
from streamprobe.reporting import files
from streamprobe.reporting.tracking.tensorboard import TensorBoard
from streamprobe.reporting.tracking.tracker import Tracker
from streamprobe.reporting.transcripts import collect
from streamprobe.system.files import write_atomic


@pytest.fixture(scope="module")
def chains(tokenizer: Any) -> list[Chain]:
    return chains_of(tokenizer)


@pytest.fixture(scope="module")
def groups(chains: list[Chain]) -> list[ScoredProbes]:
    twins = [column._replace(control="permuted") for column in REAL]
    return [
        scored_probes(chains, [3, 12], [*REAL, *twins], strength=1.5, seed=1),
        scored_probes(chains, ["embed"], REAL, strength=0.5, seed=2),
        scored_probes(chains, ["persistence"], REAL[1:], strength=0.2, seed=3),
    ]


@pytest.fixture(scope="module")
def judged(groups: list[ScoredProbes]) -> list[Judged]:
    return judge(groups, N_CHAINS, 20, 0)


@pytest.fixture(scope="module")
def rows(judged: list[Judged]) -> list[Row]:
    return [each.row for each in judged]


@pytest.fixture(scope="module")
def transcripts(groups: list[ScoredProbes], rows: list[Row], chains: list[Chain], tokenizer: Any) -> dict[str, Any]:
    return collect(groups, rows, chains, labels=[LABEL], tokenizer=tokenizer)


@pytest.fixture
def results(
    tmp_path: Path, groups: list[ScoredProbes], judged: list[Judged], chains: list[Chain], tokenizer: Any
) -> TestResults:
    """All that is known at the end of a run whose texts are hostile."""
    facts = {"config": {"data": HOSTILE}, "versions": {"python": "3"}}
    return TestResults(
        folder=tmp_path / "run",
        probes=groups,
        judged=judged,
        kept=KeptProbes([], torch.zeros(0, dtype=torch.int64), {}),
        chains=chains,
        labels=[LABEL],
        tokenizer=tokenizer,
        facts=facts,
        described={"preflight": HOSTILE, "verdicts": [HOSTILE]},
        cost=lambda: {"passes": 1},
        resamples=20,
        seed=0,
    )


@pytest.fixture(scope="session")
def texts() -> list[Row]:
    """Rows of whole texts, of a layer and a control, with a label that is hostile."""
    places = [{"layer": 3, "control": "", "auroc": 0.8}, {"layer": "", "control": "embed", "auroc": 0.6}]
    common: Row = dict.fromkeys(TEXT_FIELDS, 0.25) | {"solver": "newton", "label": LABEL, "target": "token", "lag": 0}
    common |= {"split": "test", "n_texts": 1234, "n_positive": 17, "tpr_at_1fpr_low": math.nan}
    return [{**common, **place, "pooling": pooling} for pooling in POOLINGS for place in places]


@pytest.fixture
def folder(results: TestResults) -> Path:
    """A run's files, without its report and its probes."""
    for name in ("results.csv", "summary.json", "transcripts.json"):
        write_atomic(results.folder / name, files.FILES[name].make(results) or b"")
    return results.folder


CONFIG = {"layers": [3, 12], "seed": 0, "problem_column": "x", "quantization": None}


def logged(folder: Path, every: bool) -> EventAccumulator:
    """Two passes of two metrics, and the end of a run."""
    tracker = Tracker([TensorBoard(folder, CONFIG)], GRIDS, every=every)
    for step in (100, 200):
        for number, grid in enumerate(GRIDS):
            tracker.probes("auroc/validation", grid, values_of(grid, step + number), step)
            tracker.probes("average_precision/validation", grid, values_of(grid, step + number).square(), step)
            tracker.probes("train_loss", grid, values_of(grid, step + number), step)
        tracker.compare(step)
    tracker.curves(LAYERS, SCORED, AREAS, 200)
    tracker.outcome("at no lag\n| a | *b*", {"test/lift": 0.25})
    tracker.close()
    return EventAccumulator(str(folder), {"histograms": 0, "images": 0}).Reload()


@pytest.fixture(scope="session")
def events(tmp_path_factory: pytest.TempPathFactory) -> EventAccumulator:
    """What is logged by default."""
    return logged(tmp_path_factory.mktemp("events"), every=False)


@pytest.fixture(scope="session")
def all_events(tmp_path_factory: pytest.TempPathFactory) -> EventAccumulator:
    """What is logged with the curves of every probe."""
    return logged(tmp_path_factory.mktemp("events"), every=True)
