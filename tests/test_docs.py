"""README and docs/: what they name exists, what they copy is as it is."""

import importlib.util
import json
import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

import streamprobe
from streamprobe.config.load import GROUPS
from streamprobe.config.schema import TrainingConfig
from streamprobe.controls.table import CONTROLS
from streamprobe.data.detect import FormatQuery, find_format
from streamprobe.data.formats import FORMATS, read_row
from streamprobe.data.label_rules import parse_rule
from streamprobe.data.records import FormatOptions, Record
from streamprobe.reporting.files import FILES

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = {str(path.relative_to(ROOT)): path for path in [README, *sorted((ROOT / "docs").glob("*.md"))]}
COMMANDS = (
    "train",
    "demo",
    "preview",
    "score",
    "evaluate",
    "watch",
    "steer",
    "report",
    "compare",
    "push",
    "bench",
    "configs",
)
# Pages whose options are those of commands that take no config
FOR_RUNS = ("docs/probes.md", "docs/cost.md", "docs/transfer.md")
OF_PREVIEW = ("--html", "--chains")  # its own options, beside the keys
KEYS = {field.name for group in GROUPS for field in fields(group)}
LONGEST = 90  # lines of README: two screens

spec = importlib.util.spec_from_file_location("make_reference", ROOT / "docs" / "make_reference.py")
assert spec and spec.loader
make_reference = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make_reference)


def controls_of_the_schema() -> list[str]:
    """Every control that a config may name."""
    return list(CONTROLS)


def files_without_a_row(text: str) -> list[str]:
    """The files of a run that the table of a page lacks."""
    return [name for name in FILES if not re.search(rf"^\| `{re.escape(name)}` \|", text, re.MULTILINE)]


def code_and_prose(text: str) -> tuple[list[str], str]:
    """The lines of a page's code blocks, those that end with a backslash joined to the next, and all other text."""
    code, prose, fenced = [], [], False
    for line in text.split("\n"):
        if line.startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            code.append(line.strip())
        else:
            prose.append(line)
    return "\n".join(code).replace("\\\n", " ").split("\n"), "\n".join(prose)


def spans(text: str) -> list[str]:
    """What stands between backticks in a page's prose."""
    return re.findall(r"`([^`\n]+)`", code_and_prose(text)[1])


def headings(text: str) -> set[str]:
    """The anchors that GitHub gives to a page's headings."""
    titles = re.findall(r"^#+ (.+)$", code_and_prose(text)[1], re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def broken_links(path: Path, text: str) -> list[str]:
    """The links of a page into this repository that lead to no file, or to no heading of it."""
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", code_and_prose(text)[1]):
        if "://" in link:
            continue
        name, _, heading = link.partition("#")
        target = path.parent / name
        if name and not target.is_file():
            broken.append(link)
        elif heading and heading not in headings(target.read_text(encoding="utf-8") if name else text):
            broken.append(link)
    return broken


def commands(text: str) -> list[list[str]]:
    """Every command line of this package that a page shows, in words."""
    lines = [part for line in [*code_and_prose(text)[0], *spans(text)] for part in re.split(r"&&", line)]
    ours = r"(?:[A-Z_]+=\S+ )*((?:python run\.py|python -m streamprobe\S*|streamprobe)(?: .*)?)"
    found = [match[1] for line in lines if (match := re.fullmatch(ours, line.strip()))]
    return [shlex.split(re.sub(r"[\[\]]", "", line), comments=True) for line in found]


def faults(words: list[str]) -> list[str]:
    """What a command line names and this package does not have."""
    program, *rest = words
    if program == "python":
        launcher, *rest = rest
        if launcher == "run.py":
            return faults_of_training(rest, by_name=False)
        module, *rest = rest
        if module != "streamprobe":
            there = (ROOT / module.replace(".", "/")).with_suffix(".py").is_file()
            return [] if there else [module]
    if not rest or rest[0] in ("--help", "--version"):
        return []
    command, *rest = rest
    if command not in COMMANDS:
        return [command]
    if command == "preview":
        rest = [word for word in rest if word not in OF_PREVIEW]
    by_name = command in ("train", "preview")
    return faults_of_training(rest, by_name) if command in ("train", "demo", "preview") else []


def faults_of_training(words: list[str], by_name: bool) -> list[str]:
    """The config and the keys of a command line that do not exist.  `by_name`: a config may be named without its path."""
    config = [word for word in words[:1] if not word.startswith("-")]
    unknown = [word for word in config if not (is_config(word) or (by_name and is_config(f"configs/{word}.yaml")))]
    return unknown + [word for word in words if word.startswith("--") and not is_key(word)]


def is_config(name: str) -> bool:
    """Whether a name is a file of this repository, the config that a run writes, or stands for any config."""
    return name == "CONFIG" or bool(re.fullmatch(r"runs/\S+/config\.yaml", name)) or (ROOT / name).is_file()


def is_key(option: str) -> bool:
    """Whether an option of a training command is a key, or asks for help."""
    name = option.removeprefix("--").partition("=")[0]
    return name == "help" or name in KEYS or name.removeprefix("no_") in KEYS


def unknown_keys(name: str, text: str) -> list[str]:
    """The keys that a page's prose names, as `key: value` or `--key`, and the schema does not have."""
    named = [span.split(":")[0] for span in spans(text) if re.match(r"[a-z_0-9]+: ", span)]
    if name not in FOR_RUNS:
        named += [span.split()[0] for span in spans(text) if re.match(r"--[a-z]", span)]
    return [key for key in named if not is_key(f"--{key.removeprefix('--')}")]


def missing_files(text: str) -> list[str]:
    """The files and folders of this repository that a page names between backticks and that are not there."""
    named = [span for span in spans(text) if re.fullmatch(r"(?:streamprobe|tests|configs|docs)/[\w./-]*", span)]
    return [name for name in named if not (ROOT / name).exists()]


def tables_of_controls(text: str) -> list[list[str]]:
    """The first column of each table that is headed `control`, without the backticks."""
    tables = re.findall(r"^\| control \|.*\n\|[-|]+\n((?:\|.*\n)+)", text, re.MULTILINE)
    return [re.findall(r"^\| `?([\w+]+)`? \|", table, re.MULTILINE) for table in tables]


@pytest.fixture(params=PAGES)
def page(request):
    return request.param


def read(name: str) -> str:
    return PAGES[name].read_text(encoding="utf-8")


def test_every_link_leads_to_a_file_and_a_heading(page):
    assert broken_links(PAGES[page], read(page)) == []


@pytest.mark.parametrize(
    "link", ["docs/nothing.md", "docs/data.md#nothing", "#nothing", "docs", "../README.md#install-and-run"]
)
def test_the_check_of_links_fails_without_their_file_or_heading(link):
    assert broken_links(README, f"# A title\n\n[this]({link}), [that](docs/data.md#tags), [here](#a-title)") == [link]


def test_every_page_of_docs_is_linked_from_the_readme():
    linked = set(re.findall(r"\((docs/\w[\w-]*\.md)\)", read("README.md")))
    assert linked == set(PAGES) - {"README.md"}


def test_every_page_of_docs_opens_with_a_question_and_shows_a_command():
    for name in set(PAGES) - {"README.md", "docs/glossary.md"}:
        assert read(name).split("\n")[0].endswith("?") and commands(read(name)), name


def test_every_command_names_a_config_and_keys_that_exist(page):
    assert [fault for words in commands(read(page)) for fault in faults(words)] == []


def test_commands_are_found_wherever_a_page_shows_them():
    text = (
        "Run `streamprobe demo`.\n\n    pip install -e . && python run.py    # the demo\n"
        "    A=1 streamprobe train a \\\n        --lags 0\n\n```\nstreamprobe\nstreamprobe_other x\n```\n"
    )
    assert commands(text) == [
        ["python", "run.py"],
        ["streamprobe", "train", "a", "--lags", "0"],
        ["streamprobe"],
        ["streamprobe", "demo"],
    ]


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("python run.py configs/nothing.yaml", "configs/nothing.yaml"),
        ("python run.py llama-3.1-8b", "llama-3.1-8b"),
        ("python run.py configs/demo.yaml --lag 0", "--lag"),
        ("streamprobe train nothing", "nothing"),
        ("streamprobe train llama-3.1-8b --layer 3", "--layer"),
        ("streamprobe demo --pass=3", "--pass=3"),
        ("streamprobe preview demo --html x.html --htm x", "--htm"),
        ("streamprobe monitor runs/demo", "monitor"),
        ("python -m streamprobe monitor runs/demo", "monitor"),
        ("python -m streamprobe.monitor runs/demo", "streamprobe.monitor"),
    ],
)
def test_the_check_of_commands_fails_without_the_config_or_key(line, fault):
    assert [faults(words) for words in commands(f"    {line}")] == [[fault]]


def test_every_key_in_the_text_exists(page):
    assert unknown_keys(page, read(page)) == []


def test_the_check_of_keys_fails_without_the_key_in_the_schema():
    text = "`support: all`, `supports: all`, `--l2`, `--no_bos`, `--l3 1`, `row: 1`"
    assert unknown_keys("docs/data.md", text) == ["supports", "row", "--l3"]


def test_every_file_that_is_named_exists(page):
    assert missing_files(read(page)) == []


def test_the_check_of_files_fails_without_the_file():
    assert missing_files("`streamprobe/lags.py`, `tests/nothing.py` and `streamprobe/nothing/`") == [
        "tests/nothing.py",
        "streamprobe/nothing/",
    ]


def test_the_readme_is_two_screens():
    assert not too_long(read("README.md"))


def too_long(text: str) -> bool:
    return len(text.splitlines()) > LONGEST


def test_the_check_of_length_fails_without_a_cut():
    assert not too_long("line\n" * LONGEST) and too_long("line\n" * (LONGEST + 1))


def test_tables_of_controls_list_every_control(page):
    assert all(table == controls_of_the_schema() for table in tables_of_controls(read(page)))
    assert page != "docs/controls.md" or tables_of_controls(read(page))


@pytest.mark.parametrize("name", controls_of_the_schema())
def test_the_check_of_controls_fails_without_a_row(name):
    lines = read("docs/controls.md").split("\n")
    tables = tables_of_controls("\n".join(line for line in lines if not line.startswith(f"| `{name}` ")))
    assert tables == [[other for other in controls_of_the_schema() if other != name]]


def test_the_page_of_files_has_a_row_for_every_file():
    assert files_without_a_row(read("docs/files.md")) == []


def test_the_check_of_files_of_a_run_fails_without_a_row():
    text = read("docs/files.md").replace("| `summary.json` |", "| summary |")
    assert files_without_a_row(text) == ["summary.json"]


def test_the_reference_is_what_the_schema_says():
    assert read("docs/reference.md") == make_reference.render(), "run `python docs/make_reference.py`"


@pytest.mark.parametrize(("attribute", "value"), [("default", 0.5), ("metadata", {"help": "Another meaning."})])
def test_the_check_of_the_reference_fails_without_a_new_page(monkeypatch, attribute, value):
    """After a change of a default or of a meaning."""
    monkeypatch.setattr(TrainingConfig.__dataclass_fields__["l2"], attribute, value)
    assert read("docs/reference.md") != make_reference.render()


def test_the_reference_has_a_row_for_every_key():
    assert set(re.findall(r"^\| `(\w+)` \|", read("docs/reference.md"), re.MULTILINE)) == KEYS


def test_the_row_of_data_is_one_of_the_demos():
    (row,) = re.findall(r"```json\n(.*?)```", read("docs/demo.md"), re.DOTALL)
    chains = json.loads((ROOT / "streamprobe/demo/chains.json").read_text(encoding="utf-8"))
    assert json.loads(row) in chains


def rows_of_formats(text: str) -> list[tuple[str, str]]:
    """The rows of data that a page shows, each with the format that it is said to have."""
    below_headings = re.findall(r"^### (\w+)$(?:(?!^##).)*?^```json\n(.*?)\n```", text, re.MULTILINE | re.DOTALL)
    return below_headings or re.findall(r"^(\w+) +({.*})", text, re.MULTILINE)


def misread(rows: list[tuple[str, str]]) -> list[str]:
    """The formats of rows that are read as another one, or cannot be."""
    options = FormatOptions(rules=[parse_rule("backtracking=(?i)wait")])
    found = {name: find_format([json.loads(row)], name, FormatQuery(), options) for name, row in rows}
    read_as = {name: read_row(json.loads(row), 0, FORMATS[name], found[name].options) for name, row in rows}
    return [name for name in found if found[name].name != name or not isinstance(read_as[name], Record)]


@pytest.mark.parametrize("page", ["README.md", "docs/data.md"])
def test_a_row_of_each_format_is_shown_and_read_as_such(page):
    rows = rows_of_formats(read(page))
    assert [name for name, _ in rows] == list(FORMATS) and misread(rows) == []
    labels = {"annotated", "spans", "messages", "tokens", "sentences", "text"}
    options = FormatOptions(rules=[parse_rule("backtracking=(?i)wait")])
    for name, row in rows:
        record = read_row(
            json.loads(row), 0, FORMATS[name], find_format([json.loads(row)], "", FormatQuery(), options).options
        )
        assert isinstance(record, Record) and ("backtracking" in {s.label for s in record.sections}) == (name in labels)


def test_the_check_of_rows_fails_without_the_columns_of_their_format():
    assert misread([("spans", '{"text": "a", "label": "b"}')]) == ["spans"]


def test_the_citation_names_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == streamprobe.__version__
    assert citation["license"] == "Apache-2.0"
