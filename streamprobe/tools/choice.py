"""Which of a run's probes is meant where the user does not say it all."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from streamprobe.errors import InputError
from streamprobe.evaluation.rows import Row
from streamprobe.evaluation.verdict import LOW_ENDS, probe_of_verdict
from streamprobe.lags import Column
from streamprobe.probes.base import Probes
from streamprobe.probes.sites import RESID_POST, Site
from streamprobe.system.csv_files import read_csv

P = TypeVar("P", bound=Probes)
PLACE = ("site", "layer", "lag", "label", "target")


def choose_probe(
    folder: Path,
    probes: Probes,
    *,
    layer: int | None = None,
    lag: int | None = None,
    label: str | None = None,
    target: str | None = None,
    site: str | None = None,
) -> tuple[int, int]:
    """Where a probe of the run in `folder` lies among its probes, (l, k).

    Of those that have what is given it is the one that the run's verdict names: see `probe_of_verdict`.  Without a
    label it is one of the first label, and with a layer and a lag but no target or site one of the first.  Of probes
    that read all layers each is a probe of every layer and site.  Raises InputError for a probe that the run has not,
    and where its results.csv is needed and cannot be read.
    """
    real = [column for column in probes.columns if not column.control]
    label = real[0].label if label is None else label
    like = [c for c in real if c.label == label and target in (None, c.target)]
    some = like[0].lag if like and lag is None else lag or 0
    _check_read(probes, layer=layer, site=site)
    first = next((each.layer for each in probes.reads if site in (None, each.point)), None) if layer is None else layer
    found = probes.place(first, some, label, target or _having(like, some), site=site)
    if layer is not None and lag is not None:
        return found
    asked = {"site": site, "layer": layer, "lag": lag, "label": label, "target": target}
    given = {name: value for name, value in asked.items() if value is not None}
    if _reads_all(probes):
        given = {name: value for name, value in given.items() if name not in ("layer", "site")}
    rows = [row for row in _rows_of(folder, probes) if given.items() <= row.items()]
    if not rows:
        raise InputError(
            f"results.csv in {folder} without the probes of {given}", "one that the run wrote", "give --layer and --lag"
        )
    best = probe_of_verdict(rows)
    return probes.place(best["layer"], best["lag"], best["label"], best["target"], site=best["site"])


def choose_all(
    probes: P,
    *,
    layer: int | None = None,
    lag: int | None = None,
    label: str | None = None,
    target: str | None = None,
    site: str | None = None,
) -> P:
    """All probes that have what is given and are no controls.  Raises InputError where there are none."""
    asked: dict[str, Any] = {"lag": lag, "label": label, "target": target}
    given = {name: value for name, value in asked.items() if value is not None}
    columns = [k for k, c in enumerate(probes.columns) if not c.control and given.items() <= c._asdict().items()]
    layers = [i for i, each in enumerate(probes.reads) if layer in (None, each.layer) and site in (None, each.point)]
    if not (columns and layers):
        asked |= {"layer": layer, "site": site}
        held = [str(column) for column in probes.columns if not column.control]
        more = f" and {len(held) - 8:,} more" if len(held) > 8 else ""
        wanted = " ".join(f"{name} {value}" for name, value in asked.items() if value is not None)
        raise InputError(
            f"{wanted}, which no probe has",
            f"layers {' '.join(map(_layer_name, probes.reads))} and columns of {', '.join(held[:8])}{more}",
            "choose others with --layer, --lag, --label and --target",
        )
    return narrow(probes, layers, columns)


def _layer_name(site: Site) -> str:
    """A layer by its number, and another site by its name."""
    return str(site.layer) if site.point == RESID_POST else site.name


def narrow(probes: P, layers: Sequence[int], columns: Sequence[int]) -> P:
    """The probes at these places l and k alone."""
    joined, own = _reads_all(probes), [probes.columns[k] for k in columns]
    layers = [0] if joined else layers
    reads = probes.reads if joined else [probes.reads[i] for i in layers]
    tensors = {name: tensor[layers][:, columns] for name, tensor in probes.tensors().items()}
    chosen = type(probes).from_tensors(reads, own, tensors, solver=probes.solver, kind=probes.kind)
    assert probes.threshold is not None
    chosen.threshold, chosen.about = probes.threshold[layers][:, columns], probes.about
    return chosen


def _reads_all(probes: Probes) -> bool:
    """Whether one probe reads all layers."""
    return probes.sites != probes.reads


def _check_read(probes: Probes, *, layer: int | None, site: str | None) -> None:
    """Raises InputError for a layer, or a point of it, that probes of all layers do not read."""
    held: dict[str, tuple[Any, list[Any]]] = {
        "layer": (layer, probes.layers),
        "site": (site, [each.point for each in probes.reads]),
    }
    for name, (value, read) in held.items():
        if _reads_all(probes) and value not in (None, *read):
            known = " ".join(map(str, dict.fromkeys(read)))
            raise InputError(f"{name} {value}", f"one of {known}, as in the run", f"choose another {name}")


class OneRow(NamedTuple):
    """One probe among those of the same layer, label and target, one for each lag."""

    probes: Probes
    place: tuple[int, int]  # of the one


def row_of(probes: Probes, place: tuple[int, int]) -> OneRow:
    """The probes that are shown where the one at `place` is: no others need to be computed."""
    i, k = place
    own = probes.columns[k]
    row = [j for j, column in enumerate(probes.columns) if column._replace(lag=own.lag) == own]
    return OneRow(narrow(probes, [i], row), (0, row.index(k)))


def _having(columns: list[Column], lag: int) -> str | None:
    """The first target that has a column of this lag."""
    return next((column.target for column in columns if column.lag == lag), None)


def _rows_of(folder: Path, probes: Probes) -> list[Row]:
    """The rows of results.csv of probes of this solver, as far as the choice needs them."""
    fix = "give --layer, --lag, --label and --target"
    numbers_of = ("auroc", "over_linear_low_corrected", *LOW_ENDS)
    names = ("solver", "kind", *PLACE, "control", *numbers_of)
    rows = []
    for line in read_csv(folder / "results.csv", names, fix):
        if line["control"] or (line["solver"], line["kind"]) != (probes.solver, probes.kind):
            continue
        try:
            numbers = {name: int(line[name]) if line[name] else None for name in ("layer", "lag")}
            scores = {name: float(line[name] or "nan") for name in numbers_of}
        except ValueError as error:
            raise InputError(f"results.csv in {folder} ({error})", "one that a run wrote", fix) from error
        texts = {name: line[name] for name in ("label", "target", "site")}
        rows.append({**texts, "kind": probes.kind, "control": "", **numbers, **scores})
    return rows
