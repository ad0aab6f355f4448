"""From rows to token ids and labels: the split, the token borders, the special tokens, and what is refused."""

import io
import time
from collections import Counter
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from builders import fingerprint, load_chains, make_record, make_rows, make_tokenizer
from tqdm import tqdm

from streamprobe.data import preflight
from streamprobe.data.annotations import Annotation, Section, annotate
from streamprobe.data.dataset import MOST_SECTION_LABELS, Division, choose_section_labels, make_dataset
from streamprobe.data.formats import annotated, category_of
from streamprobe.data.prompts import format_prompt
from streamprobe.data.records import FormatOptions, Record, Refused
from streamprobe.data.splits import split_chains
from streamprobe.data.tokenize import TextOptions, tokenize
from streamprobe.errors import InputError
from streamprobe.lags import INSIDE, ONSET, OUTSIDE, UNKNOWN

FIELDS = ("task_id", "problem", "reasoning_chain", "annotated_chain")
LABELS = ["backtracking", "deduction"]
CHAT = (
    "{{ bos_token }}{% for m in messages %}|{{ m.role }}|{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}|assistant|{% endif %}"
)


# --- the split ---


@pytest.mark.parametrize("n", [10, 37, 1000])
@pytest.mark.parametrize("seed", [42, 7])
def test_test_split_is_the_head_of_the_permutation(n, seed):
    where = split_chains([f"problem {i}" for i in range(n)], seed=seed)
    order = np.random.RandomState(seed).permutation(n)
    n_test = int(0.2 * n)
    assert {i for i, split in enumerate(where) if split == "test"} == set(order[:n_test])
    n_validation = round((n - n_test) * 0.1)
    assert {i for i, split in enumerate(where) if split == "validation"} == set(order[n_test : n_test + n_validation])
    assert Counter(where)["train"] == n - n_test - n_validation
    assert "duplicate" not in where
    if n > 10:  # negative control
        assert where != split_chains([f"problem {i}" for i in range(n)], seed=seed + 1)


@pytest.mark.parametrize("seed", range(10))
def test_twins_never_cross_where_chains_are_drawn(seed):
    rng = np.random.default_rng(seed)
    problems = [f"problem {i}" for i in rng.integers(0, 60, 100)]
    where = split_chains(problems, seed=seed, by="chain")
    order = np.random.RandomState(seed).permutation(100)
    assert all(where[i] == "test" for i in order[:20])
    assert where.count("test") == 20
    of = {name: {p for p, w in zip(problems, where, strict=True) if w == name} for name in set(where)}
    assert of["duplicate"] and of["duplicate"] <= of["test"]
    for a, b in [("train", "validation"), ("train", "test"), ("validation", "test")]:
        assert not of[a] & of[b]
    cut = ["test" if i in set(order[:20]) else "validation" if i in set(order[20:28]) else "train" for i in range(100)]
    train, test = ({p for p, w in zip(problems, cut, strict=True) if w == name} for name in ("train", "test"))
    assert train & test  # negative control: cutting the permutation alone leaks


@pytest.mark.parametrize(("shares", "counts"), [((0.0, 0.1), (0, 10, 90)), ((0.5, 0.0), (50, 0, 50))])
def test_shares(shares, counts):
    where = split_chains([str(i) for i in range(100)], test_share=shares[0], validation_share=shares[1])
    assert tuple(where.count(name) for name in ("test", "validation", "train")) == counts


# --- one record as tokens ---


def wide_tokenizer(width: int) -> Any:
    """Tokens of `width` characters each, whatever they are."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(rf"[\s\S]{{1,{width}}}"), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=core)


def record(response: str, *sections: tuple[str, int, int], problem: str = "") -> Record:
    return make_record(problem, response, sections, "x_0")


def wide(rec: Record, width: int = 3, prompt: str = "{problem}", support: str = "response", unlabelled: str = "ignore"):
    """The codes of `backtracking` and `deduction` and the support of tokens of `width` characters."""
    chain = tokenize(rec, wide_tokenizer(width), LABELS, TextOptions(prompt, support, unlabelled))
    assert chain.codes.dtype == torch.int8 and chain.support.dtype == torch.bool and chain.ids.dtype == torch.int64
    assert len(chain.ids) == len(chain.codes) == len(chain.support)
    return chain.codes[:, 0].tolist(), chain.codes[:, 1].tolist(), chain.support.tolist()


U, N, Y, S = UNKNOWN, OUTSIDE, INSIDE, ONSET  # unknown, no, yes, start
B, D, X = "backtracking", "deduction", "initializing"
BORDERS = {  # response, sections, codes of backtracking, codes of deduction; tokens are abc def ghi jkl
    "on the border": ("abcdefghijkl", [(B, 0, 6), (D, 6, 12)], [S, Y, N, N], [N, N, S, Y]),
    "straddling belongs to the later": ("abcdefghijkl", [(B, 0, 4), (D, 4, 12)], [S, N, N, N], [N, S, Y, Y]),
    "just before the next": ("abcdefghijkl", [(B, 0, 5), (D, 5, 12)], [S, N, N, N], [N, S, Y, Y]),
    "within one token": ("abcdefghijkl", [(D, 0, 3), (B, 3, 4), (D, 4, 12)], [N, N, N, N], [S, S, Y, Y]),
    "same label twice": ("abcdefghijkl", [(B, 0, 6), (B, 6, 12)], [S, Y, S, Y], [N, N, N, N]),
    "label not asked for": ("abcdefghijkl", [(B, 0, 3), (X, 3, 9), (B, 9, 12)], [S, N, N, S], [N, N, N, N]),
    "unlabelled": ("abcdefghijkl", [(B, 0, 3), (D, 9, 12)], [S, U, U, N], [N, U, U, S]),
    "into unlabelled": ("abcdefghijkl", [(B, 0, 5)], [S, U, U, U], [N, U, U, U]),
    "space ends a token": ("ab cd efghij", [(B, 0, 2), (D, 3, 12)], [S, N, N, N], [N, S, Y, Y]),
    "only space": ("abc   def", [(B, 0, 3), (D, 5, 9)], [S, N, N], [N, S, Y]),
    "only space, unlabelled": ("abc   def", [(B, 0, 3), (D, 6, 9)], [S, U, N], [N, U, S]),
    "both labels": ("abcdefghijkl", [(B, 0, 6), (D, 0, 6), (D, 6, 12)], [S, Y, N, N], [S, Y, S, Y]),
    "a label inside the other": ("abcdefghijkl", [(D, 0, 12), (B, 3, 6)], [N, S, N, N], [S, Y, Y, Y]),
    "with a label not asked for": ("abcdefghijkl", [(X, 0, 6), (B, 0, 6)], [S, Y, U, U], [N, N, U, U]),
    "both labels, unlabelled behind": ("abcdefghijkl", [(B, 0, 5), (D, 0, 5)], [S, U, U, U], [S, U, U, U]),
    "short last": ("abcd", [(B, 3, 4)], [U, S], [U, N]),
}


@pytest.mark.parametrize("name", BORDERS)
def test_token_borders(name):
    response, sections, backtracking, deduction = BORDERS[name]
    codes = wide(record(response, *sections))
    assert codes == (backtracking, deduction, [True] * len(backtracking))


@pytest.mark.parametrize("name", BORDERS)
def test_unlabelled_text_as_negative(name):
    response, sections, backtracking, deduction = BORDERS[name]
    codes = wide(record(response, *sections), unlabelled="negative")
    expected = tuple([OUTSIDE if code == UNKNOWN else code for code in codes] for codes in (backtracking, deduction))
    assert codes == (*expected, [True] * len(backtracking))


@pytest.mark.parametrize("unlabelled", ["ignore", "negative"])
def test_support(unlabelled):
    """Tokens PPP, PPr, res: the one that ends in the response is the response's."""
    rec = record("rest", (B, 0, 4), problem="PPPPP")
    assert wide(rec, support="response", unlabelled=unlabelled) == ([U, S, Y], [U, N, N], [False, True, True])
    assert wide(rec, support="all", unlabelled=unlabelled) == ([N, S, Y], [N, N, N], [True, True, True])


@pytest.mark.parametrize("prompt", ["{problem}\n\n", "Q: {problem} A: {", "{problem}{problem}", ""])
def test_prompt_is_text_before_the_response(tokenizer, prompt):
    rec = record("wait no.", (B, 0, 8), problem="which box {x}?")
    assert format_prompt(rec.problem, prompt, tokenizer) == prompt.replace("{problem}", rec.problem)
    chain = tokenize(rec, tokenizer, LABELS, TextOptions(prompt, "response", "ignore"))
    assert tokenizer.decode(chain.ids[1:]) == prompt.replace("{problem}", rec.problem) + rec.response
    assert tokenizer.decode(chain.ids[chain.support]).strip() == rec.response


def test_chat_without_a_template(tokenizer):
    with pytest.raises(InputError, match="no chat template"):
        format_prompt("which?", "chat", tokenizer)


BOS = {  # the tokenizer, the prompt, the ids of BOS in front
    "added by the tokenizer": ({}, "{problem}\n\n", [0]),
    "not added by the tokenizer": ({"adds": "$A"}, "{problem}\n\n", [0]),
    "added by the chat template": ({"chat_template": CHAT}, "chat", [0]),
    "added by neither": ({"chat_template": CHAT.replace("{{ bos_token }}", "")}, "chat", [0]),
    "written into the prompt, too": ({}, "<s>{problem}\n\n", [0]),
    "written twice": ({}, "<s><s>{problem}\n\n", [0]),
    "no such token": ({"adds": "$A", "bos": False}, "{problem}\n\n", []),
    "EOS behind": ({"adds": "<s> $A </s>"}, "{problem}\n\n", [0]),
}


@pytest.mark.parametrize("name", BOS)
def test_bos_exactly_once(name):
    options, prompt, lead = BOS[name]
    tokenizer = make_tokenizer(**options)
    rec = record("wait no. then box", (B, 0, 8), (D, 8, 17), problem="which box?")
    chain = tokenize(rec, tokenizer, LABELS, TextOptions(prompt, "response", "ignore"))
    assert chain.ids[: len(lead)].tolist() == lead
    assert chain.ids.tolist().count(0) == len(lead)
    head = format_prompt(rec.problem, prompt, tokenizer).replace("<s>", "")
    assert tokenizer.decode(chain.ids, skip_special_tokens=True) == head + rec.response
    assert tokenizer.decode(chain.ids[chain.codes[:, 0] >= INSIDE]) == "wait no."
    special = torch.isin(chain.ids, torch.tensor([0, 1, 2]))
    assert not chain.support[special].any() and (chain.codes[special] == UNKNOWN).all()


@pytest.mark.parametrize("support", ["response", "all"])
@pytest.mark.parametrize("unlabelled", ["ignore", "negative"])
def test_special_tokens_are_never_samples(support, unlabelled):
    tokenizer = make_tokenizer(adds="<s> $A </s>")
    rec = record("wait </s> no <pad>", (B, 0, 18), problem="which <s> box?")
    chain = tokenize(rec, tokenizer, LABELS, TextOptions("{problem}\n\n", support, unlabelled))
    special = torch.isin(chain.ids, torch.tensor([0, 1, 2]))
    assert special.sum() == 5
    assert not chain.support[special].any()
    assert (chain.codes[special] == UNKNOWN).all()
    assert (chain.codes[:, 0] == ONSET).sum() == 1  # the section goes on behind them
    plain = make_tokenizer(adds="$A")("wait")["input_ids"]  # negative control: other tokens of the section are
    assert chain.support[torch.isin(chain.ids, torch.tensor(plain))].any()


def encode(rec: Record, tokenizer: Any, prompt: str) -> tuple[str, Any]:
    """The text of a record and the tokenizer's own view of it."""
    text = prompt.replace("{problem}", rec.problem) + rec.response
    return text, tokenizer(text, return_offsets_mapping=True)


def inked(text: str, spans: Any) -> set[int]:
    """The places of the spans' characters, bar white space."""
    return {i for start, end in spans for i in range(start, end) if not text[i].isspace()}


UNICODE = {
    "task_id": "x_0",
    "problem": "ü?",
    "reasoning_chain": "é漢 🙂 wait 🙂\u200d🙂. then",
    "annotated_chain": '["deduction"]é漢["end-section"] ["backtracking"]🙂 wait 🙂\u200d🙂.["end-section"] then',
}


@pytest.mark.parametrize("prompt", ["{problem}\n\n", ""])
@pytest.mark.parametrize("rows", [make_rows(30, seed=3), [UNICODE]], ids=["words", "several tokens a letter"])
def test_round_trip(tokenizer, prompt, rows):
    """The characters of positive tokens are the section's, bar white space; each section begins once."""
    for row in rows:
        rec = annotated(row, FormatOptions())
        chain = tokenize(rec, tokenizer, LABELS, TextOptions(prompt, "response", "ignore"))
        text, encoded = encode(rec, tokenizer, prompt)
        assert chain.ids.tolist() == encoded["input_ids"]
        offsets = np.array(encoded["offset_mapping"])
        head = len(text) - len(rec.response)
        for c, label in enumerate(LABELS):
            sections = [(head + s.start, head + s.end) for s in rec.sections if s.label == label]
            codes = chain.codes[:, c].numpy()
            assert inked(text, offsets[codes >= INSIDE]) == inked(text, sections)
            assert not inked(text, offsets[codes == OUTSIDE]) & inked(text, sections)
            assert (codes == ONSET).sum() == len(sections)
            if sections and row is not UNICODE:  # negative control: labels that are three tokens late
                assert inked(text, offsets[np.roll(codes, 3) >= INSIDE]) != inked(text, sections)


def test_onset_is_the_token_of_the_first_letter(tokenizer):
    for row in make_rows(20, seed=4):
        rec = annotated(row, FormatOptions())
        sections = [  # without the white space that the annotator put inside the tags
            Section(s.label, s.end - len(rec.response[s.start : s.end].lstrip()), s.end) for s in rec.sections
        ]
        rec = make_record(rec.problem, rec.response, sections)
        chain = tokenize(rec, tokenizer, LABELS, TextOptions("{problem}\n\n", "response", "ignore"))
        text, encoded = encode(rec, tokenizer, "{problem}\n\n")
        head = len(text) - len(rec.response)
        for c, label in enumerate(LABELS):
            first = [head + s.start for s in rec.sections if s.label == label]
            onsets = (chain.codes[:, c] == ONSET).nonzero()[:, 0].tolist()
            assert len(onsets) == len(first)
            for t, letter in zip(onsets, first, strict=True):
                start, end = encoded["offset_mapping"][t]
                assert start <= letter < end


# --- all rows ---


def row_of(problem: object, response: object, annotated: object) -> dict[str, object]:
    return dict(zip(FIELDS, ("x_0", problem, response, annotated), strict=True))


def test_load_chains_uses_every_row_of_a_clean_file(tokenizer):
    rows = make_rows(50, seed=5)
    splits, counts = load_chains(rows, tokenizer, LABELS, 512)
    assert {name: len(chains) for name, chains in splits.items()} == {"train": 36, "validation": 4, "test": 10}
    assert counts.as_dict() | {"labels": 0, "label_chains": 0, "characters": 0, "labelled_characters": 0} == {
        "read": 50,
        "used": 50,
        "unnamed": {},
        "repaired": 0,
        "edited_sections": 0,
        "lost_sections": 0,
        "unbalanced_tags": 0,
        "without_sections": 0,
        "without_problem": 0,
        "markers": {},
        "refused": {},
        "labels": 0,
        "label_chains": 0,
        "strange_tags": {},
        "missing_spans": {},
        "characters": 0,
        "labelled_characters": 0,
    }
    assert counts.labels["backtracking"] == sum(r["annotated_chain"].count('["backtracking"]') for r in rows)
    assert counts.characters == sum(len(r["reasoning_chain"]) for r in rows)
    where = split_chains([r["problem"] for r in rows])
    for name, chains in splits.items():
        assert [c.id for c in chains] == [r["task_id"] for r, w in zip(rows, where, strict=True) if w == name]


def test_load_chains_counts_what_it_refuses(tokenizer):
    """Bad rows in the places of train and validation rows move no other chain, and each is counted once."""
    rows: list[dict[str, Any]] = [dict(r) for r in make_rows(50, seed=5)]
    order = np.random.RandomState(42).permutation(50)
    bad = {
        "with a field that is missing or not text": [
            ("p1", None, "x"),
            ("p2", "x", 3),
            (4, "x", '["deduction"]x["end-section"]'),
        ],
        "with an empty response": [("p5", " \n", "x"), ("p6", "", "")],
        "without a section": [("p7", "one two", "one two")],
        "longer than the model's context of 300 tokens": [("p8", *["box " * 400] * 2), ("p9", *["box " * 300] * 2)],
        "with a problem of the test split": [(rows[order[3]]["problem"], "box", '["deduction"]box["end-section"]')],
    }
    place = iter(order[10:])
    for reason, values in bad.items():
        for problem, response, copy in values:
            if reason.startswith("longer"):
                copy = f'["deduction"]{copy}["end-section"]'
            rows[next(place)] = row_of(problem, response, copy)
    edited = next(place)
    rows[edited]["annotated_chain"] = rows[edited]["annotated_chain"].replace(".", ", so.", 1)
    unbalanced = next(place)
    rows[unbalanced]["annotated_chain"] = rows[unbalanced]["annotated_chain"].removesuffix('["end-section"]')
    by_chain = Division(by="chain")
    splits, counts = load_chains(rows, tokenizer, LABELS, 300, division=by_chain)
    assert {reason: len(ids) for reason, ids in counts.refused.items()} == {
        reason: len(values) for reason, values in bad.items()
    }
    assert counts.read == 50 and counts.used == 50 - counts.n_refused == 50 - sum(map(len, counts.refused.values()))
    assert sum(map(len, splits.values())) == counts.used
    assert (counts.repaired, counts.edited_sections, counts.unbalanced_tags, counts.lost_sections) == (2, 1, 1, 0)
    clean = load_chains(make_rows(50, seed=5), tokenizer, LABELS, 300, division=by_chain)[0]
    assert [c.id for c in splits["test"]] == [c.id for c in clean["test"]]
    for name in splits:
        assert {c.id for c in splits[name]} <= {c.id for c in clean[name]}


def test_a_section_of_two_labels_counts_for_each_and_its_characters_once(tokenizer):
    rows = [row_of("which?", "one two. three.", '["a"]["b"]one two.["end-section"] ["a"]three.["end-section"]')]
    splits, counts = load_chains(rows, tokenizer, ["a", "b"], 512)
    assert counts.labels == {"a": 2, "b": 1} and counts.label_chains == {"a": 1, "b": 1}
    assert (counts.labelled_characters, counts.characters, counts.repaired) == (14, 15, 0)
    (chain,) = splits["train"]
    text = [tokenizer.decode(chain.ids[chain.codes[:, c] >= INSIDE]) for c in range(2)]
    assert text == ["one two. three.", "one two."]
    assert [(chain.codes[:, c] == ONSET).sum() for c in range(2)] == [2, 1]


def test_labels_take_their_names_from_the_options(tokenizer):
    rows = make_rows(30, seed=5)
    for row in rows[::2]:
        row["annotated_chain"] = row["annotated_chain"].replace('["backtracking"]', '["5. Backtracking"]')
    plain = fingerprint(load_chains(make_rows(30, seed=5), tokenizer, LABELS, 512)[0])
    assert fingerprint(load_chains(rows, tokenizer, LABELS, 512)[0]) != plain  # negative control
    for response in ("original", "rejoined"):
        names = {"5. Backtracking": "backtracking"}
        fields = FormatOptions(rejoined=response == "rejoined", label_names=names)
        splits, counts = load_chains(rows, tokenizer, LABELS, 512, fields=fields)
        assert set(counts.labels) == {"backtracking", "deduction", "initializing"}
        assert response == "rejoined" or fingerprint(splits) == plain
    with pytest.raises(InputError, match="no tag names 'Backtracking'"):
        load_chains(rows, tokenizer, LABELS, 512, fields=FormatOptions(label_names={"Backtracking": "backtracking"}))


def test_tags_that_are_not_understood_are_counted(tokenizer):
    rows: list[dict[str, Any]] = [dict(r) for r in make_rows(30, seed=5)]
    rows[0]["annotated_chain"] = rows[0]["annotated_chain"].replace('["deduction"]', "<deduction>", 1)
    rows[1]["annotated_chain"] = "<deduction>" + rows[1]["reasoning_chain"]
    counts = load_chains(rows, tokenizer, LABELS, 512)[1]
    assert counts.strange_tags == {"<deduction>": 1} and counts.repaired == 1
    assert counts.refused == {"whose tags are all of a form that is not understood, such as <deduction>": ["beta_0"]}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("seconds", "terminal", "shown"), [(0.8, True, True), (0.0, True, False), (0.8, False, False)])
def test_progress_is_shown_on_a_terminal_after_two_seconds(tokenizer, monkeypatch, seconds, terminal, shown):
    output = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr("sys.stderr", output)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("streamprobe.data.sources.tqdm", partial(tqdm, file=output, mininterval=0))
    monkeypatch.setattr("streamprobe.data.formats.annotate", lambda *given: (time.sleep(seconds), annotate(*given))[1])
    load_chains(make_rows(4, seed=5), tokenizer, LABELS, 512)
    assert ("align" in output.getvalue()) == shown


def test_context_is_counted_in_tokens(tokenizer):
    rows = make_rows(1, seed=6)
    length = len(load_chains(rows, tokenizer, LABELS, 10_000)[0]["train"][0].ids)
    assert load_chains(rows, tokenizer, LABELS, length)[1].used == 1
    assert load_chains(rows, tokenizer, LABELS, length - 1)[1].used == 0


def test_fingerprint_sees_every_change(tokenizer):
    def load() -> dict[str, list[Any]]:
        return load_chains(make_rows(20, seed=6), tokenizer, LABELS, 512)[0]

    first = fingerprint(load())
    assert fingerprint(load()) == first
    for name in ("ids", "codes", "support"):
        splits = load()
        tensor = getattr(splits["test"][0], name)
        tensor[-1] = ~tensor[-1] if name == "support" else tensor[-1] + 1
        assert fingerprint(splits) != first
    moved = load()
    moved["train"].append(moved["test"].pop())
    assert fingerprint(moved) != first


def test_repaired_chains_are_used_chains(tokenizer):
    row = make_rows(1, seed=6)[0]
    row["annotated_chain"] = row["annotated_chain"].replace(".", ", so.", 1)
    counts = load_chains([row], tokenizer, LABELS, 10)[1]
    assert counts.used == 0 and counts.repaired == 0 and not counts.labels


def test_a_lone_surrogate_is_refused(tokenizer):
    rows: list[dict[str, Any]] = [dict(r) for r in make_rows(30)]
    rows[3]["reasoning_chain"] += "\ud83d"
    refused = load_chains(rows, tokenizer, LABELS, 512)[1].refused
    assert refused == {"with text that is not Unicode": [rows[3]["task_id"]]}
    rows = [dict(r) for r in make_rows(30)]
    rows[3]["annotated_chain"] = rows[3]["annotated_chain"].replace(".", "\ud83d.", 1)
    refused = [
        load_chains(rows, tokenizer, LABELS, 512, fields=FormatOptions(rejoined=kind == "rejoined"))[1].refused
        for kind in ("original", "rejoined")
    ]
    assert refused == [{}, {"with text that is not Unicode": [rows[3]["task_id"]]}]


# --- the original experiment's way of reading, for comparison ---


def original_reading(tokenizer: Any, row: dict[str, str], head: str) -> tuple[list[int], list[int]]:
    """Token ids, and 1 for those in a backtracking section: each section stripped, and tokenised by itself."""
    ids = tokenizer.encode(head, add_special_tokens=False)
    marks = [0] * len(ids)
    for number, tagged in enumerate(row["annotated_chain"].split('["end-section"]')[:-1]):
        label, text = tagged.split('["', 1)[1].split('"]', 1)
        piece = tokenizer.encode(" " * (number > 0) + text.strip(), add_special_tokens=False)
        ids += piece
        marks += [int(label == "backtracking")] * len(piece)
    return ids, marks


def test_rejoined_without_bos_and_with_the_problem_is_the_originals_text(tokenizer):
    text = TextOptions("User: {problem}\n\nAssistant:", "all", "negative", bos=False)
    rows = make_rows(20, seed=9)
    splits, counts = load_chains(rows, tokenizer, ["backtracking"], 512, fields=FormatOptions(rejoined=True), text=text)
    chains = {chain.id: chain for split in splits.values() for chain in split}
    assert len(chains) == 20 and counts.used == 20
    plain = load_chains(rows, tokenizer, ["backtracking"], 512)[0]
    differ = 0
    for row in rows:
        chain = chains[row["task_id"]]
        ids, marks = original_reading(tokenizer, row, f"User: {row['problem']}\n\nAssistant:")
        assert chain.ids.tolist() == ids
        assert (chain.codes[:, 0] >= INSIDE).int().tolist() == marks and chain.support.all()
        differ += ids not in [c.ids.tolist() for split in plain.values() for c in split]
    assert differ == 20  # negative control


def test_the_response_begins_behind_the_prompt(tokenizer):
    for support in ("response", "all"):
        rec = make_record("A puzzle", "okay then.", [("deduction", 0, 10)])
        chain = tokenize(rec, tokenizer, LABELS, TextOptions("{problem}\n\n", support, "ignore"))
        assert tokenizer.decode(chain.ids[chain.start :]) == "okay then."
        assert tokenizer.decode(chain.ids[: chain.start]).endswith("A puzzle\n\n")


@pytest.mark.parametrize(
    ("id", "category"),
    [("causal_12", "causal"), ("math_logic_0", "math_logic"), ("a-3", "a"), ("b", "b"), ("17", ""), ("x2y", "x2y")],
)
def test_the_category_is_the_id_without_its_number(id, category):
    assert category_of(id) == category


def test_whole_categories_are_held_out(tokenizer):
    rows = make_rows(40, seed=6)
    division = Division(test_categories=["beta", "delta"])
    splits, _ = load_chains(rows, tokenizer, LABELS, 512, division=division)
    assert {c.category for c in splits["test"]} == {"beta", "delta"} and len(splits["test"]) == 20
    assert {c.category for c in (*splits["train"], *splits["validation"])} == {"alpha", "gamma"}
    assert len(splits["validation"]) == 2
    mixed = load_chains(rows, tokenizer, LABELS, 512)[0]  # negative control
    assert len({c.category for c in mixed["test"]} & {c.category for c in mixed["train"]}) > 1
    with pytest.raises(InputError, match="test_categories omega, which no chain has; expected of alpha, beta"):
        load_chains(rows, tokenizer, LABELS, 512, division=Division(test_categories=["omega"]))


def test_categories_by_column(tokenizer):
    rows = [row | {"kind": "even" if i % 2 == 0 else "odd"} for i, row in enumerate(make_rows(20, seed=6))]
    division = Division(test_categories=["odd"])
    splits, _ = load_chains(rows, tokenizer, LABELS, 512, division=division, fields=FormatOptions(category="kind"))
    assert {c.id for c in splits["test"]} == {row["task_id"] for row in rows if row["kind"] == "odd"}


def test_validation_may_be_the_test_chains(tokenizer):
    rows = make_rows(30, seed=6)
    plain = load_chains(rows, tokenizer, LABELS, 512)[0]
    splits, _ = load_chains(rows, tokenizer, LABELS, 512, division=Division(validate_on_test=True))
    assert splits["validation"] is splits["test"]
    assert [c.id for c in splits["test"]] == [c.id for c in plain["test"]]
    assert len(splits["train"]) == len(plain["train"]) + len(plain["validation"])


def test_a_name_may_be_missing_from_some_rows_of_the_data_only(tokenizer):
    rows, fields = make_rows(20), FormatOptions(label_names={"5. backtracking": "backtracking"})
    assert load_chains(rows, tokenizer, LABELS, 512, fields=fields, most=10)[1].used == 10
    with pytest.raises(InputError, match="no tag names '5. backtracking'"):  # negative control
        load_chains(rows, tokenizer, LABELS, 512, fields=fields)


# --- the labels whose sections a joint control is given ---


def labelled(*labels: str, problem: str = "why?") -> Record:
    """A record with a section of a word for each label."""
    text = "so " * len(labels)
    return make_record(problem, text, [(label, 3 * i, 3 * i + 2) for i, label in enumerate(labels)])


def test_section_labels_are_the_probed_ones_and_then_those_of_most_records():
    records = [labelled("c", "c", "c"), labelled("b", "a"), labelled("b", "c"), Refused("why", id="x"), labelled("d")]
    assert choose_section_labels(records, ["d"]) == ["d", "b", "c", "a"], "of records, not of sections"
    assert choose_section_labels(records, ["never", "c"]) == ["never", "c", "b", "a", "d"]
    named = [replace(record, annotation=Annotation([])) for record in records[:1]]
    assert choose_section_labels([*named, Refused("why")], ["c"]) == ["c"]


def test_at_most_so_many_are_taken_and_the_others_are_named(tokenizer):
    names = [f"label {i:02}" for i in range(20)]
    records = [labelled(*names[: 20 - i], problem=f"why {i}?") for i in range(6)]
    dataset = make_dataset(records, tokenizer, [names[19]], context=512, division=Division(validate_on_test=True))
    assert dataset.section_labels == [names[19], *names[:15]] and len(dataset.section_labels) == MOST_SECTION_LABELS
    assert all(chain.sections.shape == (len(chain.ids), 16) for chain in dataset.chains())
    lines = [line for line in preflight.describe_chains(dataset, [names[19]]) if line.startswith("joint ")]
    assert lines == [
        "joint     the sections of 16 labels are given to this control, but not label 15, label 16, label 17, label 18"
    ]
    few = make_dataset(records, tokenizer, names[:3], context=512, section_labels=names)
    assert list(few.section_labels) == names
    assert not [line for line in preflight.describe_chains(few, names[:3]) if line.startswith("joint ")]


def test_the_labels_do_not_depend_on_which_chains_are_bad(tokenizer):
    rows = [labelled("a"), labelled("b"), labelled("b"), labelled("a", problem="else")]
    records = [replace(row, row=i) for i, row in enumerate(rows)]
    plain, skipped = (make_dataset(records, tokenizer, ["c"], context=512, bad=bad) for bad in ((), {1, 2}))
    assert plain.section_labels == skipped.section_labels == ["c", "a", "b"]


def test_the_fingerprint_is_of_sections_and_sentence_ends_too(tokenizer):
    chain = tokenize(labelled("a", "b"), tokenizer, ["a"], section_labels=["a", "b"])
    prints = {fingerprint({"train": [chain]})}
    for name in ("sections", "sentence_end", "codes", "support", "ids"):
        changed = getattr(chain, name).clone()
        changed[-1] = 1 - changed[-1].int()
        prints.add(fingerprint({"train": [replace(chain, **{name: changed})]}))
    assert len(prints) == 6 and fingerprint({"train": [replace(chain)]}) in prints
