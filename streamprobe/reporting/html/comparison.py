"""The page of `streamprobe compare`: runs side by side, in one file that asks the network for nothing."""

from collections.abc import Sequence
from html import escape

from streamprobe.reporting.comparison import ComparedRun, certain_up_to, families_of, having
from streamprobe.reporting.grids import Family, gained, known, lines_of, rows_of, title
from streamprobe.reporting.html.charts import NamedGrid, metric_map, runs_curves
from streamprobe.reporting.html.document import document, own_file
from streamprobe.reporting.html.page import GAINS, NUMBERS, drawing, identity_list

CURVES = (
    "A curve for each run: its best layer of each lag, with a 95% interval over resampled test chains. Runs on "
    "different data are judged by different chains, so that their intervals say nothing of the difference."
)
MAPS = {"gain_bits": "Gain in thousandths of a bit a token", "auroc": "AUROC"}


def render(runs: Sequence[ComparedRun]) -> str:
    """The page of these runs, two or more."""
    families = families_of(runs)
    links = "".join(f"<a href='#family{i}'>{escape(title(family))}</a>" for i, family in enumerate(families))
    any_gain = any(gained(lines_of(grid)[0]) for run in runs for grid in run.grids.values())
    body = [
        _identities(runs),
        f"<p class=note>{NUMBERS}</p>",
        f"<p class=note>{GAINS}</p>" if any_gain else "",
        f"<nav>{links}</nav>",
        *(_family(i, family, having(runs, family)) for i, family in enumerate(families)),
    ]
    heading = f"Comparison of {', '.join(run.name for run in runs)}"
    return document(heading, body, style=own_file("page.css"), script=own_file("tables.js"), held={})


def _identities(runs: Sequence[ComparedRun]) -> str:
    """What each run is of, beside each other where there is room."""
    cards = [f"<div><h3>{escape(run.name)}</h3>{identity_list(run.identity)}</div>" for run in runs]
    return f"<div class=runs>{''.join(cards)}</div>"


def _family(number: int, family: Family, runs: Sequence[ComparedRun]) -> str:
    """What the runs found of one solver, label and target."""
    named = [NamedGrid(run.name, run.grids[family]) for run in runs]
    found = [
        f"<p class=verdict><b>{escape(run.name)}</b>. Certain: {escape(certain_up_to(run.grids[family]))}. "
        f"Verdict: {escape(run.verdicts[family])}</p>"
        for run in runs
    ]
    return "".join(
        [
            f"<h2 id=family{number}>{escape(title(family))}</h2>",
            *found,
            drawing(runs_curves(named), f"the runs by lag, {title(family)}"),
            f"<p class=note>{CURVES}</p>",
            *(_maps(named, metric, heading) for metric, heading in MAPS.items()),
        ]
    )


def _maps(named: Sequence[NamedGrid], metric: str, heading: str) -> str:
    """The heat map of each run that has the metric, all with the same colours."""
    rows = {each.name: known(rows_of(lines_of(each.grid)[0]), metric) for each in named}
    most = max((abs(row[metric]) for own in rows.values() for row in own), default=0.0)
    drawn = [
        f"<div><h3>{escape(heading)}: {escape(each.name)}</h3>"
        f"{drawing(metric_map(each.grid, metric, most), f'{heading} by layer and lag, {each.name}', 'map')}</div>"
        for each in named
        if rows[each.name]
    ]
    return f"<div class='maps beside'>{''.join(drawn)}</div>" if drawn else ""
