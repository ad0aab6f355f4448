"""The report, its transcripts and the table: the numbers that are shown, and text that cannot become code."""

import base64
import hashlib
import json
import math
import re
import shutil
from collections.abc import Sequence
from html.parser import HTMLParser
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import sites_of
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from streamprobe.data.tokenize import Chain
from streamprobe.evaluation.results import ScoredProbes, TestResults, judge
from streamprobe.evaluation.rows import FIELDS, Judged, Row
from streamprobe.evaluation.scores import Scored
from streamprobe.evaluation.verdict import verdicts
from streamprobe.lags import INSIDE, ONSET, OUTSIDE, UNKNOWN, Column
from streamprobe.reporting import files as report
from streamprobe.reporting.html import page
from streamprobe.reporting.html.charts import PAGE, heat_map, lag_curves
from streamprobe.reporting.terminal import describe_files, grids, headline, table
from streamprobe.reporting.transcripts import LEVELS, UNASKED, collect, encode, pick, pieces, reference
from streamprobe.system.files import write_atomic

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>'\"&$x^$"
LABEL = f"back {HOSTILE}"
N_CHAINS, LENGTH = 16, 60
REAL = [Column(LABEL, "token", lag) for lag in (0, 8)]


def chains_of(tokenizer: Any) -> list[Chain]:
    """Chains that say what an attacker would, each with sections at random places."""
    random = np.random.default_rng(0)
    chains = []
    for number in range(N_CHAINS):
        ids = tokenizer(f"é 中 {HOSTILE} " * 30)["input_ids"][:LENGTH]
        inside = np.repeat(random.random(LENGTH // 5) < 0.3, 5)
        codes = np.where(inside, INSIDE, OUTSIDE)
        codes[1:][inside[1:] & ~inside[:-1]] = ONSET
        codes[:4] = UNKNOWN
        chains.append(Chain(f"{number} {HOSTILE}", torch.tensor(ids), torch.tensor(codes, dtype=torch.int8)[:, None], torch.ones(LENGTH, dtype=torch.bool)))  # fmt: skip
    return chains


def part_of(
    chains: Sequence[Chain], layers: list[int | str], columns: list[Column], strength: float, seed: int
) -> ScoredProbes:
    random = torch.Generator().manual_seed(seed)
    codes = torch.cat([chain.codes[:, 0] for chain in chains])
    y = (codes >= INSIDE)[:, None].expand(-1, len(columns))
    valid = (codes != UNKNOWN)[:, None].expand(-1, len(columns)).clone()
    valid[50:52, -1] = False
    scores = torch.randn(len(codes), len(layers), len(columns), generator=random) - 2 + strength * y[:, None]
    chain = torch.arange(len(chains)).repeat_interleave(LENGTH)
    token = torch.arange(LENGTH).repeat(len(chains))
    nothing = torch.zeros(len(layers), len(columns))
    scored = Scored(scores, y & valid, valid, chain, token)
    return ScoredProbes(
        "newton", sites_of(layers), columns, scored, nothing - 1, torch.zeros(len(columns)), nothing, nothing
    )


@pytest.fixture(scope="module")
def chains(tokenizer: Any) -> list[Chain]:
    return chains_of(tokenizer)


@pytest.fixture(scope="module")
def parts(chains: list[Chain]) -> list[ScoredProbes]:
    twins = [column._replace(control="permuted") for column in REAL]
    return [
        part_of(chains, [3, 12], [*REAL, *twins], 1.5, 1), part_of(chains, ["embed"], REAL, 0.5, 2),
        part_of(chains, ["persistence"], REAL[1:], 0.2, 3),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def judged(parts: list[ScoredProbes]) -> list[Judged]:
    return judge(parts, N_CHAINS, 20, 0)


@pytest.fixture(scope="module")
def rows(judged: list[Judged]) -> list[Row]:
    return [each.row for each in judged]


@pytest.fixture(scope="module")
def transcripts(parts: list[ScoredProbes], rows: list[Row], chains: list[Chain], tokenizer: Any) -> dict[str, Any]:
    return collect(parts, rows, chains, [LABEL], tokenizer)


@pytest.fixture
def results(
    tmp_path: Path, parts: list[ScoredProbes], judged: list[Judged], chains: list[Chain], tokenizer: Any
) -> TestResults:
    """All that is known at the end of a run whose texts are hostile."""
    facts = {
        "config": {"data": HOSTILE},
        "versions": {"python": "3"},
        "data_fingerprint": "d",
        "model_fingerprint": "m",
    }
    return TestResults(
        folder=tmp_path / "run",
        probes=parts,
        judged=judged,
        banks={},
        chains=chains,
        labels=[LABEL],
        tokenizer=tokenizer,
        facts=facts,
        described={"preflight": HOSTILE, "verdicts": [HOSTILE]},
        cost=lambda: {"passes": 1},
        resamples=20,
        seed=0,
    )


@pytest.fixture
def folder(results: TestResults) -> Path:
    """A run's files, without its report and its probes."""
    for name in ("results.csv", "summary.json", "transcripts.json"):
        write_atomic(results.folder / name, report.FILES[name].make(results) or b"")
    return results.folder


# --- the page ---


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
    report.write_report(folder)
    text = (folder / "report.html").read_text()
    found = Found(text)
    assert found.faults() == [] and found.elements.count("script") == 2
    assert sum(HOSTILE in piece for piece in found.text) >= 4, "verdict, heading, config and data"
    assert json.loads(found.scripts[0]) == transcripts and HOSTILE in transcripts["chains"][0]["id"]
    assert "http:" not in text and "https:" not in text and "url(" not in text.replace("url(#", "")
    for careless in (
        text.replace("&lt;", "<").replace("&gt;", ">"),
        text.replace("\\u003c", "<").replace("\\u003e", ">"),
    ):
        assert Found(careless).faults(), "negative control: without the escaping it is found"


def test_only_the_pages_own_script_may_run(folder: Path) -> None:
    report.write_report(folder)
    text = (folder / "report.html").read_text()
    policy = re.search(r'Content-Security-Policy content="([^"]*)"', text)[1]  # type: ignore[index]
    script = re.search(r"</script><script>(.*?)</script>", text, re.S)[1]  # type: ignore[index]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert "default-src 'none'" in policy and f"script-src 'sha256-{digest}'" in policy
    assert f'"{LEVELS}"' in script and f'"{UNASKED}"' in script, "which reads what `encode` wrote"


def test_the_report_is_rebuilt_from_the_files_of_a_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report.write_report(folder)
    first = (folder / "report.html").read_bytes()
    (folder / "report.html").unlink()
    assert report.main([str(folder)]) == 0
    assert (folder / "report.html").read_bytes() == first
    assert capsys.readouterr().out == f"wrote {folder / 'report.html'}\n"


BROKEN = {
    "no folder": lambda f: shutil.rmtree(f),
    "no rows": lambda f: (f / "results.csv").unlink(),
    "an empty table": lambda f: (f / "results.csv").write_text(""),
    "a header alone": lambda f: (f / "results.csv").write_text(",".join(FIELDS)),
    "another table": lambda f: (f / "results.csv").write_text("a,b\n1,2\n"),
    "a word for a number": lambda f: (f / "results.csv").write_text((f / "results.csv").read_text().replace(",0.", ",x", 1)),
    "a cut-off row": lambda f: (f / "results.csv").write_text((f / "results.csv").read_text()[:-80]),
    "no summary": lambda f: (f / "summary.json").unlink(),
    "a cut-off summary": lambda f: (f / "summary.json").write_text('{"run": {'),
    "an older summary": lambda f: (f / "summary.json").write_text('{"run": {"config": {}}}'),
    "no transcripts": lambda f: (f / "transcripts.json").unlink(),
    "a list": lambda f: (f / "transcripts.json").write_text("[]"),
    "no text": lambda f: (f / "transcripts.json").write_bytes(b"\xff\xfe\x00"),
}  # fmt: skip


@pytest.mark.parametrize("how", BROKEN)
def test_a_run_that_cannot_be_read_is_told_in_a_line(
    folder: Path, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    BROKEN[how](folder)
    assert report.main([str(folder)]) == 2
    told = capsys.readouterr()
    assert told.out == "" and len(told.err.splitlines()) == 1
    assert told.err.startswith("streamprobe: ") and told.err.count("; expected ") == told.err.count("; fix: ") == 1
    assert str(folder) in told.err
    assert report.main([]) == 2 and report.main(["a", "b"]) == 2


# --- the charts ---


def numbers(svg: str) -> list[str]:
    return re.findall(r">([+-]?\d\.\d{3})</text>", svg)


def test_a_heat_map_shows_the_numbers_of_its_rows(rows: list[Row]) -> None:
    [grid] = grids(rows).values()
    real = [row for row in rows if not row["control"]]
    assert sorted(numbers(heat_map(grid, "lift"))) == sorted(f"{row['lift']:+.3f}" for row in real)
    shown = numbers(heat_map(grid, "auroc"))
    permuted = [max(r["auroc"] for r in rows if r["control"] == "permuted" and r["lag"] == lag) for lag in (0, 8)]
    expected = [row["auroc"] for row in rows if row["control"] != "permuted"] + permuted
    assert sorted(shown) == sorted(f"{value:.3f}" for value in expected) and len(shown) == 4 + 2 + 1 + 2
    blank = [{**row, "auroc": math.nan} if row["layer"] == 3 else row for row in rows]
    assert len(numbers(heat_map(grids(blank).popitem()[1], "auroc"))) == len(shown) - 2


def test_charts_take_their_ink_from_the_page_and_are_the_same_each_time(rows: list[Row]) -> None:
    [grid] = grids(rows).values()
    for draw in (lambda: lag_curves(grid), lambda: heat_map(grid, "auroc")):
        svg = draw()
        assert svg.startswith("<svg") and not [colour for colour in PAGE if colour in svg]
        assert "currentColor" in svg and len(svg) < 30_000 and svg == draw()
    assert "var(--series0)" in lag_curves(grid) and "persistence" in lag_curves(grid)
    without = [{**row, "lift": math.nan} for row in rows if not row["control"]]
    assert "lift" not in lag_curves(grids(without).popitem()[1])


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
        for name in ("ink", "quiet", "accent"):
            assert min(contrast(colours[name], colours[ground]) for ground in ("page", "panel")) >= 4.5, name
        for name in ("section", *(f"series{i}" for i in range(6))):
            assert contrast(colours[name], colours["page"]) >= 3, name
        depth = float(re.search(r"--depth: ([\d.]+)", colours["block"])[1])  # type: ignore[index]
        paint = re.search(r"--paint: (\d+), (\d+), (\d+)", colours["block"]).groups()  # type: ignore[union-attr]
        ground = [int(colours["page"][i : i + 2], 16) for i in (1, 3, 5)]
        deepest = [round(depth * int(p) + (1 - depth) * g) for p, g in zip(paint, ground, strict=True)]
        assert contrast(colours["ink"], "#" + "".join(f"{c:02x}" for c in deepest)) >= 4.5
    assert contrast("#b9b9b9", "#ffffff") < 3, "negative control"


# --- the transcripts ---


def pick_by_loop(scores: Tensor, targets: Tensor, chain: Tensor, token: Tensor) -> dict[str, Any]:
    """The first hit, miss and false alarm, by going through all runs of all chains."""
    at = {(int(c), int(t)): (float(s), bool(y)) for s, y, c, t in zip(scores, targets, chain, token, strict=True)}
    runs = []
    places = sorted(place for place, (_, y) in at.items() if y)
    for (c, _), own in groupby(places, key=lambda p: (p[0], p[1] - sum(q[0] == p[0] and q[1] < p[1] for q in places))):
        tokens = [t for _, t in own]
        runs.append(((c, tokens[0], tokens[-1]), [at[c, t][0] for t in tokens]))
    quiet = [place for place, (_, y) in at.items() if not y]
    return {
        "hit": max(runs, key=lambda run: np.mean(run[1]))[0], "miss": min(runs, key=lambda run: max(run[1]))[0],
        "false alarm": max(quiet, key=lambda place: at[place][0]),
    }  # fmt: skip


def test_picks_are_the_extremes_and_name_no_chain_twice() -> None:
    random = torch.Generator().manual_seed(3)
    chain, token = torch.arange(30).repeat_interleave(40), torch.arange(40).repeat(30)
    targets = torch.rand(1200, generator=random) < 0.4
    scores = torch.randn(1200, generator=random)
    order = torch.randperm(1200, generator=random)  # the order in which tokens come does not matter
    kept = order[:1100]
    picks = pick(scores[kept], targets[kept], chain[kept], token[kept])
    assert [p.kind for p in picks] == ["hit"] * 4 + ["miss"] * 3 + ["false alarm"] * 3
    assert len({p.chain for p in picks}) == 10
    best = pick_by_loop(scores[kept], targets[kept], chain[kept], token[kept])
    assert (picks[0].chain, picks[0].first, picks[0].last) == best["hit"]
    assert best["miss"][0] in {p.chain for p in picks[:5]} and best["false alarm"][0] in {p.chain for p in picks[:8]}
    assert picks == pick(scores[kept.sort()[0]], targets[kept.sort()[0]], chain[kept.sort()[0]], token[kept.sort()[0]])
    worst = pick_by_loop(-scores[kept], targets[kept], chain[kept], token[kept])
    assert worst["hit"] != best["hit"], "negative control"


def test_few_chains_give_few_picks() -> None:
    chain = torch.tensor([0, 0, 1, 1])
    picks = pick(torch.arange(4.0), torch.tensor([True, False, False, False]), chain, torch.tensor([0, 1, 0, 1]))
    assert [(p.kind, p.chain, p.first, p.last) for p in picks] == [("hit", 0, 0, 0), ("false alarm", 1, 1, 1)]


@given(st.text(st.characters(codec="utf-8", exclude_characters="\ufffd"), max_size=40))
def test_pieces_join_to_the_text(tokenizer: Any, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    texts = pieces(ids, tokenizer)
    assert len(texts) == len(ids) and "".join(texts) == tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def test_a_letter_of_several_tokens_is_whole(tokenizer: Any) -> None:
    ids = tokenizer("a 中 b", add_special_tokens=False)["input_ids"]
    texts = pieces(ids, tokenizer)
    assert "".join(texts) == "a 中 b" and "\ufffd" not in "".join(texts) and "" in texts
    assert "\ufffd" in "".join(tokenizer.decode([i]) for i in ids), "negative control: token by token it is lost"


def test_a_letter_tells_a_probability() -> None:
    probability = torch.linspace(0, 1, 1001)
    text = encode(probability, torch.arange(1001) != 500, None)
    read = torch.tensor([-1.0 if letter == UNASKED else (LEVELS.index(letter) / 63) ** 2 for letter in text])
    assert read[500] == -1 and len(set(LEVELS)) == 64 and UNASKED not in LEVELS
    error = (read - probability).abs()
    error[500] = 0
    assert error.max() < 1 / 63 and error[:10].max() < 0.003, "finest where events are rare"
    for threshold in (0.003, 0.1234, 0.9):
        text = encode(probability, torch.ones(1001, dtype=torch.bool), threshold)
        near = torch.tensor([(LEVELS.index(letter) / 63) ** 2 for letter in text])
        assert torch.equal(near >= threshold, probability >= threshold) and (near - probability).abs().max() < 2.1 / 63
        assert not torch.equal(read.clamp_min(0) >= threshold, probability >= threshold), "negative control"


def test_transcripts_hold_what_every_probe_says(
    transcripts: dict[str, Any], parts: list[ScoredProbes], rows: list[Row], chains: list[Chain]
) -> None:
    assert [(p["layer"], p["lag"]) for p in transcripts["probes"]] == [(3, 0), (12, 0), (3, 8), (12, 8)]
    assert transcripts["probes"][0]["threshold"] == round(1 / (1 + math.e), 4)
    best = max((r for r in rows if not r["control"]), key=lambda r: r["lift"])
    assert {name: best[name] for name in ("layer", "lag")}.items() <= transcripts["reference"].items()
    scored = parts[0].scored
    for shown in transcripts["chains"]:
        number = int(shown["id"].split()[0])
        assert shown["id"] == chains[number].id and shown["first"] == 0 and shown["length"] == LENGTH
        codes = [UNKNOWN if letter == "-" else int(letter) for letter in shown["codes"][0]]
        assert codes == chains[number].codes[:, 0].tolist()
        own = scored.chain == number
        for said, (i, k) in zip(shown["said"], ((0, 0), (1, 0), (0, 1), (1, 1)), strict=True):
            expected = scored.scores[own, i, k].sigmoid().tolist()
            for letter, p, asked in zip(said, expected, scored.valid[own, k].tolist(), strict=True):
                assert (letter == UNASKED) == (not asked)
                assert not asked or abs((LEVELS.index(letter) / 63) ** 2 - p) < 1 / 63
        positive = [codes[t] >= INSIDE for t in range(shown["at"][0], shown["at"][1] + 1)]
        assert all(positive) if shown["kind"] != "false alarm" else not any(positive)


def test_excerpts_get_shorter_rather_than_the_file_large(
    parts: list[ScoredProbes], rows: list[Row], chains: list[Chain], tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streamprobe.reporting.transcripts.ROOM", 4 * 10 * 45)  # probes, chains, tokens
    few = collect(parts, rows, chains, [LABEL], tokenizer)["chains"]
    assert len(few) == 10 and all(len(c["tokens"]) == len(c["said"][0]) == len(c["codes"][0]) == 45 for c in few)
    assert all(c["first"] <= c["at"][0] and c["at"][1] < c["first"] + 45 for c in few)
    monkeypatch.setattr("streamprobe.reporting.transcripts.ROOM", 4 * 2 * 40)
    assert len(collect(parts, rows, chains, [LABEL], tokenizer)["chains"]) == 2


def test_without_a_class_nothing_is_picked(rows: list[Row], chains: list[Chain], tokenizer: Any) -> None:
    blank = [{**row, "auroc": math.nan, "lift": math.nan} for row in rows]
    assert reference(blank) is None
    empty = collect([], blank, chains, [LABEL], tokenizer)
    assert empty["chains"] == [] and empty["reference"] is None
    bare = [{**row, "lift": math.nan} for row in rows]
    assert reference(bare)["auroc"] == max(row["auroc"] for row in rows if not row["control"])  # type: ignore[index]


# --- the table ---


def test_the_table_is_compact_and_ends_in_its_verdict(parts: list[ScoredProbes], rows: list[Row]) -> None:
    told = verdicts(judge(parts, len(parts[0].scored.chain.unique()), 20, 0))
    lines = table(rows, told).splitlines()
    assert max(len(line) for line in lines if HOSTILE not in line) <= 120
    assert lines[-1] == told[-1]
    marked = re.findall(r"(\d\.\d{3})\*", "\n".join(lines))
    best = [max((r for r in rows if not r["control"] and r["lag"] == lag), key=lambda r: r["auroc"]) for lag in (0, 8)]
    assert marked == [f"{row['auroc']:.3f}" for row in best]
    ladder = [line.split() for line in lines if re.match(r" +\+\d +\d", line)]
    for cells, row in zip(ladder, best, strict=True):
        assert cells[:3] == [f"{row['lag']:+d}", str(row["layer"]), f"{row['auroc']:.3f}"]
        assert f"{row['lift']:+.3f}" in cells and row["best_control"] in cells


def test_many_lags_are_wrapped(rows: list[Row]) -> None:
    many = [{**row, "lag": lag} for row in rows for lag in range(20) if row["lag"] == 0]
    lines = table(many, ["verdict"]).splitlines()
    assert sum(line.startswith("lag  ") for line in lines) == 2 and max(map(len, lines[1:])) <= 120


def test_a_missing_class_is_told(rows: list[Row]) -> None:
    blank = [{**row, "auroc": math.nan} if row["layer"] == 3 and not row["control"] else row for row in rows]
    assert "2 probes have nan" in table(blank, ["verdict"])
    assert "nan:" not in table(rows, ["verdict"])
    assert headline([{**row, "auroc": math.nan, "lift": math.nan} for row in rows]).keys() < headline(rows).keys()


def test_files_are_listed_with_their_sizes(folder: Path) -> None:
    (folder / "checkpoint").mkdir()
    (folder / "checkpoint/state.safetensors").write_bytes(bytes(2_500_000))
    text = describe_files(folder)
    assert (
        "checkpoint/ 2.5 MB" in text
        and f"results.csv {round((folder / 'results.csv').stat().st_size / 1e3)} kB" in text
    )


def test_a_report_that_cannot_be_written_or_drawn_is_told_in_a_line(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, capsys: Any
) -> None:
    for number, spoil in enumerate(
        (
            lambda f: (f / "report.html").mkdir(),
            lambda f: (f / "results.csv").write_text((f / "results.csv").read_text().replace(",embed,", ",emblem,")),
            lambda f: (f / "transcripts.json").write_text(
                (f / "transcripts.json").read_text().replace('"kind"', '"sort"')
            ),
        )
    ):
        copy = tmp_path_factory.mktemp("runs") / str(number)
        shutil.copytree(folder, copy)
        (copy / "report.html").unlink(missing_ok=True)
        spoil(copy)
        assert report.main([str(copy)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("streamprobe: ") and error.count("\n") == 1 and "Traceback" not in error
