"""What a report of a stream adds to its curves: how well probes do by now, and which ones are watched from here on."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from streamprobe.evaluation.results import TestResults
from streamprobe.probes.linear import LINEAR, ProbeBank
from streamprobe.reporting.tracking.tags import lag_name
from streamprobe.reporting.tracking.tracker import Tracker
from streamprobe.run.streaming.drift import Drift

Row = Mapping[str, Any]  # of results.csv
OF_COLUMN = ("solver", "label", "target", "lag")


def best_layers(rows: Sequence[Row]) -> Iterator[Row]:
    """The row of the linear probe with the highest AUROC, of every solver and column."""
    best: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        if row["control"] or row["kind"] != LINEAR or row["auroc"] != row["auroc"]:
            continue
        key = tuple(row[name] for name in OF_COLUMN)
        if key not in best or row["auroc"] > best[key]["auroc"]:
            best[key] = row
    yield from best.values()


def log_report(tracker: Tracker, results: TestResults, step: int) -> None:
    """A point on the curves of test AUROC against tokens of the stream."""
    for row in best_layers(results.rows):
        name = f"{row['solver']}/{row['label']}/{row['target']} {lag_name(row['lag'])}"
        tracker.number(f"auroc/test/{name} best layer", row["auroc"], step)


def watch_drift(drift: Drift, results: TestResults) -> None:
    """Has the best layers of a report watched, of the first solver."""
    final = next(each for each in results.kept.final if each.feed == drift.feed.name)
    rows = [row for row in results.rows if any(is_of(row, site) for site in final.bank.sites)]
    best = {
        (row["label"], row["target"], row["lag"]): row for row in best_layers(rows) if row["solver"] == final.solver
    }
    own, layers = [], []
    for column in drift.columns:
        row = best.get((column.label, column.target, column.lag))
        own.append(final.bank.columns.index(column))
        layers.append(next((i for i, site in enumerate(final.bank.sites) if row and is_of(row, site)), 0))
    bank = final.bank
    assert isinstance(bank, ProbeBank)
    drift.watch(bank.choose(own, bank.bias[:, own].new_zeros(len(bank.sites), len(own))), layers)


def is_of(row: Row, site: Any) -> bool:
    """Whether a row is of a site."""
    return (row["layer"], row["site"]) == (site.layer, site.point)
