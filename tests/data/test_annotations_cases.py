"""What annotators write and models say in the field, and the sections that are right."""

import json
import random
import time
from difflib import SequenceMatcher
from pathlib import Path

import pytest
import yaml
from builders import make_rows, parse_annotations

from streamprobe.cli import train as main
from streamprobe.config.load import load_config
from streamprobe.data.annotations import annotate, rejoin
from streamprobe.errors import InputError

CASES = json.loads((Path(__file__).parent / "annotations_cases.json").read_text(encoding="utf-8"))
BY_NAME = {case["name"]: case for case in CASES}
QUOTING = [case["name"] for case in CASES if '["' in case["response"]]
TYPESET = [
    "an ellipsis that the annotator wrote as three dots",
    "typographic quotes and dashes that the annotator typed plain",
    "plain signs that the annotator set in type",
    "Hangul syllables and their letters",
]


@pytest.mark.parametrize("name", BY_NAME)
def test_sections_are_found(name):
    case = BY_NAME[name]
    found = annotate(case["annotated"], case["response"])
    assert [[s.label, case["response"][s.start : s.end]] for s in found.sections] == case["expected"]
    assert (found.lost, found.unbalanced, found.strange) == (0, case["unbalanced"], [])


@pytest.mark.parametrize("name", QUOTING)
def test_sections_fails_without_the_original(name):
    """Negative control: the annotated text alone does not say which of its brackets are the model's."""
    text, sections, unbalanced = parse_annotations(BY_NAME[name]["annotated"])
    found = [[s.label, text[s.start : s.end]] for s in sections]
    dropped = "dropped" in name  # the bracket is not in the copy
    assert dropped or found != BY_NAME[name]["expected"] or unbalanced


@pytest.mark.parametrize("name", TYPESET)
def test_sections_fails_without_plain_typography(name, monkeypatch):
    monkeypatch.setattr("streamprobe.data.alignment.unicodedata.normalize", lambda _form, text: text)
    monkeypatch.setattr("streamprobe.data.alignment.PLAIN", {})
    found = annotate(BY_NAME[name]["annotated"], BY_NAME[name]["response"])
    assert [[s.label, BY_NAME[name]["response"][s.start : s.end]] for s in found.sections] != BY_NAME[name]["expected"]


@pytest.mark.parametrize("name", BY_NAME)
def test_rejoined_sections_keep_the_models_brackets(name):
    case = BY_NAME[name]
    text, found = rejoin(case["annotated"], case["response"])
    sections = [[s.label, text[s.start : s.end].strip()] for s in found.sections]
    wanted = case["expected"] if name not in TYPESET else sections  # as the annotator wrote it
    if not any(word in name for word in ("dropped", "changed", "edited", "decomposed")):
        assert sections == wanted
    assert [label for label, _ in sections] == [label for label, _ in case["expected"]]
    assert "backtracking" not in "".join(part for _, part in sections) or "backtracking" in case["response"]


FORMS = [
    "[backtracking]",
    "<backtracking>",
    '["backtracking"',
    'backtracking"]',
    '"backtracking"]',
    "{backtracking}",
    '("backtracking")',
    "[“backtracking]",
    "[5. backtracking]",
    "[/backtracking]",
    "</backtracking>",
    "[**backtracking**]",
    "[`backtracking`]",
    r"[\"backtracking\"]",
    '<section label="backtracking">',
    "【backtracking】",
]


@pytest.mark.parametrize("form", FORMS)
def test_a_form_that_is_not_understood_is_counted_by_form(form):
    response = "We add two. Wait, no, three. Done."
    annotated = f'["deduction"]We add two.["end-section"] {form}Wait, no, three.["end-section"] ["deduction"]Done.["end-section"]'
    found = annotate(annotated, response)
    assert [response[s.start : s.end] for s in found.sections] == ["We add two.", "Done."]
    if form == 'backtracking"]':  # without any mark in front it is text like any other
        assert found.unbalanced == 1
    else:
        assert found.strange == [form] and found.edited == 0
        mapped = annotate(annotated, response, {form: "backtracking"})
        assert [s.label for s in mapped.sections] == ["deduction", "backtracking", "deduction"]
        assert response[slice(*mapped.sections[1][1:])] == "Wait, no, three." and not mapped.strange
    same = annotate(f'["deduction"]{form}We add two.["end-section"]', f"{form}We add two.")
    assert not same.strange and same.sections == [("deduction", 0, len(form) + 11)]  # negative control: the model's own


def test_text_without_tags_differs_from_text_whose_sections_are_lost():
    plain, lost = annotate("one two", "one two"), annotate('["a"]xyz["end-section"]', "one two")
    assert not plain.sections and not lost.sections
    assert (plain.asked, lost.asked) == (0, 1)


# --- time ---


def chain(n_words: int, loop: bool, seed: int = 0) -> list[str]:
    """Sentences of about a dozen words out of some hundred, or a paragraph of three of them over and over."""
    rng = random.Random(seed)
    vocabulary = [f"w{i}" for i in range(120)] + ["so", "the", "a", "of"] * 20
    sentences = [" ".join(rng.choices(vocabulary, k=rng.randint(6, 18))) + "." for _ in range(n_words // 12)]
    return [sentences[i % 3] for i in range(len(sentences))] if loop else sentences


def edit(sentences: list[str], rate: float, seed: int = 1) -> list[str]:
    """One inner word of so many of the sentences written otherwise."""
    rng = random.Random(seed)
    edited = []
    for sentence in sentences:
        words = sentence.split()
        if rng.random() < rate:
            words[rng.randrange(1, len(words) - 1)] = "XX"
        edited.append(" ".join(words))
    return edited


def tagged(sentences: list[str]) -> str:
    labels = ("deduction", "backtracking")
    return " ".join(f'["{labels[i % 2]}"]{text}["end-section"]' for i, text in enumerate(sentences))


LONG = {
    "natural": (24_000, False, 0.05),
    "looping": (24_000, True, 0.05),
    "natural, every sentence edited": (24_000, False, 1.0),
    "looping, every sentence edited": (24_000, True, 1.0),
}


@pytest.mark.parametrize("name", LONG)
def test_a_long_chain_is_aligned_in_time(name):
    n_words, loop, rate = LONG[name]
    sentences = chain(n_words, loop)
    text, annotated = " ".join(sentences), tagged(edit(sentences, rate))
    began = time.process_time()
    found = annotate(annotated, text)
    assert time.process_time() - began < 5
    places, place = [], 0
    for sentence in sentences:
        places.append((place, place + len(sentence)))
        place += len(sentence) + 1
    assert found.lost == 0 and [(s.start, s.end) for s in found.sections] == places


def test_a_copy_that_loops_on_is_aligned_in_time():
    text, annotated = " ".join(chain(6_000, True)), tagged(edit(chain(12_000, True), 0.05))
    began = time.process_time()
    found = annotate(annotated, text)
    assert time.process_time() - began < 5
    assert found.asked == 1000 and 495 <= found.lost <= 500  # the half that the original does not have
    assert max(s.end - s.start for s in found.sections) < 200


def test_time_fails_without_the_longest_common_subsequence():
    """Negative control: the standard library's matcher takes longer for half of the looping chain."""
    took = []
    for n_words in (24_000, 12_000):
        sentences = chain(n_words, True)
        copy = edit(sentences, 0.05)
        began = time.process_time()
        if n_words == 24_000:
            annotate(tagged(copy), " ".join(sentences))
        else:
            words = [" ".join(text).split() for text in (copy, sentences)]
            SequenceMatcher(None, *words, autojunk=False).get_opcodes()
        took.append(time.process_time() - began)
    assert took[1] > took[0]


# --- from a file to the terminal ---


@pytest.fixture
def shown(tmp_path, model_dir, capsys, monkeypatch):
    """A function that runs `--dry_run` over rows; returns the exit status and what was printed."""
    monkeypatch.chdir(tmp_path)

    def show(rows, *argv, config=""):
        Path("chains.json").write_text(json.dumps(rows))
        Path("config.yaml").write_text(f"model: {model_dir}\ndata: chains.json\nlayers: [0]\nlags: [0, 2]\n{config}")
        status = main(["config.yaml", "--dry_run", *argv])
        out, err = capsys.readouterr()
        return status, out, err

    return show


def renamed(names: list[str], n: int = 40) -> list[dict[str, str]]:
    """Rows in which the label `backtracking` of each fifth chain is one of these names."""
    rows = make_rows(n, seed=3)
    for i, name in enumerate(names):
        for row in rows[i::5]:
            row["annotated_chain"] = row["annotated_chain"].replace('["backtracking"]', f'["{name}"]')
    return rows


def test_nearly_equal_names_are_named_with_what_to_do(shown):
    status, out, _ = shown(renamed(["5. backtracking", "Back_tracking"]))
    line = next(line for line in out.splitlines() if line.startswith("names"))
    assert status == 0 and "nearly 'backtracking'" in line
    assert "--label_names Back_tracking=backtracking '5. backtracking=backtracking'" in line
    _, out, _ = shown(renamed(["realization"]))  # negative control
    assert not [line for line in out.splitlines() if line.startswith("names")]


def test_names_that_are_mapped_are_one_label(shown):
    rows = renamed(["5. backtracking", "Back_tracking"])
    pairs = ["5. backtracking=backtracking", "Back_tracking=backtracking"]
    mapping = "label_names: {5. backtracking: backtracking, Back_tracking: backtracking}\n"
    listed = f"label_names: {json.dumps(pairs)}\n"
    wanted = shown(make_rows(40, seed=3))[1].split("weights")[0]
    for argv, config in ((["--label_names", *pairs], ""), ([], mapping), ([], listed)):
        status, out, _ = shown(rows, *argv, config=config)
        assert status == 0 and out.split("weights")[0] == wanted
    assert shown(rows)[1].split("weights")[0] != wanted  # negative control


WRONG = {
    "no such name": (["Backtrackin=backtracking"], "the nearest is 'backtracking'"),
    "no equals sign": (["backtracking"], "label_names 'backtracking'; expected a name and what to call it"),
    "no label": (["backtracking="], "label_names 'backtracking='"),
    "no name": (["=backtracking"], "label_names '=backtracking'"),
    "twice": (["a=b", "a=c"], "each name once"),
    "invisible": (["backtracking=a\x1bb"], "label_names 'backtracking=a\\x1bb'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_label_names_that_are_wrong_are_refused_in_one_line(shown, name):
    pairs, reported = WRONG[name]
    status, _, error = shown(make_rows(30), "--label_names", *pairs)
    assert status == 2 and error.count("\n") == 1 and reported in error and "--label_names" in error


MAPPINGS = {
    "mapping": ("{5. back: back, 'x=y': z}", ["5. back=back", "x=y=z"]),
    "list": ('["5. back=back"]', ["5. back=back"]),
    "one": ("5. back=back", ["5. back=back"]),
    "nothing": ("", None),
    "empty mapping": ("{}", None),
}


@pytest.mark.parametrize("name", MAPPINGS)
def test_a_runs_config_says_the_same_mapping(tmp_path, name):
    written, pairs = MAPPINGS[name]
    (tmp_path / "a.yaml").write_text(f"model: x\ndata: y\nlayers: [0]\nlabel_names: {written}\n")
    config = load_config([str(tmp_path / "a.yaml")])
    assert config.data.label_names == pairs
    assert config.data.names == (
        {"5. back": "back", "x=y": "z"} if name == "mapping" else {"5. back": "back"} if pairs else {}
    )
    (tmp_path / "b.yaml").write_text(yaml.safe_dump(config.flat()))
    assert load_config([str(tmp_path / "b.yaml")]).flat() == config.flat()


def test_a_name_mapped_to_nothing_is_refused(tmp_path):
    (tmp_path / "a.yaml").write_text("model: x\ndata: y\nlayers: [0]\nlabel_names: {back: }\n")
    with pytest.raises(InputError, match="label_names 'back='; expected a name and what to call it"):
        load_config([str(tmp_path / "a.yaml")])


def test_forms_and_rare_labels_are_shown(shown):
    rows = make_rows(30, seed=4)
    rows[0]["annotated_chain"] = rows[0]["annotated_chain"].replace('["deduction"]', "<deduction>", 2)
    rows[1]["annotated_chain"] = rows[1]["annotated_chain"].replace('["deduction"]', '["total"]', 1)
    status, out, _ = shown(rows)
    assert status == 0
    assert "tags      2 of a form that is not understood, passed over: <deduction> 2" in out
    assert "rare      labels in a single chain, a slip or the model's own text: 'total'" in out
    assert "tags  " not in (plain := shown(make_rows(30, seed=4))[1]) and "rare  " not in plain  # negative control


def test_data_whose_tags_are_all_of_another_form_are_refused_with_the_form(shown):
    rows = make_rows(30)
    for row in rows:
        row["annotated_chain"] = row["annotated_chain"].replace('["', "<").replace('"]', ">")
    status, _, error = shown(rows)
    assert status == 2 and error.count("\n") == 1
    assert "form that is not understood, such as <initializing>" in error
