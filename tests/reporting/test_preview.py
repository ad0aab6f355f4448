"""The page of what will be fed: its boxes, its data and its size; and nothing in it can become code."""

import base64
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import make_rows
from scored_chains import HOSTILE, LABEL, chains_of
from test_page import Found, contrast

from streamprobe.cli import main
from streamprobe.data.tokenize import Chain
from streamprobe.lags import INSIDE, ONSET, OUTSIDE, UNKNOWN, make_columns
from streamprobe.reporting.fed_tokens import FedChain, Word, collect
from streamprobe.reporting.html import document
from streamprobe.reporting.html.preview import render, visible

LABELS = [LABEL, "other"]
COLUMNS = make_columns(LABELS, ["token", "onset"], [-4, 0, 4])


def hostile_chains(tokenizer: Any) -> list[FedChain]:
    """Chains whose text is an attack, with a second label that overlaps the first."""
    chains = []
    for row, chain in enumerate(chains_of(tokenizer)):
        other = torch.where(chain.codes == UNKNOWN, UNKNOWN, OUTSIDE).to(torch.int8)
        other[20], other[21:40] = ONSET, INSIDE
        support = (torch.arange(len(chain.ids)) >= 2) & (torch.arange(len(chain.ids)) != 30)
        chains.append(Chain(chain.id, chain.ids, torch.cat([chain.codes, other], 1), support, start=2, row=row))
    splits = {"train": chains[:10], "test": chains[10:]}
    return collect(splits, COLUMNS, labels=LABELS, arrays=LABELS, tokenizer=tokenizer)


@pytest.fixture(scope="module")
def fed(tokenizer: Any) -> list[FedChain]:
    return hostile_chains(tokenizer)


@pytest.fixture(scope="module")
def text(fed: list[FedChain]) -> str:
    settings = {"prompt": HOSTILE, "lags": [-4, 0, 4]}
    return render(f"run {HOSTILE}", fed, COLUMNS, labels=LABELS, preflight=HOSTILE, settings=settings)


def test_hostile_text_stays_text(text: str) -> None:
    found = Found(text)
    assert found.faults() == [] and found.elements.count("script") == 2
    assert sum(HOSTILE in piece for piece in found.text) >= 4, "title, heading, preflight and label"
    assert "http:" not in text and "https:" not in text and "url(" not in text


@pytest.mark.parametrize("less, greater", [("&lt;", "&gt;"), ("\\u003c", "\\u003e")])
def test_hostile_text_fails_to_stay_text_without_escaping(text: str, less: str, greater: str) -> None:
    assert Found(text.replace(less, "<").replace(greater, ">")).faults()


def test_only_the_pages_own_script_may_run(text: str) -> None:
    policy = re.search(r'Content-Security-Policy content="([^"]*)"', text)[1]
    script = re.search(r"</script><script>(.*?)</script>", text, re.S)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert "default-src 'none'" in policy and f"script-src 'sha256-{digest}'" in policy
    assert "innerHTML" not in script and "textContent" in script


def test_the_data_of_the_script_are_what_is_asked(text: str, fed: list[FedChain]) -> None:
    held = json.loads(Found(text).scripts[0])
    assert held["labels"] == LABELS
    assert held["columns"] == [[LABELS.index(c.label), c.target, c.lag] for c in COLUMNS]
    for chain, own in zip(fed, held["chains"], strict=True):
        assert own["ids"] == chain.ids and (own["first"], own["length"]) == (chain.first, chain.length)
        patterns = [held["patterns"][number] for number in own["patterns"]]
        assert [["-012".index(c) - 1 for c in p[:2]] for p in patterns] == chain.codes.tolist()
        assert [[".01".index(c) - 1 for c in p[2:]] for p in patterns] == chain.asked.tolist()


def boxes(text: str) -> list[list[tuple[set[str], str]]]:
    """The classes and the text of each token of each chain."""
    chains = re.findall(r"<div class=fed data-chain=\d+ tabindex=0>(.*?)</div>", text, re.S)
    found = [re.findall(r"<b class='([^']*)'>(.*?)</b>", chain, re.S) for chain in chains]
    return [[(set(classes.split()), word) for classes, word in chain] for chain in found]


def test_every_token_has_a_box_of_its_kind(text: str, fed: list[FedChain]) -> None:
    for chain, found in zip(fed, boxes(text), strict=True):
        assert len(found) == len(chain.ids)
        for (classes, _), codes, sample in zip(found, chain.codes.tolist(), chain.support.tolist(), strict=True):
            assert ("in" in classes) == (max(codes) >= INSIDE)
            assert ("unknown" in classes) == (sample and max(codes) == UNKNOWN)
            assert ("negative" in classes) == (sample and max(codes) == OUTSIDE)
            assert ("out" in classes) == (not sample)
    counts = {
        kind: sum(kind in classes for chain in boxes(text) for classes, _ in chain) for kind in ("out", "negative")
    }
    for kind, n in counts.items():
        assert re.search(rf"<b class={kind}>token</b> [^<]*: {n:,}</li>", text), "the legend"


def test_several_labels_are_stripes_and_a_first_token_has_a_bar(text: str, fed: list[FedChain]) -> None:
    styles = dict(re.findall(r"\.fed \.(k\d+) \{ background: (.*?); ", text))
    seen = {
        (tuple(codes), next(iter(classes - {"in", "out", "bytes", "special"})))
        for chain, found in zip(fed, boxes(text), strict=True)
        for (classes, _), codes in zip(found, chain.codes.tolist(), strict=True)
        if max(codes) >= INSIDE
    }
    assert len(seen) == len(styles) == len({tuple(codes) for codes, _ in seen}) >= 5
    for codes, name in seen:
        assert styles[name].count("--tint") == sum(code >= INSIDE for code in codes)
        assert styles[name].count("--line") == sum(code == ONSET for code in codes)


def test_what_cannot_be_seen_is_written_by_a_sign() -> None:
    odd = {" a": "␣a", "\n\n": "⏎⏎", "\t": "⇥", "\x07": "\\x07", "\u202e": "\\u202e", "\xa0": "\\xa0", "": "∅"}
    assert {text: visible(Word(text, "text")) for text in odd} == odd
    assert visible(Word("\u0301a", "text")) == "◌\u0301a"


def test_text_stands_out_from_every_label_in_light_and_in_dark() -> None:
    """The tint of a label over the page, at every hue, beside the text of the page."""
    folder = Path(document.__file__).parent
    ours, base = ((folder / name).read_text() for name in ("preview.css", "page.css"))
    tints = re.findall(r"--tint: (\d+)% (\d+)% / ([\d.]+)", ours)
    grounds, texts = (re.findall(rf"--{name}: (#\w{{6}})", base) for name in ("page", "text"))
    assert len(tints) == len(grounds) == len(texts) == 2
    for (saturation, light, alpha), ground, ink in zip(tints, grounds, texts, strict=True):
        for hue in range(0, 360, 5):
            tint = hsl(hue, int(saturation) / 100, int(light) / 100)
            base_rgb = [int(ground[i : i + 2], 16) for i in (1, 3, 5)]
            mixed = [round(float(alpha) * c + (1 - float(alpha)) * g) for c, g in zip(tint, base_rgb, strict=True)]
            assert contrast(ink, "#" + "".join(f"{c:02x}" for c in mixed)) >= 4.5


def hsl(hue: float, saturation: float, light: float) -> list[float]:
    import colorsys

    return [255 * c for c in colorsys.hls_to_rgb(hue / 360, light, saturation)]


def test_the_page_of_long_chains_is_small(tokenizer: Any) -> None:
    """Eight chains of 1,000 tokens, two labels, three targets and the original experiment's lags."""
    random = torch.Generator().manual_seed(0)
    columns = make_columns(
        ["a", "b"], ["token", "onset", "within"], [-16, -12, -8, -4, 0, 4, 8, 12, 16, 20, 24, 32, 48]
    )
    chains = []
    for row in range(8):
        inside = (torch.rand(50, 2, generator=random) < 0.2).repeat_interleave(20, 0)
        codes = torch.where(inside, INSIDE, OUTSIDE).to(torch.int8)
        codes[1:][inside[1:] & ~inside[:-1]] = ONSET
        ids = torch.randint(3, len(tokenizer), (1000,), generator=random)
        chains.append(Chain(str(row), ids, codes, torch.ones(1000, dtype=torch.bool), row=row))
    found = collect({"train": chains}, columns, labels=["a", "b"], arrays=["a", "b"], tokenizer=tokenizer)
    page = render("long", found, columns, labels=["a", "b"], preflight="", settings={})
    assert sum(len(chain.ids) for chain in found) == 8000 and len(page.encode()) < 2e6


# --- the command ---


def test_the_command_needs_no_weights_and_writes_nothing_else(model_dir, tmp_path, monkeypatch, capsys) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for path in Path(model_dir).iterdir():
        if path.suffix == ".json":
            (model / path.name).write_bytes(path.read_bytes())
    (tmp_path / "chains.json").write_text(json.dumps(make_rows(40, seed=3)))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    keys = ["--model", str(model), "--data", "../chains.json", "--lags", "-2", "0", "4", "--layers", "1"]
    assert main(["preview", *keys, "--html", "page.html", "--chains", "3"]) == 0
    printed = capsys.readouterr().out
    assert "40 read, 40 used" in printed and "example   '" in printed and printed.endswith("wrote page.html\n")
    assert [path.name for path in Path().iterdir()] == ["page.html"]
    page = Path("page.html").read_text(encoding="utf-8")
    assert len(boxes(page)) == 3 and str(tmp_path) not in page
    assert json.loads(Found(page).scripts[0])["columns"][0] == [0, "token", -2]
    assert main(["preview", *keys]) == 0 and capsys.readouterr().out == printed.removesuffix("wrote page.html\n")
    assert main(["train", *keys]) == 2, "which does need them"


def test_keys_and_options_stand_in_any_order(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    orders = (
        ["--html", "a.html", "demo", "--max_chains", "60", "--lags", "-4", "0"],
        ["demo", "--max_chains", "60", "--html=b.html", "--lags", "-4", "0"],
        ["--max_chains", "60", "--lags", "-4", "0", "--html", "c.html"],
    )
    for order in orders:
        assert main(["preview", *order]) == 0, capsys.readouterr().err
    pages = [path.read_bytes() for path in tmp_path.iterdir()]
    assert len(pages) == 3 and len(set(pages)) == 1
