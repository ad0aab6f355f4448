"""How marked text looks: no commands to a terminal, no script on a page, and colours that say where the alarm is."""

import json
import math
import re
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamprobe.tools import marked_text
from streamprobe.tools.marked_text import LETTERS, Legend, Passage, as_json, for_terminal, page, shade
from streamprobe.tools.watch import Mark, Step, level_of

LEGEND = Legend("layer 1, backtracking/onset/lag+04, newton", 0.06)


def mark(text, probability, threshold=0.5, lags=None):
    return Mark(text, probability, probability >= threshold, level_of(probability, threshold), lags or {})


class Text(HTMLParser):
    """The text of a page and its elements."""

    def __init__(self, page):
        super().__init__()
        self.text, self.tags = "", []
        self.feed(page)

    def handle_data(self, data):
        self.text += data

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    @property
    def spans(self):
        """The attributes of the marked pieces; before them come the samples of the legend."""
        return [attributes for tag, attributes in self.tags if tag == "span"]


def luminance(colour):
    parts = [c / 255 for c in colour]
    red, green, blue = (c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(first, second):
    """That of WCAG 2.1, from 1 to 21."""
    low, high = sorted(luminance(colour) for colour in (first, second))
    return (high + 0.05) / (low + 0.05)


@given(st.floats(0.25, 1))
def test_letters_can_be_read_on_every_colour(level):
    background = shade(level)
    assert background and contrast(background, LETTERS) > 4.5
    assert contrast((230, 230, 230), background) < 4.5  # negative control: the letters of a dark terminal could not


def test_what_is_far_below_the_alarm_keeps_the_terminals_own_colours():
    for threshold in (0.06, 0.5, 0.9):
        odds = threshold / (1 - threshold) / 3.1
        quiet, near = mark("a", odds / (1 + odds), threshold), mark("a", threshold * 0.99, threshold)
        assert (
            for_terminal(quiet, False, True) == "a"
            and "style" not in Text(page("t", LEGEND, [Passage("", "p", [quiet])])).spans[-1]
        )
        assert "\x1b[38;2;20;20;20;48;2;" in for_terminal(near, False, True)  # negative control
    assert shade(math.nan) is None


def test_an_alarm_has_the_same_colour_at_any_threshold():
    shown = {for_terminal(mark("a", threshold, threshold), True, True) for threshold in (0.001, 0.06, 0.5, 0.99)}
    assert shown == {"\x1b[1;4;38;2;20;20;20;48;2;255;184;96ma\x1b[0m"}
    red, green, blue = zip(*(shade(level / 100) for level in range(25, 101)), strict=True)
    for channel in (red, green, blue):
        assert list(channel) == sorted(channel, reverse=True)
    assert len({(r, g, b) for r, g, b in zip(red, green, blue, strict=True)}) > 70


def test_the_legend_shows_colours_with_their_probabilities(monkeypatch):
    plain, coloured = (marked_text.legend_for_terminal(LEGEND, colour) for colour in (False, True))
    assert plain == str(LEGEND) and "from a probability of 0.06 on" in plain
    painted = re.findall(r"48;2;(\d+);(\d+);(\d+)m ([^ ]+)( \u25b2)? \x1b\[0m", coloured)
    assert len(painted) == 4 and [bool(alarm) for *_, alarm in painted] == [False, True, False, False]
    for red, green, blue, probability, _ in painted:
        level = level_of(float(probability), 0.06)
        expected = shade(max(level, 0.25))
        assert all(abs(int(a) - b) <= 2 for a, b in zip((red, green, blue), expected, strict=True))
    odds = [float(p) / (1 - float(p)) / (0.06 / 0.94) for *_, p, _ in painted]
    assert odds == pytest.approx([1 / 3, 1, 3, 10], rel=0.01)
    never = Legend("layer 1", math.nan)
    assert "no alarm" in str(never) and marked_text.legend_for_terminal(never, True) == str(never)


def test_the_terminal_gets_no_commands_from_the_model():
    evil = Mark(" \x1b[2Jhi\x07\u202e\n", 0.5, True, 0.5, {})
    plain, coloured = for_terminal(evil, False, False), for_terminal(evil, False, True)
    assert plain == " \u25b2\ufffd[2Jhi\ufffd\ufffd\n" and "\x1b" not in plain
    assert coloured.count("\x1b") == 2 and coloured.endswith("\x1b[0m\n") and "\x1b[1;4;38" in coloured
    assert for_terminal(mark(" a", 0.1), True, False) == "\u25bc a"
    assert for_terminal(mark(" a", 0.9), True, False) == " a"


def test_a_page_shows_text_and_runs_none():
    evil = "<script>alert('x')</script>&amp; \" ' "
    shown = [mark(evil, 0.75, 0.5, {-2: 0.5, 4: 0.25}), mark("ok", 0.0)]
    found = Text(page(evil, Legend(evil, 0.06), [Passage(evil, evil, shown)]))
    assert evil + "ok" in found.text and not [tag for tag, _ in found.tags if tag in ("script", "link", "img")]
    first, second = found.spans[-2:]
    assert first["class"] == "alarm" and first["title"] == "0.750   -2: 0.50  +4: 0.25"
    assert "class" not in second and "style" not in second
    unescaped = Text(f"<pre>{evil}</pre>")
    assert [tag for tag, _ in unescaped.tags if tag == "script"]  # negative control


def test_a_page_holds_every_passage_in_its_order_for_light_and_dark():
    content = page("t", LEGEND, [Passage(f"row {n}", f"prompt {n}", [mark(f"answer {n}", 0.9)]) for n in (1, 2, 3)])
    text = Text(content).text
    places = [text.index(f"{word} {n}") for n in (1, 2, 3) for word in ("row", "prompt", "answer")]
    assert places == sorted(places) and "0.06 \u25b2" in text
    style = re.search(r"<style>(.*?)</style>", content, re.DOTALL)[1]
    assert "color-scheme: light dark" in style and "background" not in style
    assert len(re.findall(r"span\[style\] { color: rgb\(20, 20, 20\)", style)) == 1


def test_a_line_of_json_is_ascii_and_has_no_nan():
    step = Step(7, " \u25b2\x1b", 1 / 3, False, {-2: 1e-9, 4: math.nan})
    line = as_json(step, {"prompt": 2, "id": "x"}, 5)
    assert line.endswith("}\n") and line.count("\n") == 1 and line.isascii() and "\x1b" not in line
    assert json.loads(line) == {
        **{"prompt": 2, "id": "x", "position": 5, "token": 7, "text": " \u25b2\x1b"},
        **{"probability": 0.333333, "alarm": False, "lags": {"-2": 1e-9, "4": None}},
    }
    with pytest.raises(ValueError, match="Constant"):  # negative control: NaN is no JSON
        json.loads(json.dumps(math.nan), parse_constant=lambda _: (_ for _ in ()).throw(ValueError("Constant")))
