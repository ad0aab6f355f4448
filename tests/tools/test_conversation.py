"""What the model is asked: turns with what was said before, rows of a file; and how an answer is stopped."""

import json

import pytest
import torch
from builders import make_tokenizer
from transformers import AutoModelForCausalLM

from streamprobe.errors import InputError
from streamprobe.model.sampling import Sampling
from streamprobe.tools import conversation, generation
from streamprobe.tools.conversation import Answer, Monitor, Question, converse, questions_of, turns_of, users_turn
from streamprobe.tools.generation import PromptStyle
from streamprobe.tools.watch import Mark

TEMPLATE = (
    "<s>{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% if m['role'] == 'assistant' %}</s>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
FORMAT = "{problem}\n\n"


def make_style(prompt="chat", most=512, template=TEMPLATE, day=None):
    return PromptStyle(make_tokenizer(chat_template=template), prompt, True, day, most)


def turns(*texts):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


# --- what the model reads ---


def test_turns_are_rendered_as_the_chat_template_does():
    style = make_style()
    said = turns("which box?", " the red one", "why?")
    reference = style.tokenizer.apply_chat_template(said, add_generation_prompt=True, tokenize=False)
    assert style.tokenizer.decode(style.encode(said)) == reference
    assert reference.count("<s>") == 1 and reference.endswith("</s>[user]why?[assistant]")
    first = style.encode(said[:1])
    assert torch.equal(first, generation.encode("which box?", "chat", style.tokenizer, True))  # as the probes know it


def test_turns_are_dated_as_the_run_was():
    template = "{{ strftime_now('%d %b %Y') }}" + TEMPLATE
    old, new = (make_style(template=template, day=day) for day in ("2024-03-05", "2025-03-05"))
    said = turns("a", "b", "c")
    assert old.tokenizer.decode(old.encode(said)).startswith("<s>05 Mar 2024<s>[user]a")
    assert not torch.equal(old.encode(said), new.encode(said))  # negative control


@pytest.mark.parametrize(
    "style, said, told",
    [
        (make_style(FORMAT), turns("a", "b", "c"), "3 turns; expected one problem"),
        (make_style(most=8), turns("which box is it now?"), "fewer than the model's 8; fix: shorten it"),
        (make_style(most=8), turns("a", "b", "which box?"), "or begin anew"),
        (make_style(template=None), turns("a"), "no chat template"),
        (make_style(template="{{ raise_exception('no') }}"), turns("a", "b", "c"), "turns of assistant and user"),
        (make_style(), turns("a\ud800"), "not Unicode"),
        (make_style(FORMAT), turns("a\ud800"), "not Unicode"),
    ],
)
def test_what_cannot_be_asked_is_refused(style, said, told):
    with pytest.raises(InputError, match=told):
        style.encode(said)


# --- a conversation ---


def talk(texts, style):
    """The questions of a conversation in which every answer is the number of its turn."""
    asked = []

    def answer(question):
        asked.append(question)
        return Answer(question, [Mark(f" {question.number}", 0.0, False, 0.0, {})] * 2, False)

    assert [a.question for a in converse(texts, style, answer)] == asked
    return [style.tokenizer.decode(question.ids) for question in asked]


def test_a_turn_has_what_was_said_before_it_in_its_context():
    read = talk(["one", "two", "three"], make_style())
    assert read[0] == "<s>[user]one[assistant]"
    assert read[1] == "<s>[user]one[assistant] 1 1</s>[user]two[assistant]"
    assert read[2] == read[1].removesuffix("[assistant]") + "[assistant] 2 2</s>[user]three[assistant]"


def test_a_problem_fails_without_a_history_in_a_format_string():
    """Negative control: the same turns, of which each is a problem of its own."""
    assert talk(["one", "two"], make_style(FORMAT)) == ["<s>one\n\n", "<s>two\n\n"]


def test_a_turn_that_does_not_fit_is_one_line_and_forgotten(capsys):
    read = talk(["one", "box " * 60, "two", "\ud800", "x"], make_style(most=80))
    assert [text.count("[user]") for text in read] == [1, 2, 3] and "box" not in read[2]
    assert read[2].endswith("[user]two[assistant] 3 3</s>[user]x[assistant]")
    long, broken = capsys.readouterr().err.splitlines()
    assert "fewer than the model's 80; fix: shorten it, or begin anew" in long and "not Unicode" in broken
    assert all(line.startswith("streamprobe: ") and "; expected " in line for line in (long, broken))


# --- rows ---


@pytest.mark.parametrize(
    "row, expected",
    [
        ({"problem": "a"}, turns("a")),
        ({"prompt": "a", "other": "b"}, turns("a")),
        ({"task": "b", "problem": "a"}, turns("b")),
        ({"problem": None, "prompt": "a"}, turns("a")),
        ({"messages": turns("a", "b", "c")}, turns("a", "b", "c")),
        ({"messages": turns("a", "b")}, turns("a")),  # the last answer is written anew
        (
            {"prompt": [{"role": "system", "content": ""}, *turns("a")]},
            [{"role": "system", "content": ""}, *turns("a")],
        ),
    ],
)
def test_a_row_asks_with_a_text_or_with_messages(row, expected):
    assert turns_of(row, "task") == expected


@pytest.mark.parametrize(
    "row",
    [
        *(
            {},
            {"problem": ""},
            {"problem": " \n"},
            {"problem": 3},
            {"problem": ["a"]},
            {"messages": []},
            {"messages": {}},
        ),
        *({"messages": [{"role": "user"}]}, {"messages": [{"role": "user", "content": ["a"]}]}),
        *({"messages": [{"role": "assistant", "content": "a"}]}, {"messages": [{"role": "system", "content": "a"}]}),
    ],
)
def test_a_row_without_a_prompt_is_refused_by_its_number(row):
    with pytest.raises(InputError, match="^row 2 with .*; expected .*; fix: "):
        questions_of([{"problem": "a"}, row], make_style(), column="problem", id_column="id")


def test_questions_have_the_names_of_their_rows():
    rows = [{"problem": "a", "id": 0}, {"messages": turns("a", "b", "c"), "id": None}]
    first, second = questions_of(rows, make_style(), column="problem", id_column="id")
    assert (first.number, first.name, first.id, first.text) == (1, "row 1 (0)", "0", "a")
    assert first.keys == {"prompt": 1, "id": "0"} and second.keys == {"prompt": 2}
    assert second.name == "row 2" and second.text == "user: a\nassistant: b\nuser: c"
    with pytest.raises(InputError, match="row 2 with 3 turns"):
        questions_of(rows, make_style(FORMAT), column="problem", id_column="id")


# --- answers ---


@pytest.fixture(scope="module")
def model(model_dir):
    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()


@pytest.fixture
def monitor(model, bank, tokenizer):
    return Monitor(model, tokenizer, bank, (1, 4), Sampling(max_new_tokens=12, temperature=1.5, seed=3))


def question(number=1, text="which box?"):
    return Question(number, text, make_style(FORMAT).encode([users_turn(text)]))


def n_hooks(model):
    return sum(len(m._forward_hooks) for m in model.modules())


def test_every_question_has_a_seed_of_its_own(monitor, model, bank, tokenizer):
    first, second = (monitor.answer(question(n)).text for n in (1, 2))
    again = Monitor(model, tokenizer, bank, (1, 4), Sampling(max_new_tokens=12, temperature=1.5, seed=4))
    assert first == monitor.answer(question(1)).text != second == again.answer(question(1)).text


def test_an_answer_takes_no_more_than_the_room_that_is_left(model, bank, tokenizer):
    greedy = Monitor(model, tokenizer, bank, (1, 4), Sampling(max_new_tokens=60), lines=True)
    asked = question(text="box " * 500)
    ids = asked.ids[: 512 - 5]
    found = greedy.answer(Question(1, "", ids))
    assert len(tokenizer("".join(m.text for m in found.marks))["input_ids"]) < 20


def test_each_token_is_printed_before_the_next_is_asked_for(monitor, capsys, monkeypatch):
    flushed = []
    monkeypatch.setattr(conversation, "write", flushed.append)
    lines = Monitor(monitor.model, monitor.tokenizer, monitor.bank, monitor.place, monitor.sampling, lines=True)
    steps = iter([conversation.Step(i, "a", 0.5, True, {}) for i in range(3)])
    for n, step in enumerate(lines._printed(steps, question(2)), 1):
        assert len(flushed) == n and json.loads(flushed[-1])["token"] == step.token == n - 1
    assert [json.loads(line)["position"] for line in flushed] == [0, 1, 2]
    assert {json.loads(line)["prompt"] for line in flushed} == {2}
    assert list(monitor._printed(iter([step]), question())) == [step] and len(flushed) == 3  # where text is wanted


def test_ctrl_c_stops_an_answer_and_keeps_what_was_written(monitor, model, monkeypatch, capsys):
    whole, before = monitor.answer(question()), n_hooks(model)
    assert not whole.stopped and len(whole.marks) > 4
    written = []

    def interrupted(text):
        written.append(text)
        if len(written) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(conversation, "write", interrupted)
    stopped = monitor.answer(question())
    assert stopped.stopped and stopped.marks == whole.marks[:2] and n_hooks(model) == before
    assert stopped.text and whole.text.startswith(stopped.text)
    monkeypatch.setattr(conversation, "write", written.append)
    assert monitor.answer(question()).marks == whole.marks  # and the next one is whole


@pytest.mark.parametrize("second", [True, False])
def test_a_second_ctrl_c_is_not_held_back(monitor, monkeypatch, second):
    def slow(*_, **__):
        try:
            yield 5, torch.zeros(3, 6)
            raise KeyboardInterrupt
        finally:
            if second:
                raise KeyboardInterrupt  # while the model finishes its pass

    monkeypatch.setattr(conversation, "watch", slow)
    if second:
        with pytest.raises(KeyboardInterrupt):
            monitor.answer(question())
    else:
        assert monitor.answer(question()).stopped


def test_the_question_is_printed_unless_it_stands_there(monitor, capsys):
    monitor.answer(question()._replace(name="row 1"))
    assert capsys.readouterr().out.startswith("\nrow 1\nwhich box?\n")
    monitor.answer(question()._replace(name="turn 1", typed=True))
    assert "which box?" not in capsys.readouterr().out
