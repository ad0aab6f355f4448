"""White space is text: every token of a response is a sample and carries its section's label, whatever the tokenizer.

The labels are checked by walking the text with the bytes of the tokens, not with the tokenizer's offsets.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from builders import make_letters_core, make_record, make_rows
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from streamprobe.data.annotations import Section
from streamprobe.data.prompts import encode
from streamprobe.data.records import Record
from streamprobe.data.tokenize import TextOptions, tokenize
from streamprobe.errors import InputError
from streamprobe.lags import INSIDE, ONSET, OUTSIDE, UNKNOWN
from streamprobe.model.tokenizer import keep_white_space, load_tokenizer

CLASSES = ("GPT2Tokenizer", "Qwen2Tokenizer", "LlamaTokenizer", "CohereTokenizer", "PreTrainedTokenizerFast")
PIECES = [  # label and text of the sections, between which some text has no label
    ("deduction", "So we write\n\n    def f(x):\n        if x > 1:\n            return x  \n"),
    ("", "\n\n  "),
    ("backtracking", "    Wait 🙂 no,\t that is 漢字 wrong. 🙂🙂\n\n\n"),
    ("deduction", "        # é 🙂 and\n\t\tdone"),
    ("backtracking", "\n \n"),
    ("", "  the end 🙂 \n "),
]
LABELS = ["backtracking", "deduction"]
RAW = TextOptions("{problem}", "response", "ignore", bos=False)


def pieces_as_record(problem: str = "why?\n") -> Record:
    """The pieces as one response."""
    response, sections = "", []
    for label, text in PIECES:
        if label:
            sections.append(Section(label, len(response), len(response) + len(text)))
        response += text
    return make_record(problem, response, sections, "x_0")


def byte_level(post: Any) -> Tokenizer:
    """A byte-level BPE tokenizer with this post-processor, which has learned some words and some indentation."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    texts = [row["reasoning_chain"] for row in make_rows(10, seed=1)] + [text for _, text in PIECES[:2]] * 5
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(texts, trainer)
    core.post_processor = post
    return core


def save(core: Tokenizer, kind: str, folder: Path) -> str:
    """A model's folder with the tokenizer alone."""
    core.save(str(folder / "tokenizer.json"))
    about = {"tokenizer_class": kind, "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return str(folder)


def byte_table() -> dict[str, int]:
    """The letter that stands for each byte in a byte-level vocabulary, as GPT-2 has it."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [b for b in range(256) if b not in visible]
    return {chr(b): b for b in visible} | {chr(256 + i): b for i, b in enumerate(hidden)}


def walk(pieces: list[bytes], text: str) -> list[tuple[int, int]]:
    """The characters of which each token holds a byte, first to last and one more; the bytes must be the text's."""
    assert b"".join(pieces) == text.encode()
    of_byte = [i for i, c in enumerate(text) for _ in c.encode()]
    spans, at = [], 0
    for piece in pieces:
        spans.append((of_byte[at], of_byte[at + len(piece) - 1] + 1))
        at += len(piece)
    return spans


def expected_codes(record: Record, head: int, spans: list[tuple[int, int]]) -> list[list[int]]:
    """The code of every token and label: that of the section of its last letter, or of its last blank."""
    text = " " * head + record.response
    codes, before = [], None
    for start, end in spans:
        letters = [i for i in range(start, end) if not text[i].isspace()] or [end - 1]
        here = next((s for s in record.sections if s.start <= letters[-1] - head < s.end), None)
        own = ONSET if here is not before else INSIDE
        codes.append([UNKNOWN if here is None else own if here.label == label else OUTSIDE for label in LABELS])
        before = here or before
    return codes


def check(tokenizer: Any, pieces: Any, record: Record | None = None) -> None:
    """Every token behind the BOS one is a sample with the label that walking says; `pieces` gives bytes of tokens."""
    record = record or pieces_as_record()
    chain = tokenize(record, tokenizer, LABELS, TextOptions("{problem}", "response", "ignore"))
    spans = walk(pieces(tokenizer.convert_ids_to_tokens(chain.ids[1:].tolist())), record.problem + record.response)
    head = len(record.problem)
    first = 1 + next(i for i, (_, end) in enumerate(spans) if end > head)
    assert chain.start == first and chain.support.tolist() == [False] * first + [True] * (len(chain.ids) - first)
    assert chain.codes[first:].tolist() == expected_codes(record, head, spans[first - 1 :])


def byte_pieces(tokens: list[str]) -> list[bytes]:
    table = byte_table()
    return [bytes(table[letter] for letter in token) for token in tokens]


@pytest.mark.parametrize("kind", CLASSES)
def test_white_space_tokens_are_samples_and_carry_their_sections_label(tmp_path, kind):
    folder = save(byte_level(processors.ByteLevel(trim_offsets=True)), kind, tmp_path)
    tokenizer = load_tokenizer(folder)
    check(tokenizer, byte_pieces)
    plain = AutoTokenizer.from_pretrained(folder)
    text = pieces_as_record().response
    assert tokenizer(text)["input_ids"] == plain(text)["input_ids"]


@pytest.mark.parametrize("kind", CLASSES)
def test_labels_of_white_space_fails_without_its_offsets(tmp_path, kind):
    """The tokenizer as it is loaded without further ado leaves a tenth of the tokens out."""
    tokenizer = AutoTokenizer.from_pretrained(save(byte_level(processors.ByteLevel(trim_offsets=True)), kind, tmp_path))
    with pytest.raises(AssertionError):
        check(tokenizer, byte_pieces)
    chain = tokenize(pieces_as_record(), tokenizer, LABELS, TextOptions("{problem}", "response", "ignore"))
    assert (~chain.support[chain.start :]).float().mean() > 0.1


POST = {
    "none": None,
    "byte level": processors.ByteLevel(trim_offsets=True),
    "byte level, not trimmed": processors.ByteLevel(trim_offsets=False),
    "with a BOS token": processors.Sequence(
        [processors.ByteLevel(), processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])]
    ),
    "Roberta's": processors.RobertaProcessing(("</s>", 1), ("<s>", 0), trim_offsets=True, add_prefix_space=False),
}


@pytest.mark.parametrize("name", POST)
def test_white_space_has_offsets_and_the_ids_stay(name):
    core = byte_level(POST[name]) if POST[name] else byte_level(processors.ByteLevel(trim_offsets=False))
    text = pieces_as_record().response
    before = core.encode(text)
    keep_white_space(core)
    after = core.encode(text)
    assert after.ids == before.ids and after.special_tokens_mask == before.special_tokens_mask
    real = [i for i, added in enumerate(after.special_tokens_mask) if not added]
    spans = walk(byte_pieces([after.tokens[i] for i in real]), text)
    assert [after.offsets[i] for i in real] == spans
    assert len(before.ids) - len(real) == {"with a BOS token": 1, "Roberta's": 2}.get(name, 0)


@pytest.mark.parametrize("pad", ["<pad>", "<unk>"])
def test_tokens_of_unknown_letters_are_text_unless_they_are_special_otherwise(tmp_path, pad):
    core = Tokenizer(models.WordLevel({"<unk>": 0, "<pad>": 1, "wait": 2, "no": 3, "so": 4}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.add_special_tokens(["<unk>", "<pad>"])
    folder = save(core, "PreTrainedTokenizerFast", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"unk_token": "<unk>", "pad_token": pad}))
    record = make_record("so", "so 🙂 wait <pad> no", [("deduction", 0, 2), ("backtracking", 3, 18)])
    chain = tokenize(record, load_tokenizer(folder), LABELS, TextOptions("{problem} ", "response", "ignore"))
    assert chain.ids.tolist() == [4, 4, 0, 2, 1, 3]
    text = pad == "<pad>"  # else it stands for no text, and <pad> is a word
    assert chain.support.tolist() == [False, True, text, True, not text, True]
    assert chain.codes[2:4, 0].tolist() == ([ONSET, INSIDE] if text else [UNKNOWN, ONSET])


FILES = {
    "a list": ("tokenizer.json", "[]"),
    "another kind of model": ("tokenizer.json", '{"version": "1.0", "added_tokens": [], "model": {"type": "X"}}'),
    "a config that is a list": ("tokenizer_config.json", "[]"),
    "a BOS token that is a number": ("tokenizer_config.json", '{"bos_token": 5}'),
    "a list of templates that are none": ("tokenizer_config.json", '{"chat_template": [1, 2]}'),
}


@pytest.mark.parametrize("name", FILES)
def test_a_tokenizer_that_cannot_be_read_is_reported_in_one_line(tmp_path, name):
    folder = save(byte_level(processors.ByteLevel()), "PreTrainedTokenizerFast", tmp_path)
    load_tokenizer(folder)  # negative control
    file, content = FILES[name]
    (tmp_path / file).write_text(content)
    with pytest.raises(InputError, match="a tokenizer that cannot be read") as error:
        load_tokenizer(folder)
    assert "\n" not in str(error.value)


def fallback_pieces(tokens: list[str]) -> list[bytes]:
    """The bytes of the tokens; the `▁` in front of the text is no text."""
    assert tokens[0] == "▁"
    found = [
        bytes([int(token[3:5], 16)]) if token.startswith("<0x") else token.replace("▁", " ").encode()
        for token in tokens[1:]
    ]
    return found


@pytest.mark.parametrize("model", ["bpe", "unigram"])
def test_bytes_of_unknown_letters_carry_the_label_of_their_own_letter(tmp_path, model):
    """Sections that end within a run of unknown letters, and of unknown white space."""
    tokenizer = load_tokenizer(save(make_letters_core(model), "PreTrainedTokenizerFast", tmp_path))
    response = "so 🙂漢🙂 wait\n\n\tno"
    record = make_record("why.\n", response, [("deduction", 0, 4), ("backtracking", 4, 12)])
    tokens = tokenizer.convert_ids_to_tokens(
        tokenizer(record.problem + response, add_special_tokens=False)["input_ids"]
    )
    spans = walk(fallback_pieces(tokens), record.problem + response)
    ids, offsets = encode(record.problem + response, "{problem}", tokenizer, False)
    assert offsets[1:] == spans and offsets[0] == (0, 1)
    chain = tokenize(record, tokenizer, LABELS, TextOptions("{problem}", "response", "ignore"))
    head = len(record.problem)
    first = next(i for i, (_, end) in enumerate(spans) if end > head)
    assert chain.codes[chain.start :].tolist() == expected_codes(record, head, spans[first:])
    if model == "unigram":  # the negative control: the tokenizer's own offsets
        raw = tokenizer(record.problem + response, add_special_tokens=False, return_offsets_mapping=True)
        assert raw["offset_mapping"][1:] != spans


# --- where a sentence ends ---

ENDING = (
    "So. We 3.5! ok?\n\nWait 🙂。 漢字！ next？ half．and｡ no… one. \n  two \n three\r\n four.\tfive 🙂\u2028six.\n",
    "why? 🙂。\nbecause! ",
)


def ends_by_loop(text: str, spans: list[tuple[int, int]]) -> list[bool]:
    """Whether a sentence or line ends in each token, which holds the last byte of whatever ends it."""
    found = []
    for i, (start, end) in enumerate(spans):
        following = spans[i + 1][0] if i + 1 < len(spans) else len(text)
        whole = [c for c in range(start, end) if c < following]  # letters whose last byte is in this token
        letters = [c for c in range(start, end) if not text[c].isspace()]
        ends = bool(letters) and letters[-1] in whole and text[letters[-1]] in ".!?。．｡！？"
        found.append(ends or any(text[c] in "\n\r\u2028" for c in whole))
    return found


def test_sentences_end_at_the_last_byte_of_a_sign_or_a_line_end() -> None:
    """In latin and in CJK text, with letters of several tokens; problem and response alike."""
    response, problem = ENDING
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level(None))
    text, letters = problem + response, byte_table()
    chain = tokenize(make_record(problem, response, [("deduction", 0, 3)]), tokenizer, LABELS, RAW)
    tokens = tokenizer.convert_ids_to_tokens(chain.ids.tolist())
    spans = walk([bytes(letters[letter] for letter in token) for token in tokens], text)
    assert chain.sentence_end.tolist() == ends_by_loop(text, spans)
    assert len([span for span in spans if spans.count(span) > 1]) > 10, "letters of several tokens"
    assert 20 < chain.sentence_end.sum() < len(tokens) / 3
    early = [start for start, end in spans if text[end - 1] in "。！？"]  # negative control: their first bytes
    assert len(early) > sum(chain.sentence_end[i] and text[spans[i][1] - 1] in "。！？" for i in range(len(spans)))


def test_special_tokens_end_no_sentence_and_text_without_a_sign_has_none() -> None:
    core = byte_level(processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
    chain = tokenize(make_record("why", "so it is", [("deduction", 0, 3)]), tokenizer, LABELS, RAW)
    assert not chain.sentence_end.any() and len(chain.sentence_end) == len(chain.ids)
    ended = tokenize(make_record("why", "so it is.", [("deduction", 0, 3)]), tokenizer, LABELS, RAW)
    assert ended.sentence_end.sum() == 1 and not ended.sentence_end[ended.ids < 2].any()


def test_sections_are_the_codes_of_their_labels_whichever_are_probed() -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level(None))
    record = pieces_as_record()
    both = tokenize(record, tokenizer, LABELS, RAW)
    for labels in (LABELS, LABELS[:1], []):
        for known in (LABELS, LABELS[::-1], [*LABELS, "never"], []):
            chain = tokenize(record, tokenizer, labels, RAW, section_labels=known)
            assert chain.codes.tolist() == both.codes[:, [LABELS.index(name) for name in labels]].tolist()
            never = both.codes[:, 0].where(both.codes[:, 0] == UNKNOWN, OUTSIDE)
            columns = [both.codes[:, LABELS.index(name)] if name in LABELS else never for name in known]
            assert chain.sections.T.tolist() == [column.tolist() for column in columns]
