"""Chats: the assistant's words are found in what the template writes, whatever it makes of them, with their labels."""

from typing import Any

import pytest
from builders import make_letters, make_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from streamprobe.data import chat as chats
from streamprobe.data.detect import FormatQuery, find_format
from streamprobe.data.formats import FORMATS, read_row
from streamprobe.data.label_rules import parse_rule
from streamprobe.data.records import FormatOptions, Record, Refused, Unusable
from streamprobe.data.tokenize import TextOptions, render, tokenize
from streamprobe.errors import InputError
from streamprobe.lags import INSIDE, ONSET, OUTSIDE, UNKNOWN

LABELS = ["a", "b"]
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
TEMPLATES = {
    "chatml": CHATML,
    "trimmed": CHATML.replace("m.content", "m.content | trim"),
    "a system prompt of its own": "{{ bos_token }}[sys]You are assistant.[/sys]" + CHATML,
    "no thoughts of earlier turns": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and not loop.last %}"
        "{{ m.content.split('</think>')[-1].lstrip() }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    ),
    "an empty thought": (  # where there is none: something else for a stand-in than for the text
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and '<think>' not in m.content %}"
        "<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    ),
    "thoughts in a field": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}"
        "\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    ),
    "tools": "{% if tools %}# Tools {{ tools | tojson }}\n{% endif %}" + CHATML,
}
TURNS = [
    {"role": "system", "content": "Be brief. assistant"},
    {"role": "user", "content": "2 + 2 🙂?"},
    {"role": "assistant", "content": "<think>so 漢 wait</think>four"},
    {"role": "user", "content": "four"},
    {"role": "assistant", "content": "user", "spans": [{"start": 0, "end": 2, "label": "a"}]},
]


def tokenizer(template: str | None, kind: str = "byte-level") -> Any:
    return make_tokenizer(adds="$A", chat_template=template) if kind == "byte-level" else make_letters("bpe", template)


def read(row: dict[str, Any], rules: list[str] | None = None) -> Record | Refused:
    options = FormatOptions(rules=[parse_rule(text) for text in rules or []])
    found = find_format([row], "data", FormatQuery(), options)
    assert found.name == "messages"
    return read_row(row, 0, FORMATS[found.name], found.options)


def record_of(row: dict[str, Any], rules: list[str] | None = None) -> Record:
    record = read(row, rules)
    assert isinstance(record, Record), record
    return record


def words(record: Record, tok: Any, options: TextOptions, label: int | None = None) -> str:
    """What the samples say (of a label those inside of it), read off the tokens' characters."""
    rendered, chain = render(record, tok, options), tokenize(record, tok, LABELS, options)
    keep = chain.support if label is None else chain.support & (chain.codes[:, label] >= INSIDE)
    taken = sorted({i for (s, e), k in zip(rendered.offsets, keep.tolist(), strict=True) if k for i in range(s, e)})
    return "".join(rendered.text[i] for i in taken)


@pytest.mark.parametrize("kind", ["byte-level", "letters"])
@pytest.mark.parametrize("template", [name for name in TEMPLATES if "earlier" not in name])
def test_samples_are_what_the_assistant_says(template, kind):
    tok, record = tokenizer(TEMPLATES[template], kind), record_of({"messages": TURNS})
    assert words(record, tok, TextOptions()) == "<think>so 漢 wait</think>fouruser"
    assert words(record, tok, TextOptions(support="last_assistant")) == "user"
    assert words(record, tok, TextOptions(), label=0) == "us"
    whole = words(record, tok, TextOptions(support="all"))
    assert whole.replace("[sys]", "").count("user") == 3 and "2 + 2 🙂?" in whole


def test_the_codes_of_a_chat_by_hand():
    tok = make_letters("bpe", "{% for m in messages %}({{ m.role }}){{ m.content }}{% endfor %}")
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "so wait 🙂", "label": None}]
    record = record_of(
        {"messages": turns, "spans": [{"text": "wait", "label": "a"}, {"start": 8, "end": 9, "label": "b"}]}
    )
    chain = tokenize(record, tok, LABELS)
    n = 1 + 1 + len("(user)hi(assistant)")  # BOS and the ▁ before the text
    assert chain.start == n and not chain.support[:n].any() and (chain.codes[:n] == UNKNOWN).all()
    one = [OUTSIDE] * 3 + [ONSET, INSIDE, INSIDE, INSIDE] + [OUTSIDE] * 5
    other = [OUTSIDE] * 8 + [ONSET, INSIDE, INSIDE, INSIDE]
    assert chain.codes[n:].T.tolist() == [one, other]


QWEN = (  # takes thoughts out of contents, and leaves out those before the last question
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% set ns = namespace(t='', c=m.content) %}"
    "{% if m.reasoning_content %}{% set ns.t = m.reasoning_content %}{% elif '</think>' in m.content %}"
    "{% set ns.t = m.content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{% set ns.c = m.content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if loop.last %}<think>\n{{ ns.t.strip('\n') }}\n</think>\n\n{{ ns.c.lstrip('\n') }}{% else %}{{ ns.c }}{% endif %}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
)


def test_a_template_that_takes_thoughts_apart_leaves_labels_on_their_words():
    first = "<think>\nso 4, wait so\n</think>\n\nso four"
    turns = [
        {"role": "user", "content": "2 + 2?"},
        {
            "role": "assistant",
            "content": first,
            "spans": [{"text": "wait", "label": "a"}, {"text": "four", "label": "b"}],
        },
        {"role": "user", "content": "3 + 3, so?"},
        {
            "role": "assistant",
            "reasoning_content": "so wait",
            "content": "wait so six",
            "spans": [{"text": "so", "label": "b"}],
        },
    ]
    record = record_of({"messages": turns})
    for kind in ("byte-level", "letters"):
        tok = tokenizer(QWEN, kind)
        assert "".join(words(record, tok, TextOptions()).split()) == "sofoursowaitwaitsosix"
        assert (
            words(record, tok, TextOptions(), 0) == ""
            and "".join(words(record, tok, TextOptions(), 1).split()) == "fourso"
        )
        last = record_of({"messages": [turns[0], turns[1]]})
        assert (
            words(last, tok, TextOptions(), 0).strip() == "wait"
            and words(last, tok, TextOptions(region="answer")).strip() == "so four"
        )
        assert words(last, tok, TextOptions(region="think")).split() == ["so", "4,", "wait", "so"]


def test_a_field_that_the_template_ignores_moves_no_other():
    turns = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "reasoning_content": "so four", "content": "four"},
        {"role": "user", "content": "so four?"},
        {"role": "assistant", "content": "so six", "spans": [{"text": "six", "label": "a"}]},
    ]
    record = record_of({"messages": turns})
    assert words(record, tokenizer(CHATML), TextOptions()) == "fourso six"
    assert words(record, tokenizer(CHATML), TextOptions(), 0).strip() == "six"


@pytest.mark.parametrize("written", ["m.content | upper", "m.content | length", "'...'"])
def test_what_the_template_writes_otherwise_has_no_place(written):
    tok = tokenizer(CHATML.replace("m.content", written))
    turns = [{"role": "user", "content": "so 4?"}, {"role": "assistant", "content": "wait, so four"}]
    assert words(record_of({"messages": turns}), tok, TextOptions()) == ""


def test_the_last_turn_is_the_response_and_what_is_before_it_the_prompt():
    tok = make_letters("bpe", "{% for m in messages %}({{ m.role }}){{ m.content }}{% endfor %}")
    turns = [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 2, "abcd", strict=True)]
    record, head = record_of({"messages": turns}), len("(user)a(assistant)b(user)c(assistant)")
    last, every = (tokenize(record, tok, LABELS, TextOptions(support=s)) for s in ("last_assistant", "assistant"))
    assert (last.start, int(last.support.sum())) == (2 + head, 1)
    assert (every.start, int(every.support.sum())) == (2 + len("(user)a(assistant)"), 2)


def test_a_section_that_begins_outside_of_the_region_has_no_first_token_in_it():
    turn = {"role": "assistant", "content": "<think>so</think>four", "spans": [{"start": 7, "end": 19, "label": "a"}]}
    record = record_of({"messages": [{"role": "user", "content": "x"}, turn]})
    chain = tokenize(record, make_letters("bpe", CHATML), LABELS, TextOptions(region="answer"))
    assert chain.codes[chain.support, 0].tolist() == [INSIDE, INSIDE, OUTSIDE, OUTSIDE]
    whole = tokenize(record, make_letters("bpe", CHATML), LABELS)
    assert whole.codes[whole.support, 0].tolist()[6:9] == [OUTSIDE, ONSET, INSIDE]


def test_what_the_template_leaves_out_has_no_place():
    tok, record = tokenizer(TEMPLATES["no thoughts of earlier turns"]), record_of({"messages": TURNS})
    assert words(record, tok, TextOptions()) == "fouruser"
    assert words(record, tok, TextOptions(support="last_assistant")) == "user"


CONTENT = st.text("as userti\n<>/think🙂漢", min_size=1, max_size=12).filter(lambda text: text.strip())


@given(
    st.lists(st.tuples(CONTENT, CONTENT), min_size=1, max_size=3),
    st.sampled_from(sorted(set(TEMPLATES) - {"no thoughts of earlier turns"})),
)
def test_any_words_are_found_between_the_templates_own(pairs, template):
    turns = [
        {"role": role, "content": text}
        for pair in pairs
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    record = record_of({"messages": turns})
    said = words(record, tokenizer(TEMPLATES[template]), TextOptions())
    expected = "".join(text for _, text in pairs)
    assert said.split() == expected.split() or (
        template == "trimmed" and "".join(said.split()) == "".join(expected.split())
    )


def test_words_like_the_templates_fail_without_stand_ins(monkeypatch):
    """Looking for `user` behind the turn before finds the role of the next turn."""
    monkeypatch.setattr(chats, "_between_stand_ins", lambda *_: None)
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "assistant"}]
    rendered = render(record_of({"messages": turns}), tokenizer(CHATML), TextOptions())
    assert rendered.text[rendered.place[0] - 12 : rendered.place[0]] != "<|im_start|>assistant\n"[-12:]


def test_turns_of_other_names_thoughts_and_parts_are_read():
    shared = {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "so wait"}]}
    assert record_of(shared).response == "so wait" and record_of(shared).problem == "hi"
    thought = {
        "role": "assistant",
        "reasoning_content": "hmm no",
        "content": "yes",
        "spans": [{"start": 0, "end": 3, "label": "a"}, {"text": "hmm", "label": "b"}],
    }
    record = record_of({"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}, thought]})
    tok = tokenizer(TEMPLATES["thoughts in a field"])
    assert (
        words(record, tok, TextOptions()) == "hmm noyes" and words(record, tok, TextOptions(region="think")) == "hmm no"
    )
    assert words(record, tok, TextOptions(), 0) == "yes" and words(record, tok, TextOptions(), 1) == ""
    assert words(record, tok, TextOptions(region="answer")) == "yes"


def test_tools_and_calls_go_to_the_template():
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": "{}"}}]}
    turns = [
        {"role": "user", "content": "2?"},
        call,
        {"role": "tool", "content": "4"},
        {"role": "assistant", "content": "4"},
    ]
    record = record_of({"messages": turns, "tools": '[{"name": "add"}]'})
    rendered = render(record, tokenizer(TEMPLATES["tools"]), TextOptions())
    assert (
        rendered.text.startswith('# Tools [{"name": "add"}]') and words(record, tokenizer(CHATML), TextOptions()) == "4"
    )


def test_labels_of_turns_and_of_chats():
    turns = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "one", "label": "a"},
        {"role": "user", "content": "y"},
        {"role": "assistant", "content": "two", "label": False},
    ]
    assert [tuple(s) for s in record_of({"messages": turns}).sections] == [("a", 0, 3)]
    plain = [{name: turn[name] for name in ("role", "content")} for turn in turns]
    assert [tuple(s) for s in record_of({"messages": plain, "label": "b"}).sections] == [("b", 0, 3), ("b", 3, 6)]
    assert [tuple(s) for s in record_of({"messages": plain, "deceptive": True}).sections] == [
        ("deceptive", 0, 3),
        ("deceptive", 3, 6),
    ]
    spans = [{"message": 3, "start": 0, "end": 1, "label": "b"}, {"text": "n", "label": "a"}]
    assert [tuple(s) for s in record_of({"messages": plain, "spans": spans}).sections] == [("a", 1, 2), ("b", 3, 4)]
    assert [tuple(s) for s in record_of({"messages": plain}, ["a=t.+"]).sections] == [("a", 3, 6)]


def test_marks_of_all_fields_of_a_turn_count_and_text_is_looked_for_in_contents():
    turn = {"role": "assistant", "reasoning_content": "wait wait", "content": "so wait", "spans": [], "label": "lie"}
    chat = [{"role": "user", "content": "x"}, turn]
    assert [tuple(s) for s in record_of({"messages": chat}).sections] == [("lie", 0, 16)]
    found = find_format([{"messages": chat, "label": 1}], "", FormatQuery(), FormatOptions(label_names={"1": "lie"}))
    del turn["label"]
    record = read_row({"messages": chat, "label": 1}, 0, FORMATS["messages"], found.options)
    assert isinstance(record, Record) and [s.label for s in record.sections] == ["lie"]
    spans = [{"text": "wait", "n": 1, "label": "a"}]
    for row in ({"messages": [chat[0], turn | {"spans": spans}]}, {"messages": chat, "spans": spans}):
        assert [tuple(s) for s in record_of(row).sections] == [("a", 12, 16)]


BAD = {
    "no turn of the assistant": ({"messages": TURNS[:2]}, "without a turn of the assistant"),
    "a picture": (
        {"messages": [*TURNS[:1], {"role": "user", "content": [{"type": "image"}]}, *TURNS[2:]]},
        "else than text",
    ),
    "a role that is a number": ({"messages": [{"role": 5, "content": "x"}, *TURNS]}, "without a role"),
    "content that is a number": ({"messages": [{"role": "user", "content": 5}, *TURNS]}, "not text"),
    "a span of no message": (
        {"messages": TURNS, "spans": [{"start": 0, "end": 1, "label": "a"}]},
        "without its message",
    ),
    "a span of the user": (
        {"messages": TURNS, "spans": [{"message": 1, "start": 0, "end": 1, "label": "a"}]},
        "none of the",
    ),
    "nothing said": ({"messages": [*TURNS[:2], {"role": "assistant", "content": ""}]}, "empty response"),
    "tools that are no JSON": ({"messages": TURNS, "tools": "add"}, "no JSON"),
    "tools nested too deeply": ({"messages": TURNS, "tools": "[" * 5000 + "]" * 5000}, "no JSON"),
    "half a character": ({"messages": [*TURNS[:2], {"role": "assistant", "content": "\ud83d"}]}, "not Unicode"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_chat_is_refused_with_its_reason(name):
    row, reason = BAD[name]
    query = find_format([{"messages": TURNS}, {"messages": TURNS}, row], "data", FormatQuery(), FormatOptions())
    found = read_row(row, 0, FORMATS["messages"], query.options)
    assert isinstance(found, Refused) and reason in found.reason


def test_turns_that_the_template_refuses_and_a_tokenizer_without_one():
    record = record_of({"messages": TURNS})
    with pytest.raises(Unusable, match="does not take .*alternate"):
        render(record, tokenizer("{{ raise_exception('roles must alternate') }}"))
    with pytest.raises(InputError, match="has no chat template"):
        render(record, tokenizer(None))
