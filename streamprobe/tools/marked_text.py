"""How text that a probe has marked looks: at a terminal, on a page, and as JSON for another program.

The colour of a token says how its odds compare with those at which its probe raises the alarm, so that an alarm looks
the same whether it is raised at .06 or at .6.  Text far below the alarm keeps the colours that it has.
"""

import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

from streamprobe.probes.base import Probes
from streamprobe.probes.linear import LINEAR
from streamprobe.system.console import printable
from streamprobe.tools.watch import Mark, Step, alarm_threshold

RGB = tuple[int, int, int]
COLOURED_FROM = 0.25  # of `level_of`: a third of the odds of the alarm, which is at 0.5
SHADES: tuple[tuple[float, RGB], ...] = ((COLOURED_FROM, (255, 240, 190)), (0.5, (255, 184, 96)), (1, (242, 88, 66)))
LETTERS: RGB = (20, 20, 20)  # on each of these, whatever colours the terminal or the page has
SHOWN = (COLOURED_FROM, 0.5, 0.75, 10 / 11)  # the levels in the legend, whose odds are
SCALE = ("colours at 1/3, 1, 3 and 10 times the odds of the alarm:", "none below the first")


def shade(level: float) -> RGB | None:
    """The background of a token at this level: pale, orange at the alarm, red at 1; none far below the alarm."""
    if not COLOURED_FROM <= level <= 1:  # nan neither
        return None
    (low, pale), (high, strong) = next(
        pair for pair in zip(SHADES, SHADES[1:], strict=False) if pair[0][0] <= level <= pair[1][0]
    )
    along = (level - low) / (high - low)
    red, green, blue = (round(a + along * (b - a)) for a, b in zip(pale, strong, strict=True))
    return red, green, blue


class Legend(NamedTuple):
    """Which probe is watched, and what the marks mean."""

    probe: str
    threshold: float  # the probability of the alarm

    def __str__(self) -> str:
        if math.isnan(self.threshold):
            return f"{self.probe}; no alarm: its validation chose no threshold"
        return f"{self.probe}; alarm (▲) from a probability of {self.threshold:.3g} on"

    @property
    def samples(self) -> list[tuple[float, str]]:
        """The levels whose colours are shown, each with the probability that has it."""
        if math.isnan(self.threshold):
            return []
        t = self.threshold
        found = [(level, t * level / (t * level + (1 - t) * (1 - level))) for level in SHOWN]
        return [(level, f" {p:.3g}{' ▲' * (level == 0.5)} ") for level, p in found]


def legend_of(bank: Probes, place: tuple[int, int]) -> Legend:
    """What is said above the text that the probe at `place` marks."""
    i, k = place
    kind = "" if bank.kind == LINEAR else f", {bank.kind}"
    return Legend(f"{bank.sites[i].title}, {bank.columns[k]}, {bank.solver}{kind}", alarm_threshold(bank, place))


def _paint(text: str, background: RGB, alarm: bool) -> str:
    """Text in the escapes of a terminal, line by line."""
    colours = ";".join(map(str, (38, 2, *LETTERS, 48, 2, *background)))
    style = f"\x1b[{'1;4;' if alarm else ''}{colours}m"
    return "\n".join(f"{style}{line}\x1b[0m" if line else "" for line in text.split("\n"))


def legend_for_terminal(legend: Legend, colour: bool) -> str:
    """The legend, with samples of the colours where there are any."""
    said = printable(str(legend))
    painted = [_paint(text, background, "▲" in text) for level, text in legend.samples if (background := shade(level))]
    return f"{said}\n{SCALE[0]} {' '.join(painted)} {SCALE[1]}" if colour and painted else said


def for_terminal(mark: Mark, before: bool, colour: bool) -> str:
    """The token with its colour, bold and underlined in an alarm; ▲ where one begins, without colour ▼ where it ends.

    `before`: whether the alarm was on at the token before.
    """
    text = printable(mark.text)
    word = text.lstrip()
    text = text[: len(text) - len(word)] + ("▲" if mark.alarm and not before else "") + word
    if not colour:
        return ("▼" if before and not mark.alarm else "") + text
    background = shade(mark.level)
    return text if background is None else _paint(text, background, mark.alarm)


def as_json(step: Step, asked: Mapping[str, object], position: int) -> str:
    """A line of JSON for a token, in ASCII; probabilities to six digits, null where the token was never read.

    `asked` names its prompt; `position` is its place in the response, from 0.
    """

    def number(probability: float) -> float | None:
        return None if math.isnan(probability) else float(f"{probability:.6g}")

    said = {"position": position, "token": step.token, "text": step.text}
    found = {"probability": number(step.probability), "alarm": step.alarm}
    lags = {str(lag): number(probability) for lag, probability in step.lags.items()}
    return json.dumps({**asked, **said, **found, "lags": lags}) + "\n"


class Passage(NamedTuple):
    """A prompt and its marked answer."""

    name: str  # such as `row 3`; may be empty
    prompt: str
    marks: Sequence[Mark]


PAGE = """<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>
<meta http-equiv=Content-Security-Policy
content="default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'">
<title>{title}</title><style>
:root {{ color-scheme: light dark; }}
body {{ font: 16px/1.8 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }}
h2 {{ font-size: 1rem; margin: 2rem 0 0; }}
pre {{ font: inherit; white-space: pre-wrap; overflow-wrap: anywhere; padding-top: .5rem; border-top: 1px solid #888; }}
span[style] {{ color: rgb{letters}; padding: .1em 0; }} p span {{ margin: 0 .3em; }}
.alarm {{ font-weight: 700; border-bottom: 3px solid #b00; }} .prompt {{ opacity: .75; }}
</style><h1>{title}</h1><p>{legend}{scale}</p>
{body}</html>
"""


def page(title: str, legend: Legend, passages: Sequence[Passage]) -> str:
    """A self-contained page of marked texts; a token's probabilities at every lag show when it is pointed at."""
    samples = "".join(_span(text, level, alarm="▲" in text, title="") for level, text in legend.samples)
    return PAGE.format(
        title=escape(printable(title)),
        legend=escape(printable(str(legend))),
        scale=f"<br>{SCALE[0]} {samples} {SCALE[1]}" if samples else "",
        letters=LETTERS,
        body="\n".join(_passage(passage) for passage in passages),
    )


def _passage(passage: Passage) -> str:
    heading = f"<h2>{escape(printable(passage.name))}</h2>" if passage.name else ""
    return (
        f"{heading}<pre><i class=prompt>{escape(printable(passage.prompt))}</i>\n\n"
        + "".join(_span(m.text, m.level, alarm=m.alarm, title=_all_lags(m)) for m in passage.marks)
        + "</pre>"
    )


def _all_lags(mark: Mark) -> str:
    """A mark's own probability, and that at every lag."""
    lags = "  ".join(f"{lag:+d}: {probability:.2f}" for lag, probability in mark.lags.items())
    return f"{mark.probability:.3f}   {lags}"


def _span(text: str, level: float, *, alarm: bool, title: str) -> str:
    background = shade(level)
    attributes = " class=alarm" * alarm + (f" style='background:rgb{background}'" if background else "")
    return f"<span{attributes} title='{escape(title)}'>{escape(printable(text))}</span>"
