"""The page holds the text of the data as text, and nothing in it can become code or an address."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from scored_chains import HOSTILE

from streamprobe.reporting import files
from streamprobe.reporting.html import page
from streamprobe.reporting.transcripts import LEVELS, UNASKED


class Found(HTMLParser):
    """The elements and attributes of a page, its scripts, and its text."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.scripts: list[str] = []
        self.text: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        (self.scripts if self.elements and self.elements[-1] == "script" else self.text).append(data)

    def handle_endtag(self, tag: str) -> None:
        self.elements.append(f"/{tag}")

    def faults(self) -> list[str]:
        """What no page may hold: foreign scripts, handlers, and addresses outside of the page."""
        bad = [f"{tag} element" for tag in self.elements if tag in ("img", "iframe", "link", "object", "embed", "base")]
        bad += ["a third script"] * (self.elements.count("script") > 2)
        bad += [f"{name} handler" for name, _ in self.attributes if name.startswith("on")]
        inward = ("#", "data:image/png;base64,")
        bad += [value for name, value in self.attributes if name in ("href", "src") and not value.startswith(inward)]
        return bad


def test_hostile_text_stays_text(folder: Path, transcripts: dict[str, Any]) -> None:
    files.write_report(folder)
    text = (folder / "report.html").read_text()
    found = Found(text)
    assert found.faults() == [] and found.elements.count("script") == 2
    assert sum(HOSTILE in piece for piece in found.text) >= 4, "verdict, heading, config and data"
    assert json.loads(found.scripts[0]) == transcripts and HOSTILE in transcripts["chains"][0]["id"]
    assert "http:" not in text and "https:" not in text and "url(" not in text.replace("url(#", "")


@pytest.mark.parametrize("less, greater", [("&lt;", "&gt;"), ("\\u003c", "\\u003e")])
def test_hostile_text_fails_to_stay_text_without_escaping(folder: Path, less: str, greater: str) -> None:
    files.write_report(folder)
    text = (folder / "report.html").read_text()
    assert Found(text.replace(less, "<").replace(greater, ">")).faults()


def test_only_the_pages_own_script_may_run(folder: Path) -> None:
    files.write_report(folder)
    text = (folder / "report.html").read_text()
    policy = re.search(r'Content-Security-Policy content="([^"]*)"', text)[1]
    script = re.search(r"</script><script>(.*?)</script>", text, re.S)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert "default-src 'none'" in policy and f"script-src 'sha256-{digest}'" in policy
    assert f'"{LEVELS}"' in script and f'"{UNASKED}"' in script, "which reads what `encode` wrote"


def contrast(a: str, b: str) -> float:
    """WCAG 2.1, relative luminance."""

    def luminance(colour: str) -> float:
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_text_and_lines_stand_out_in_light_and_in_dark() -> None:
    style = (Path(page.__file__).parent / "page.css").read_text()
    blocks = re.findall(r":root \{(.*?)\}", style, re.S)
    schemes = [{**dict(re.findall(r"--(\w+): (#\w{6})", block)), "block": block} for block in blocks]
    assert len(schemes) == 2
    for colours in schemes:
        for name in ("text", "quiet", "accent"):
            assert min(contrast(colours[name], colours[ground]) for ground in ("page", "panel")) >= 4.5, name
        for name in ("section", *(f"series{i}" for i in range(6))):
            assert contrast(colours[name], colours["page"]) >= 3, name
        depth = float(re.search(r"--depth: ([\d.]+)", colours["block"])[1])
        paint = re.search(r"--paint: (\d+), (\d+), (\d+)", colours["block"]).groups()
        ground = [int(colours["page"][i : i + 2], 16) for i in (1, 3, 5)]
        deepest = [round(depth * int(p) + (1 - depth) * g) for p, g in zip(paint, ground, strict=True)]
        assert contrast(colours["text"], "#" + "".join(f"{c:02x}" for c in deepest)) >= 4.5


def test_a_line_fails_to_stand_out_without_contrast() -> None:
    assert contrast("#b9b9b9", "#ffffff") < 3
