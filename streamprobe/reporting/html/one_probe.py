"""The part of report.html that one chosen probe fills: calibration, precision-recall, confusion, and chains to read.

Here are the places, and the numbers of every probe; page.js fills the places with those of the probe that is chosen.
"""

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from streamprobe.evaluation.rows import Row, reads
from streamprobe.probes.sites import LINEAR
from streamprobe.reporting.curves import COUNTS
from streamprobe.reporting.grids import furthest_certain, other_kinds, title
from streamprobe.reporting.read_back import FinishedRun
from streamprobe.reporting.transcripts import PLACE

KINDS = {
    "hit": ("Best hits", "sections, or their beginnings, with the highest mean probability"),
    "miss": ("Worst misses", "those whose highest probability is the lowest"),
    "false alarm": ("Worst false alarms", "tokens with the highest probability that are not what was asked for"),
}
LEFT, RIGHT, TOP, BOTTOM = 46, 306, 12, 216  # of a plot in its drawing; page.js reads them off the frame
CELLS = {"positive": ("tp", "fn"), "negative": ("fp", "tn")}  # of the table of right and wrong: said yes, said no
Key = tuple[Any, ...]


def held(found: FinishedRun) -> dict[str, Any]:
    """What page.js reads: the transcripts, the probe that is shown first, and the numbers of each of their probes."""
    curves, bins = _curves(found.curves), _bins(found.bins)
    first = _first(found)
    chosen = {name: first[name] for name in PLACE} if first else found.transcripts["reference"]
    places = [tuple(probe[name] for name in PLACE) for probe in found.transcripts["probes"]]
    numbers = [{**curves.get(each, {}), **bins.get(each, {})} for each in places]
    return {**found.transcripts, "chosen": chosen, "numbers": numbers}


def _first(found: FinishedRun) -> Row | None:
    """The linear probe that is shown first, if the foresight of any may be claimed: what is held is of linear ones."""
    return furthest_certain(row for row in found.rows if row["kind"] == LINEAR)


def _why_first(found: FinishedRun) -> str:
    """How that one is called."""
    first = _first(found)
    if first is None:
        return "the probe that picked the chains below"
    of_verdict = first == furthest_certain(found.rows)
    return "the probe of the verdict" if of_verdict else "the linear probe that certainly foresees furthest"


def _curves(curves: Sequence[Mapping[str, Any]]) -> dict[Key, dict[str, Any]]:
    """Of each probe its curve and its counts."""
    return {
        tuple(each[name] for name in PLACE): {
            "recall": [float(value) for value in each["recall"]],
            "precision": [float(value) for value in each["precision"]],
            "counts": None if each["tp"] is None else [int(each[name]) for name in COUNTS],
        }
        for each in curves
    }


def _bins(rows: Sequence[Row]) -> dict[Key, dict[str, Any]]:
    """Of each probe the mean probability and the share of positives of each bin that has tokens."""
    found: dict[Key, dict[str, Any]] = {}
    for row in rows:
        if not (math.isnan(row["mean_probability"]) or math.isnan(row["share_positive"])):
            own = found.setdefault(tuple(row[name] for name in PLACE), {"said": [], "share": []})
            own["said"].append(row["mean_probability"])
            own["share"].append(row["share_positive"])
    return found


def section(found: FinishedRun) -> str:
    """The whole part: the chooser sticks above what it chooses, and no further."""
    return f"<section class=one>{_numbers(found)}{_chains(found.transcripts)}</section>"


def _numbers(found: FinishedRun) -> str:
    """The chooser, and the places of the numbers of its probe."""
    other = "any other linear one" if other_kinds(found.rows) else "any other"
    places = []
    if found.bins:
        places.append(_plot("calibration", "Calibration", "mean probability", "share of positives"))
    if found.curves:
        places.append(_plot("recall", "Precision and recall", "recall", "precision"))
        places.append(_confusion())
    return (
        f"<h2 id=probe>One probe</h2><p class=note>At first {_why_first(found)}; {other} can be chosen.</p>"
        "<noscript><p class=note>What is below is filled by the page's own script, which is turned off.</p></noscript>"
        f"<fieldset id=chooser></fieldset><p class=note id=named></p><div class=plots>{''.join(places)}</div>"
    )


def _plot(name: str, heading: str, x: str, y: str) -> str:
    """The frame of a plot: its curve, the line that it is compared with, and three ticks an axis."""
    middle, across = (TOP + BOTTOM) // 2, (LEFT + RIGHT) // 2
    ticks = "".join(
        f"<text class=x x={at} y={BOTTOM + 14} text-anchor=middle></text>" for at in (LEFT, across, RIGHT)
    ) + "".join(f"<text class=y x={LEFT - 5} y={at + 4} text-anchor=end></text>" for at in (BOTTOM, middle, TOP))
    return (
        f"<figure class=plot><figcaption>{heading}</figcaption>"
        f'<svg id={name} viewBox="0 0 320 250" role=img aria-label="{heading} of the chosen probe">'
        f"<rect class=frame x={LEFT} y={TOP} width={RIGHT - LEFT} height={BOTTOM - TOP} />{ticks}"
        f"<text x={across} y={BOTTOM + 30} text-anchor=middle>{x}</text>"
        f'<text transform="translate(11 {middle}) rotate(-90)" text-anchor=middle>{y}</text>'
        f'<polyline class=beside points="" /><polyline class=curve points="" /><g class=dots></g></svg>'
        f"<p class=note id={name}-said></p></figure>"
    )


def _confusion() -> str:
    """The table of right and wrong at the threshold."""
    rows = []
    for truth, names in CELLS.items():
        cells = "".join(f"<td><b id={name}></b><br><span id={name}-rate></span></td>" for name in names)
        rows.append(f"<tr><th scope=row>{truth}</th>{cells}</tr>")
    return (
        "<figure class=plot><figcaption>Right and wrong at the threshold</figcaption><table class=confusion>"
        "<thead><tr><td></td><th scope=col>said yes</th><th scope=col>said no</th></tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table><p class=note id=confusion-said></p></figure>"
    )


def _chains(transcripts: Mapping[str, Any]) -> str:
    """The places of the chains, which the script fills."""
    best = transcripts["reference"]
    if not best:
        return "<h2 id=read>Held-out chains</h2><p class=note>No probe has both classes among the test tokens.</p>"
    elements = [
        "<h2 id=read>Held-out chains</h2>",
        f"<p class=note>Picked by the probe with {escape(transcripts['picked_by'])}: {escape(reads(best))}, "
        f"lag {best['lag']:+d}, {escape(title((best['solver'], best['label'], best['target'])))}. Painted by the one "
        "that is chosen above. Click or tap a token, or go from one to the next by the arrow keys: what is said of "
        "it stands at the foot of the page, until Escape.</p>",
        "<p class='note key'><span class=in>a true section</span><span class=picked>what was picked</span></p>"
        "<p class=note id=said></p>",
    ]
    kind = None
    for number, chain in enumerate(transcripts["chains"]):
        if chain["kind"] != kind:
            kind = chain["kind"]
            heading, meaning = KINDS[kind]
            elements.append(f"<h3>{heading}</h3><p class=note>{meaning}</p>")
        last = chain["first"] + len(chain["tokens"]) - 1
        elements.append(
            f"<p class=note>{escape(str(chain['id']))}, tokens {chain['first']} to {last} of {chain['length']}</p>"
            f"<div class=text id=chain{number} tabindex=0 role=group aria-label='chain {number + 1}'></div>"
        )
    return "".join([*elements, "<aside id=token role=status aria-live=polite></aside>"])
