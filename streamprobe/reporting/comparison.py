"""Runs side by side, as text: what each is of, its best layers by lag, what is certain, its verdicts."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from streamprobe.errors import InputError
from streamprobe.evaluation.rows import Row, reads, site_cell
from streamprobe.reporting.grids import (
    Family,
    Grid,
    best_of,
    furthest_certain,
    gained,
    grids,
    lags_of,
    lines_of,
    number,
    rows_of,
    title,
)
from streamprobe.reporting.identity import identity_of
from streamprobe.reporting.read_back import broken, name_of, read_results
from streamprobe.reporting.terminal import WIDE, evenly
from streamprobe.system.wrapping import wrapped

LONGEST = 28  # letters of a run's name in a table
CELL = 7  # columns of a number
IDENTITY = ("model", "data", "chains", "date")  # what is printed of it; the page shows it all


class ComparedRun(NamedTuple):
    """One of the runs: its name among the others, what it is of, and what it found."""

    name: str
    identity: dict[str, str]
    grids: dict[Family, Grid]
    verdicts: dict[Family, str]


def read_runs(folders: Sequence[Path]) -> list[ComparedRun]:
    """The runs in these folders.  Raises InputError for a folder that is none, and where one is given twice."""
    there = [folder.resolve() for folder in folders]
    twice = next((folder for n, folder in enumerate(folders) if there[n] in there[:n]), None)
    if twice is not None:
        raise InputError(f"{twice}, given twice", "different runs", "give each once")
    names = [folder.resolve().name for folder in folders]
    found = []
    for folder, name in zip(folders, names, strict=True):
        rows, run = read_results(folder)
        try:
            shown = name_of(folder, run) if names.count(name) == 1 else str(folder)
            found.append(_run(shown, rows, run))
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise broken(folder / "summary.json", f"{type(error).__name__}: {error}") from error
    return found


def _run(name: str, rows: Sequence[Row], run: Mapping[str, Any]) -> ComparedRun:
    own = grids(rows)
    said = zip(own, run["verdicts"], strict=True)
    verdicts = {family: str(sentence).removeprefix(f"{title(family)}: ") for family, sentence in said}
    return ComparedRun(name, identity_of(run), own, verdicts)


def families_of(runs: Sequence[ComparedRun]) -> list[Family]:
    """Every solver, label and target that one of the runs has."""
    return list(dict.fromkeys(family for run in runs for family in run.grids))


def having(runs: Sequence[ComparedRun], family: Family) -> list[ComparedRun]:
    """The runs that have a family."""
    return [run for run in runs if family in run.grids]


def certain_up_to(grid: Grid) -> str:
    """The largest lag that is certain, and its layer, in words."""
    row = furthest_certain(rows_of(grid))
    if row:
        return f"up to lag {row['lag']:+d} ({reads(row)}, {number(row, 'gain_bits', '+')} mbit a token)"
    return "at no lag" if gained(lines_of(grid)[0]) else "unknown, without a joint control"


class Lines(NamedTuple):
    """Numbers of every run by lag, below a heading."""

    heading: str
    cell: Callable[[Row], str]
    best: Callable[[Grid], Mapping[int, Row]]  # of each lag the row of the layer that is shown


def best_by_auroc(grid: Grid) -> Mapping[int, Row]:
    """The layer of the highest AUROC at each lag."""
    return best_of(lines_of(grid)[0].values())


def best_by_gain(grid: Grid) -> Mapping[int, Row]:
    """The layer that adds most bits to the joint control at each lag; of no lag where there is none."""
    return best_of(gained(lines_of(grid)[0]).values(), "gain_bits")


SHOWN = [
    Lines("AUROC", lambda row: number(row, "auroc"), best_by_auroc),
    Lines("layer", site_cell, best_by_auroc),
    Lines("gain mbit", lambda row: number(row, "gain_bits", "+"), best_by_gain),
    Lines("at least", lambda row: number(row, "gain_bits_low_corrected", "+"), best_by_gain),
    Lines("layer", site_cell, best_by_gain),
]


def describe(runs: Sequence[ComparedRun], width: int | None = None) -> str:
    """What `streamprobe compare` prints: the runs, and for each solver, label and target those that have it."""
    lines = []
    for run in runs:
        said = "; ".join(f"{name} {run.identity[name]}" for name in IDENTITY if name in run.identity)
        lines.append(wrapped(f"run       {run.name}: {said}", width))
    for family in families_of(runs):
        own = having(runs, family)
        lines += ["", "", wrapped(f"{title(family)}   (the best layer of each lag)", width), ""]
        lines += _by_lag([(run.name, run.grids[family]) for run in own], width or WIDE)
        lines += [wrapped(f"certain   {run.name}: {certain_up_to(run.grids[family])}", width) for run in own]
        lines += [wrapped(f"verdict   {run.name}: {run.verdicts[family]}", width) for run in own]
    return "\n".join(lines)


def _by_lag(named: Sequence[tuple[str, Grid]], width: int) -> list[str]:
    """The lines of SHOWN for each run, with as many lags side by side as there is room for."""
    wide = min(LONGEST, max(len("gain bits"), *(len(name) for name, _ in named))) + 2
    lags = sorted({lag for _, grid in named for lag in lags_of(grid)})
    at_once = evenly(len(lags), max(1, (width - wide) // CELL))
    lines = []
    for start in range(0, len(lags), at_once):
        some = lags[start : start + at_once]
        lines.append(f"{'lag':<{wide}}" + "".join(f"{lag:>+{CELL}d}" for lag in some))
        for shown in SHOWN:
            best = {name: shown.best(grid) for name, grid in named}
            if any(lag in own for own in best.values() for lag in some):
                lines.append(shown.heading)
                lines += [_line(name, [own.get(lag) for lag in some], shown.cell, wide) for name, own in best.items()]
        lines.append("")
    return lines


def _line(name: str, rows: Sequence[Row | None], cell: Callable[[Row], str], wide: int) -> str:
    """The numbers of one run; of a name that is too long the end is shown."""
    cut = name if len(name) <= wide - 4 else f"...{name[7 - wide :]}"
    return (f"  {cut:<{wide - 2}}" + "".join(f"{cell(row) if row else '':>{CELL}}" for row in rows)).rstrip()
