"""The page holds the text of the data as text, and nothing in it can become code or an address."""

import base64
import hashlib
import json
import re
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from scored_chains import HOSTILE

from streamprobe.evaluation.results import TestResults
from streamprobe.evaluation.rows import FIELDS, Row
from streamprobe.evaluation.verdict import is_certain
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
        beside = {"config.yaml", *files.FILES}  # in the same folder
        bad += [
            value
            for name, value in self.attributes
            if name in ("href", "src") and not value.startswith(inward) and value not in beside
        ]
        return bad


def test_hostile_text_stays_text(folder: Path, transcripts: dict[str, Any]) -> None:
    files.write_report(folder)
    text = (folder / "report.html").read_text()
    found = Found(text)
    assert found.faults() == [] and found.elements.count("script") == 2
    assert sum(HOSTILE in piece for piece in found.text) >= 4, "verdict, heading, config and data"
    held = json.loads(found.scripts[0])
    assert {name: held[name] for name in transcripts} == transcripts and HOSTILE in transcripts["chains"][0]["id"]
    assert "http:" not in text and "https:" not in text and "url(" not in text.replace("url(#", "")


def test_hostile_text_stays_text_in_every_part(full_folder: Path) -> None:
    found = Found(files.draw_report(full_folder).decode())
    assert found.faults() == [] and found.elements.count("script") == 2
    assert sum(HOSTILE in piece for piece in found.text) >= 20, "categories, texts and what the run is of, too"


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
    blocks = re.findall(r"^ *:root \{(.*?)\}", style, re.S | re.M)
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


def ids_of(page: Found) -> list[str]:
    return [value for name, value in page.attributes if name == "id"]


def broken_anchors(page: Found) -> list[str]:
    """The links into the page that lead nowhere."""
    links = [value for name, value in page.attributes if name == "href" and value.startswith("#")]
    return [link for link in links if link[1:] not in ids_of(page)]


def test_every_link_lands_and_every_id_is_there_once(full_folder: Path) -> None:
    text = files.draw_report(full_folder).decode()
    found = Found(text)
    assert broken_anchors(found) == [] and text.count("href='#") >= 8
    own = [name for name in ids_of(found) if not re.fullmatch(r"\w{11}|clip\w*|image\w+|m\w{10}", name)]
    assert sorted(own) == sorted(set(own))
    assert broken_anchors(Found(text.replace("id=categories", "id=other"))) == ["#categories"], "the check sees it"


def test_the_page_says_first_what_the_run_is_of_and_then_the_verdict(folder: Path) -> None:
    text = files.draw_report(folder).decode()
    identity = text[text.index("<dl class=identity>") : text.index("</dl>")]
    for name in ("model", "data", "date", "chains", "tokens", "streamprobe"):
        assert f"<dt>{name}</dt>" in identity
    shown = ("2026-01-02 03:04 UTC", "1,216 (1,200 train, 16 test)", "0.1.0, commit 012345678901 with changes")
    assert all(words in identity for words in shown)
    order = [
        "<h1>",
        "<dl class=identity>",
        "<p class=verdict>",
        "<nav>",
        "<h2 id=family0>",
        "<h2 id=probe>",
        "<h2 id=all>",
    ]
    assert [text.index(part) for part in order] == sorted(text.index(part) for part in order)


def test_gains_are_shown_where_they_are_known(folder: Path, full_folder: Path, results: TestResults) -> None:
    text = files.draw_report(full_folder).decode()
    for heading in ("Gain in thousandths of a bit a token", "Gain in AUROC within chains", "Gain in AUROC"):
        assert f"<h3>{heading}</h3>" in text
    assert "<summary>Lift</summary>" in text and "<td>yes</td>" in text and ">gain within<" in text
    (folder / "results.csv").write_bytes(files.FILES["results.csv"].make(results) or b"")
    without = files.draw_report(folder).decode()
    assert "Gain in" not in without and ">gain within<" not in without and "<h3>Lift over the best" in without


def test_the_probe_that_is_shown_first_is_that_of_the_verdict(folder: Path, full_folder: Path) -> None:
    held = json.loads(Found(files.draw_report(full_folder).decode()).scripts[0])
    assert (held["chosen"]["layer"], held["chosen"]["lag"]) == (12, 8)
    assert len(held["numbers"]) == len(held["probes"]) == 4
    for numbers in held["numbers"]:
        assert len(numbers["recall"]) == len(numbers["precision"]) > 20 and len(numbers["said"]) == 10
        assert len(numbers["counts"]) == 4
    text = (full_folder / "results.csv").read_text().replace(",0.012,", ",-0.012,")
    (full_folder / "results.csv").write_text(text)
    uncertain = json.loads(Found(files.draw_report(full_folder).decode()).scripts[0])
    assert uncertain["chosen"] == uncertain["reference"], "where none is certain"


def test_a_probe_of_another_kind_is_in_the_tables_and_not_chosen(full_folder: Path, gained_rows: list[Row]) -> None:
    """The numbers and the chains are those of linear probes, also where another one foresees further."""
    sure = next(row for row in gained_rows if is_certain(row))
    other = {**sure, "kind": "stack", "layer": "", "lag": 40, "over_linear_low_corrected": 0.01}
    for rows, first in (
        (gained_rows, "the probe of the verdict; any other can"),
        ([*gained_rows, other], "the linear probe that"),
    ):
        (full_folder / "results.csv").write_bytes(files.pack_rows(rows, FIELDS))
        text = files.draw_report(full_folder).decode()
        held = json.loads(Found(text).scripts[0])
        assert (held["chosen"]["kind"], held["chosen"]["layer"], held["chosen"]["lag"]) == ("linear", 12, 8)
        assert f"At first {first}" in text
        assert ("<li>stack: a weighted mean of the layers' logits</li>" in unescape(text)) == (other in rows)
    assert is_certain(other) and "any other linear one can be chosen" in text
    assert text.index("<h2 id=kinds>") < text.index("<h2 id=all>")


def test_the_script_finds_every_place_that_it_fills(full_folder: Path) -> None:
    text = files.draw_report(full_folder).decode()
    script = Found(text).scripts[1]
    named = set(re.findall(r'place\("([\w-]+)"\)', script)) | {
        "tp",
        "fp",
        "fn",
        "tn",
        "tp-rate",
        "calibration",
        "recall",
    }
    assert named >= {"named", "said", "token", "confusion-said"}
    assert named <= set(ids_of(Found(text)))


def test_the_plots_are_left_out_without_their_files(folder: Path) -> None:
    found = Found(files.draw_report(folder).decode())
    assert not {"calibration", "recall", "tp"} & set(ids_of(found))


def test_tokens_are_reached_by_keyboard_and_said_in_a_live_region(folder: Path) -> None:
    text = files.draw_report(folder).decode()
    assert "<aside id=token role=status aria-live=polite>" in text
    assert re.search(r"<div class=text id=chain0 tabindex=0 ", text)
    for word in ("ArrowLeft", "ArrowRight", "Home", "End", "Escape", '"click"'):
        assert word in text


def test_what_sticks_covers_no_heading_and_paper_cuts_nothing_off() -> None:
    style = (Path(page.__file__).parent / "page.css").read_text()
    assert "scroll-margin-top: calc(var(--chooser)" in style
    printed = style[style.index("@media print") :]
    assert "print-color-adjust: exact" in printed and re.search(
        r"\.scroll, .*overflow: visible; max-height: none", printed
    )
    assert "@media screen and (prefers-color-scheme: dark)" in style, "so that paper is light"


def test_categories_are_judged_by_the_layer_that_is_best_on_all_chains(full_folder: Path, rows: list[Row]) -> None:
    text = files.draw_report(full_folder).decode()
    table = text[text.index("<h2 id=categories>") : text.index("<h2 id=texts>")]
    assert table.count("<tr>") == 1 + 2 * 2 and "class=control" not in table, "two categories, two lags"
    for lag in (0, 8):
        best = max((row for row in rows if row["lag"] == lag and not row["control"]), key=lambda row: row["auroc"])
        assert table.count(f"<td>{lag:+d}</td><td>{best['layer']}</td>") == 2


def test_files_of_the_run_are_linked_where_they_are(full_folder: Path) -> None:
    text = files.draw_report(full_folder).decode()
    linked = re.findall(r"<a href='([\w.]+)'>", text)
    assert set(linked) == {path.name for path in full_folder.iterdir()} - {"report.html"} and "curves.json" in linked
