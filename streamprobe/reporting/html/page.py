"""report.html: one page that holds all it shows and asks the network for nothing.  Text from the data is escaped."""

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from streamprobe.controls.table import CONTROLS
from streamprobe.evaluation.rows import Row
from streamprobe.probes.kinds import about as about_kind
from streamprobe.reporting.grids import (
    Family,
    Grid,
    beyond_linear,
    gained,
    grids,
    known,
    lines_of,
    other_kinds,
    rows_of,
    title,
)
from streamprobe.reporting.html import one_probe
from streamprobe.reporting.html.charts import lag_curves, lift_curve, metric_map
from streamprobe.reporting.html.document import document, own_file
from streamprobe.reporting.html.tables import CATEGORIES, KINDS, PROBES, SORTS, TEXTS, best_in_categories, draw_table
from streamprobe.reporting.identity import identity_of
from streamprobe.reporting.read_back import FinishedRun

NUMBERS = (
    "All numbers are of held-out test chains; intervals are 95% over resampled chains. Lag k: the activation at token "
    "t predicts the label at token t + k, so a positive lag looks ahead. Lift: AUROC over the best single control; "
    "it is no foresight yet, since a layer may know what several controls know."
)
GAINS = (
    "Gain: what a layer adds to the control joint+chain, which knows text, position, sections so far and, by design, "
    "the rate of the whole chain: bits a token, shown in thousandths (mbit), AUROC, and AUROC among tokens of the same "
    "chain. Cells with a line around them are certain: there foresight may be claimed, since the gain in bits and the "
    "gain within chains are above 0, with low ends that are corrected for all probes looked at."
)
OF_TEXTS = (
    "A text's score is the mean, the maximum or the last of the probabilities at its tokens; intervals are over "
    "resampled texts. TPR at 1% FPR: the share of positive texts above a threshold that at most 1% of the others reach."
)
OF_CATEGORIES = "Of each category and lag the layer that is the best on all test chains."
GAIN_MAPS = {
    "gain_bits": "Gain in thousandths of a bit a token",
    "gain_within": "Gain in AUROC within chains",
    "gain": "Gain in AUROC",
}
OF_LINEAR = "Charts, maps, the one probe and the chains are of linear probes; the other kinds stand in the tables."
KINDS_NOTE = (
    "Of each lag the best one that is certainly above the linear probe of the same layer: the low end of the "
    "difference of AUROC is above .0005, corrected for all kinds, layers and lags looked at. All are in the "
    "table of all probes."
)
FILES_NOTE = "They lie beside this page, in the folder of the run."


def render(found: FinishedRun, links: Mapping[str, str]) -> str:
    """The page of a run; `links` are the files of its folder, and what is in them."""
    families = grids(found.rows)
    any_gain = bool(known(found.rows, "gain_bits"))
    parts = {  # id: heading and content, in the order of the page
        f"family{i}": (title(family), _family(family, grid)) for i, (family, grid) in enumerate(families.items())
    }
    kinds = other_kinds(found.rows)
    tables = {"kinds": ("Kinds of probes", _kinds(kinds))} if kinds else {}
    tables["all"] = ("All probes and controls", f"<p class=note>{SORTS}</p>{draw_table(PROBES, found.rows)}")
    if found.categories:
        rows = best_in_categories(found.rows, found.categories)
        tables["categories"] = (
            "Categories",
            f"<p class=note>{OF_CATEGORIES} {SORTS}</p>{draw_table(CATEGORIES, rows)}",
        )
    if found.texts:
        tables["texts"] = ("Whole texts", f"<p class=note>{OF_TEXTS} {SORTS}</p>{draw_table(TEXTS, found.texts)}")
    tables |= {"run": ("The run", _run(found.run)), "files": ("Files", _files(links))}
    named = {**parts, "probe": ("One probe", ""), "read": ("Held-out chains", ""), **tables}
    anchors = "".join(f"<a href='#{name}'>{escape(heading)}</a>" for name, (heading, _) in named.items())
    body = [
        identity_list(identity_of(found.run)),
        *(f"<p class=verdict>{escape(sentence)}</p>" for sentence in found.run["verdicts"]),
        f"<p class=note>{NUMBERS}</p>",
        f"<p class=note>{GAINS}</p>" if any_gain else "",
        f"<p class=note>{OF_LINEAR}</p>" if kinds else "",
        f"<nav>{anchors}</nav>",
        *_sections(parts),
        one_probe.section(found),
        *_sections(tables),
    ]
    script = own_file("page.js") + own_file("tables.js")
    return document(found.name, body, style=own_file("page.css"), script=script, held=one_probe.held(found))


def _kinds(families: Mapping[Family, Sequence[Row]]) -> str:
    """Of each lag the best kind of probe, where one is certainly above linear ones, and what is not."""
    names = list(dict.fromkeys(row["kind"] for rows in families.values() for row in rows))
    items = "".join(f"<li>{escape(name)}: {escape(about_kind(name))}</li>" for name in names)
    meant = f"<details><summary>What the kinds are</summary><ul>{items}</ul></details>"
    best = [row for rows in families.values() for row in beyond_linear(rows)]
    if not best:
        none = f"None of {', '.join(names)} is certainly above linear probes at any lag."
        return f"<p class=note>{escape(none)}</p>{meant}"
    return f"<p class=note>{escape(KINDS_NOTE)} {SORTS}</p>{draw_table(KINDS, best)}{meant}"


def _sections(parts: Mapping[str, tuple[str, str]]) -> list[str]:
    return [f"<h2 id={name}>{escape(heading)}</h2>{content}" for name, (heading, content) in parts.items()]


def identity_list(identity: Mapping[str, str]) -> str:
    """What a run is of, a line for each fact."""
    lines = [f"<div><dt>{name}</dt><dd>{escape(value)}</dd></div>" for name, value in identity.items()]
    return "\n".join(["<dl class=identity>", *lines, "</dl>"])


def drawing(svg: str, about: str, kind: str = "curves") -> str:
    """A chart of curves, or a `map`, which scrolls sideways where the screen is narrow."""
    return f'<div class="wide {kind}" tabindex=0 role=group aria-label="{escape(about)}">{svg}</div>'


def _family(family: Family, grid: Grid) -> str:
    """Curves and heat maps of one solver, label and target."""
    layers, controls = lines_of(grid)
    gains = gained(layers)
    about = f"AUROC by lag, {title(family)}"
    circle = " Circled: certain." * bool(gains)
    elements = [
        drawing(lag_curves(grid), about),
        "<p class=note>Blue: the best layer of each lag with its interval. Grey: every layer. Dashed: controls."
        f"{circle}</p>",
        _maps(grid, {metric: heading for metric, heading in GAIN_MAPS.items() if known(rows_of(gains), metric)}),
        _maps(grid, {"auroc": "AUROC"}),
        _controls(controls),
    ]
    if known(rows_of(layers), "lift"):
        lift = _maps(grid, {"lift": "Lift over the best single control"})
        curve = drawing(lift_curve(grid), f"lift by lag, {title(family)}")
        elements.append(f"<details><summary>Lift</summary>{curve}{lift}</details>" if gains else lift)
    base = [row["base_rate"] for row in known(rows_of(layers), "base_rate")]
    rates = f" (base rate {min(base):.3f} to {max(base):.3f})" if base else ""
    precision = drawing(metric_map(grid, "average_precision"), "average precision by layer and lag", "map")
    elements.append(f"<details><summary>Average precision{rates}</summary>{precision}</details>")
    return "".join(elements)


def _maps(grid: Grid, metrics: Mapping[str, str]) -> str:
    """The heat map of each metric below its heading, beside each other where there is room."""
    drawn = [
        f"<div><h3>{heading}</h3>{drawing(metric_map(grid, metric), f'{heading} by layer and lag', 'map')}</div>"
        for metric, heading in metrics.items()
    ]
    return f"<div class=maps>{''.join(drawn)}</div>" if drawn else ""


def _controls(controls: Grid) -> str:
    """What each of these controls is given."""
    if not controls:
        return ""
    said = {
        name: CONTROLS[name].about + " (shown: the highest layer)" * bool(CONTROLS[name].relabel) for name in controls
    }
    items = "".join(f"<li>{escape(name)}: {escape(about)}</li>" for name, about in said.items())
    return f"<details><summary>What the controls are given</summary><ul>{items}</ul></details>"


def _run(run: Mapping[str, Any]) -> str:
    """What the run cost, was given and read."""
    config = "\n".join(f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in run["config"].items())
    rest = {
        n: v for n, v in run.items() if n not in ("config", "verdicts", "preflight", "counts", "versions", "splits")
    }
    facts = "\n".join(f"{name}: {value}" for name, value in (rest | run["versions"]).items())
    return (
        f"<details open><summary>Data</summary><pre>{escape(run['preflight'])}</pre></details>"
        f"<details><summary>Config</summary><pre>{escape(config)}</pre></details>"
        f"<details><summary>Cost and versions</summary><pre>{escape(facts)}</pre></details>"
    )


def _files(links: Mapping[str, str]) -> str:
    """A link to each file."""
    items = "".join(f"<li><a href='{name}'>{name}</a>: {escape(about)}</li>" for name, about in links.items())
    return f"<p class=note>{FILES_NOTE}</p><ul>{items}</ul>"
