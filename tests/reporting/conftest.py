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
from streamprobe.evaluation.rows import FIELDS, Judged, Row
from streamprobe.evaluation.texts import POOLINGS, TEXT_FIELDS
from streamprobe.probes.kept import KeptProbes
from streamprobe.reporting import files
from streamprobe.reporting.tracking.tensorboard import TensorBoard
from streamprobe.reporting.tracking.tracker import Tracker
from streamprobe.reporting.transcripts import collect
from streamprobe.system.files import write_atomic

SPLITS = {"train": {"chains": 1200, "tokens": 70_000}, "test": {"chains": N_CHAINS, "tokens": 960}}


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


def gain(row: Row, *, low: float, within: float) -> Row:
    """The row with what its layer adds, and these corrected low ends in bits and within chains."""
    numbers = {"gain_bits": 0.031, "gain": 0.022, "gain_within": 0.027}
    ends = {f"{name}_{end}": value for name in numbers for end, value in (("low", 0.011), ("high", 0.051))}
    lows = {"gain_bits_low_corrected": low, "gain_low_corrected": 0.001, "gain_within_low_corrected": within}
    return {**row, **numbers, **ends, **lows}


@pytest.fixture(scope="module")
def gained_rows(rows: list[Row]) -> list[Row]:
    """The rows with gains at lag 8, certain of layer 12 alone: in bits only of layer 3.  Lag 0 and controls have none."""
    ahead = [row for row in rows if row["lag"] == 8 and not row["control"]]
    return [
        gain(row, low=0.012, within=0.002 if row["layer"] == 12 else -0.002) if row in ahead else row for row in rows
    ]


@pytest.fixture
def results(
    tmp_path: Path, groups: list[ScoredProbes], judged: list[Judged], chains: list[Chain], tokenizer: Any
) -> TestResults:
    """All that is known at the end of a run whose texts are hostile."""
    facts = {
        "config": {"data": HOSTILE, "model": HOSTILE, "layers": [3, 12]},
        "versions": {"python": "3", "streamprobe": "0.1.0"},
        "git_commit": f"{'0123456789' * 4}+changes",
    }
    return TestResults(
        folder=tmp_path / "run",
        probes=groups,
        judged=judged,
        kept=KeptProbes([], torch.zeros(0, dtype=torch.int64), {}),
        chains=chains,
        labels=[LABEL],
        tokenizer=tokenizer,
        facts=facts,
        described={"preflight": HOSTILE, "verdicts": [HOSTILE], "splits": SPLITS},
        cost=lambda: {"passes": 1, "date": "2026-01-02 03:04 UTC"},
        resamples=20,
        seed=0,
    )


@pytest.fixture(scope="session")
def texts() -> list[Row]:
    """Rows of whole texts, of a layer and a control, with a label that is hostile."""
    places = [{"layer": 3, "control": "", "auroc": 0.8}, {"layer": "", "control": "embed", "auroc": 0.6}]
    common: Row = dict.fromkeys(TEXT_FIELDS, 0.25) | {
        "kind": "linear",
        "site": "resid_post",
        "solver": "newton",
        "label": LABEL,
        "target": "token",
        "lag": 0,
    }
    common |= {"split": "test", "n_texts": 1234, "n_positive": 17, "tpr_at_1fpr_low": math.nan}
    return [{**common, **place, "pooling": pooling} for pooling in POOLINGS for place in places]


@pytest.fixture
def folder(results: TestResults) -> Path:
    """A run's files, without its report and its probes."""
    for name in ("results.csv", "summary.json", "transcripts.json"):
        write_atomic(results.folder / name, files.FILES[name].make(results) or b"")
    return results.folder


@pytest.fixture
def full_folder(folder: Path, results: TestResults, gained_rows: list[Row], texts: list[Row]) -> Path:
    """The same with gains, and with every file of which a report may be drawn."""
    (folder / "results.csv").write_bytes(files.pack_rows(gained_rows, FIELDS))
    for name in ("reliability.csv", "curves.json"):
        (folder / name).write_bytes(files.FILES[name].make(results) or b"")
    of_categories = [{"category": f"{name} {HOSTILE}", **row} for name in ("a", "b") for row in gained_rows]
    (folder / "categories.csv").write_bytes(files.pack_rows(of_categories, list(of_categories[0])))
    (folder / "texts.csv").write_bytes(files.pack_rows(texts, TEXT_FIELDS))
    return folder


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
