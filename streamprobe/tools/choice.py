"""Which of a run's probes is meant where the user does not say it all."""

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from streamprobe.errors import InputError
from streamprobe.evaluation.rows import Row
from streamprobe.evaluation.verdict import LOW_ENDS, probe_of_verdict
from streamprobe.lags import Column
from streamprobe.probes.base import Probes
from streamprobe.system.csv_files import read_csv

P = TypeVar("P", bound=Probes)
PLACE = ("layer", "lag", "label", "target")


def choose_probe(
    folder: Path,
    probes: Probes,
    *,
    layer: int | None = None,
    lag: int | None = None,
    label: str | None = None,
    target: str | None = None,
) -> tuple[int, int]:
    """Where a probe of the run in `folder` lies among its probes, (l, k).

    Of those that have what is given it is the one that the run's verdict names: see `probe_of_verdict`.  Without a
    label it is one of the first label, and with a layer and a lag but no target one of the first target.  Raises
    InputError for a probe that the run has not, and where its results.csv is needed and cannot be read.
    """
    real = [column for column in probes.columns if not column.control]
    label = real[0].label if label is None else label
    like = [c for c in real if c.label == label and target in (None, c.target)]
    some = like[0].lag if like and lag is None else lag or 0
    found = probes.place(probes.layers[0] if layer is None else layer, some, label, target or _having(like, some))
    if layer is not None and lag is not None:
        return found
    asked = {"layer": layer, "lag": lag, "label": label, "target": target}
    given = {name: value for name, value in asked.items() if value is not None}
    rows = [row for row in _rows_of(folder, probes) if given.items() <= row.items()]
    if not rows:
        raise InputError(
            f"results.csv in {folder} without the probes of {given}", "one that the run wrote", "give --layer and --lag"
        )
    best = probe_of_verdict(rows)
    return probes.place(best["layer"], best["lag"], best["label"], best["target"])


def choose_all(
    probes: P,
    *,
    layer: int | None = None,
    lag: int | None = None,
    label: str | None = None,
    target: str | None = None,
) -> P:
    """All probes that have what is given and are no controls.  Raises InputError where there are none."""
    asked = {"lag": lag, "label": label, "target": target}
    given = {name: value for name, value in asked.items() if value is not None}
    columns = [k for k, c in enumerate(probes.columns) if not c.control and given.items() <= c._asdict().items()]
    layers = [i for i, number in enumerate(probes.layers) if layer in (None, number)]
    if not (columns and layers):
        asked["layer"], held = layer, [str(column) for column in probes.columns if not column.control]
        more = f" and {len(held) - 8:,} more" if len(held) > 8 else ""
        wanted = " ".join(f"{name} {value}" for name, value in asked.items() if value is not None)
        raise InputError(
            f"{wanted}, which no probe has",
            f"layers {' '.join(map(str, probes.layers))} and columns of {', '.join(held[:8])}{more}",
            "choose others with --layer, --lag, --label and --target",
        )
    return narrow(probes, layers, columns)


def narrow(probes: P, layers: Sequence[int], columns: Sequence[int]) -> P:
    """The probes at these places l and k alone."""
    sites, own = [probes.sites[i] for i in layers], [probes.columns[k] for k in columns]
    tensors = {name: tensor[layers][:, columns] for name, tensor in probes.tensors().items()}
    chosen = type(probes).from_tensors(sites, own, tensors, probes.solver)
    assert probes.threshold is not None
    chosen.threshold, chosen.about = probes.threshold[layers][:, columns], probes.about
    return chosen


def _having(columns: list[Column], lag: int) -> str | None:
    """The first target that has a column of this lag."""
    return next((column.target for column in columns if column.lag == lag), None)


def _rows_of(folder: Path, probes: Probes) -> list[Row]:
    """The rows of results.csv of probes of this solver, as far as the choice needs them."""
    fix = "give --layer, --lag, --label and --target"
    names = ("solver", *PLACE, "control", "auroc", *LOW_ENDS)
    rows = []
    for line in read_csv(folder / "results.csv", names, fix):
        if line["control"] or line["solver"] != probes.solver:
            continue
        try:
            numbers = {name: int(line[name]) for name in ("layer", "lag")}
            scores = {name: float(line[name] or "nan") for name in ("auroc", *LOW_ENDS)}
        except ValueError as error:
            raise InputError(f"results.csv in {folder} ({error})", "one that a run wrote", fix) from error
        rows.append({"label": line["label"], "target": line["target"], "control": "", **numbers, **scores})
    return rows
