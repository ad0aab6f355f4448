"""What stands in front of a response: every token once, the same on every day, and a broken template reported in one line."""

import json
import shutil
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from builders import load_chains, make_record, make_rows, make_tokenizer

from streamprobe.cli import train as main
from streamprobe.data import prompts
from streamprobe.data.prompts import format_prompt, open_response, resolve_day
from streamprobe.data.tokenize import TextOptions, tokenize
from streamprobe.errors import InputError
from streamprobe.tools import generation

FIELDS = ("task_id", "problem", "reasoning_chain", "annotated_chain")
LABELS = ["backtracking"]
TURN = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"


def opening(template: str, problem: str, response: str) -> tuple[str, str]:
    return open_response(problem, response, "chat", make_tokenizer(chat_template=template))


# --- a marker that both the prompt and the response have ---

MARKERS = {  # what the template ends with, what the response begins with, the marker that both have
    "as it stands": ("<think>", "<think>so", "<think>"),
    "a line end behind the template's": ("<think>\n", "<think>\nso", "<think>"),
    "none behind the response's": ("<think>\n", "<think>so", "<think>"),
    "white space before the response's": ("<think>", "\n <think>so", "<think>"),
    "several in a row": (
        "<|channel|>analysis<|message|>",
        "<|channel|>analysis<|message|>so",
        "<|channel|>analysis<|message|>",
    ),
    "the last of several": ("<|assistant|><think>", "<think>so", "<think>"),
    "in brackets": ("[THINK]", "[THINK]so", "[THINK]"),
    "a role": ("<|im_start|>assistant\n", "<|im_start|>assistant\nso", "<|im_start|>assistant"),
    "half of a word behind one": ("[answer] a", "[answer] also", ""),
    "an empty block": ("<think>\n\n</think>\n\n", "<think>\n\n</think>\n\nso", "<think>\n\n</think>"),
    "none in the response": ("<think>\n", "so", ""),
    "another one": ("<think>\n", "<reason>so", ""),
    "half of one": ("<think>", "<thin", ""),
    "none in the template": (":", "<think>so", ""),
    "no marker": ("so", "so", ""),
}


@pytest.mark.parametrize("chat", [True, False], ids=["chat", "format string"])
@pytest.mark.parametrize("name", MARKERS)
def test_a_marker_stands_in_the_text_once(name, chat):
    end, response, marker = MARKERS[name]
    if chat:
        template = TURN + "{% if add_generation_prompt %}" + repr(end).join(("{{ ", " }}")) + "{% endif %}"
        head, found = opening(template, "why?", response)
        whole = "[user]why?" + end
    else:
        head, found = open_response("why?", response, "Q: {problem}" + end, make_tokenizer())
        whole = f"Q: why?{end}"
    assert found == marker
    assert head == (whole.rstrip().removesuffix(marker) if marker else whole)
    if marker:
        assert (head + response).count(marker) == 1
        assert (whole + response).count(marker) == 2  # negative control


@pytest.mark.parametrize("prompt", ["{problem}\n\n", "chat"])
def test_a_problem_that_ends_as_the_response_begins_is_left_whole(prompt):
    tokenizer = make_tokenizer(chat_template=TURN)
    head, marker = open_response("sort [3, 1, 2]", "[3, 1, 2] is unsorted.", prompt, tokenizer)
    assert marker == "" and "sort [3, 1, 2]" in head


def test_doubled_markers_are_counted_and_shown(tokenizer):
    rows = make_rows(20, seed=3)
    for row in rows[:5]:
        for name in FIELDS[2:]:
            row[name] = "<think>\n" + row[name]
    splits, counts = load_chains(rows, tokenizer, LABELS, 512, text=TextOptions("{problem}\n<think>\n"))
    assert counts.markers == {"<think>": 5} and counts.as_dict()["markers"] == {"<think>": 5}
    for chain in (chain for split in splits.values() for chain in split):
        text = tokenizer.decode(chain.ids)
        assert text.count("<think>") == 1
        assert ("<think>" in tokenizer.decode(chain.ids[chain.start :])) == (chain.marker == "<think>")


def test_a_model_that_writes_anew_is_given_the_marker_that_its_prompt_ends_with():
    tokenizer = make_tokenizer(chat_template=TURN + "{{ '<think>\\n' }}")
    plain, opened = (
        tokenize(make_record("why?", text), tokenizer, LABELS, TextOptions("chat", "response", "negative"))
        for text in ("wait no.", "<think>\nwait no.")
    )
    assert plain.marker == "" and opened.marker == "<think>"
    assert tokenizer.decode(generation.prompt_of(plain, tokenizer)) == "<s>[user]why?<think>\n"
    assert tokenizer.decode(generation.prompt_of(opened, tokenizer)) == "<s>[user]why?<think>"
    assert tokenizer.decode(opened.ids[: opened.start]) == "<s>[user]why?"  # negative control
    assert opened.ids.tolist() == plain.ids.tolist()


# --- BOS as the marker of a role ---

CHATML = (
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


@pytest.mark.parametrize("template", [CHATML, "{{ bos_token }}" + CHATML], ids=["alone", "behind a BOS token"])
@pytest.mark.parametrize("bos", [True, False])
def test_a_bos_token_that_marks_a_role_stays_once(template, bos):
    tokenizer = make_tokenizer(adds="$A", chat_template=template)
    record = make_record("why? <s>", "wait no.", [("backtracking", 0, 8)])
    chain = tokenize(record, tokenizer, LABELS, TextOptions("chat", "response", "ignore", bos))
    expected = tokenizer("<s>user\nwhy? <s></s>\n<s>assistant\nwait no.", add_special_tokens=False)["input_ids"]
    assert chain.ids.tolist() == expected
    assert generation.encode("why? <s>", "chat", tokenizer, bos).tolist() == expected[: chain.start]


def test_a_second_bos_token_fails_without_a_role_to_mark():
    """It is not left wherever a template writes it, nor where the problem holds another."""
    for problem, n in (("why?", 1), ("why <s>?", 1), ("why?", 2)):
        tokenizer = make_tokenizer(adds="$A", chat_template="{{ bos_token }}" * n + TURN)
        record = make_record(problem, "wait no.", [("backtracking", 0, 8)])
        chain = tokenize(record, tokenizer, LABELS, TextOptions("chat", "response", "ignore", False))
        text = f"[user]{problem}wait no."
        assert chain.ids.tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]


# --- the date ---

DATED = {  # a template's words for the date, and what they are on the 5th of March 2024, a Tuesday
    "called": ("{{ strftime_now('%d %b %Y') }}", "05 Mar 2024"),
    "through its own argument": (
        "{% if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}{{ date_string }}",
        "05 Mar 2024",
    ),
    "where it is defined": (
        "{% if strftime_now is defined %}{{ strftime_now('%Y-%m-%d') }}{% else %}?{% endif %}",
        "2024-03-05",
    ),
    "reckoned with": ("{{ strftime_now('%Y') | int - 1 }}", "2023"),
    "in a macro": ("{% macro day() %}{{ strftime_now('%A, %B %-d') }}{% endmacro %}{{ day() }}", "Tuesday, March 5"),
    "other codes": ("{{ strftime_now('%F %y %j %H:%M') }}", "2024-03-05 24 065 00:00"),
    "in capitals": ("{{ strftime_now('%b')[0] | upper }}{{ strftime_now('%e').strip() }}", "M5"),
}


@pytest.mark.parametrize("name", DATED)
def test_a_template_writes_the_day_that_it_is_given(name):
    words, expected = DATED[name]
    tokenizer = make_tokenizer(chat_template="\n  {% if true %}It is " + words + ".\n{% endif %}" + TURN)
    assert format_prompt("why?", "chat", tokenizer, "2024-03-05") == f"\nIt is {expected}.\n[user]why?"
    assert resolve_day("chat", "2024-03-05", tokenizer) == "2024-03-05"
    assert resolve_day("chat", None, tokenizer) == date.today().isoformat()
    today = tokenizer.apply_chat_template(
        [{"role": "user", "content": "why?"}], tokenize=False, add_generation_prompt=True
    )
    if "%H" not in words:  # the library's own clock, which goes on
        assert format_prompt("why?", "chat", tokenizer) == today
    assert format_prompt("why?", "chat", tokenizer, "2024-03-05") != today  # negative control


@pytest.mark.parametrize("template", [TURN, "{% set unused = strftime_now('%Y') %}" + TURN, "26 Jul 2024" + TURN])
def test_a_template_that_writes_no_date_has_none(template):
    tokenizer = make_tokenizer(chat_template=template)
    assert resolve_day("chat", None, tokenizer) is None
    for prompt in ("chat", "{problem} {{ strftime_now('%Y') }}"):
        with pytest.raises(InputError, match="chat_date 2024-03-05 with a prompt that does not write the date"):
            resolve_day(prompt, "2024-03-05", tokenizer)


@pytest.fixture
def dated(tmp_path, model_dir, chains_file, monkeypatch) -> Path:
    """A config whose model's chat template writes the date, in an empty folder to work in."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model_dir, "model")
    template = "It is {{ strftime_now('%d %b %Y') }}. " + TURN + "\n"
    (tmp_path / "model" / "chat_template.jinja").write_text(template)
    keys = {
        "model": "./model",
        "data": str(chains_file),
        "dtype": "float32",
        "layers": [1],
        "lags": [0],
        "bootstrap": 0,
        "controls": ["none"],
        "max_passes": 1,
        "prompt": "chat",
        "memory_gb": "1",
    }
    Path("config.yaml").write_text(yaml.safe_dump(keys))
    return Path("config.yaml")


def set_today(monkeypatch: pytest.MonkeyPatch, day: str) -> None:
    class Day(date):
        @classmethod
        def today(cls) -> Any:
            return date.fromisoformat(day)

    monkeypatch.setattr(prompts, "date", Day)


def test_the_day_is_kept_in_the_config_and_on_resume(dated, capsys, monkeypatch, model_dir):
    set_today(monkeypatch, "2024-03-05")
    assert main([str(dated), "--output_dir", "a"]) == 0
    assert "the chat template writes the date: 2024-03-05" in capsys.readouterr().out
    config = yaml.safe_load(Path("a/config.yaml").read_text())
    assert config["chat_date"] == "2024-03-05"
    set_today(monkeypatch, "2024-03-06")  # after midnight
    assert main([str(dated), "--output_dir", "a", "--resume", "--max_passes", "2"]) == 0
    assert yaml.safe_load(Path("a/config.yaml").read_text())["chat_date"] == "2024-03-05"
    assert main(["a/config.yaml", "--output_dir", "b"]) == 0  # the run's own config renders the same
    run = [json.loads(Path(f"{name}/summary.json").read_text())["run"] for name in "ab"]
    assert run[0]["data_fingerprint"] == run[1]["data_fingerprint"]
    assert main([str(dated), "--output_dir", "c"]) == 0  # the negative control: a new run is of its own day
    new = json.loads(Path("c/summary.json").read_text())["run"]
    assert new["config"]["chat_date"] == "2024-03-06" and new["data_fingerprint"] != run[0]["data_fingerprint"]
    capsys.readouterr()
    assert main([str(dated), "--output_dir", "a", "--resume", "--chat_date", "2024-03-06"]) == 2
    assert "--resume with chat_date 2024-03-06; expected 2024-03-05" in capsys.readouterr().err
    assert main([str(dated), "--output_dir", "d", "--prompt", "{problem}"]) == 0
    assert json.loads(Path("d/summary.json").read_text())["run"]["config"]["chat_date"] is None


def test_watching_a_model_renders_the_day_of_its_run():
    tokenizer = make_tokenizer(chat_template="It is {{ strftime_now('%d %b %Y') }}. " + TURN)
    record = make_record("why?", "wait no.", [("backtracking", 0, 8)])
    chain = tokenize(record, tokenizer, LABELS, TextOptions("chat", "response", "ignore", day="2024-03-05"))
    ids = generation.encode("why?", "chat", tokenizer, True, day="2024-03-05")
    assert torch.equal(ids, chain.ids[: chain.start]) and "05 Mar 2024" in tokenizer.decode(ids)
    assert not torch.equal(ids, generation.encode("why?", "chat", tokenizer, True))  # negative control


# --- what cannot be rendered ---

BROKEN = {
    "syntax": "{% for m in messages %}",
    "raises": "{{ raise_exception('no user turn here') }}",
    "reaches for a class": "{{ ''.__class__.__mro__ }}",
    "reaches for globals": "{{ raise_exception.__globals__.os }}",
    "undefined": "{{ nothing.at.all }}",
    "a wrong type": "{{ messages + 1 }}",
    "division": "{{ 1 / 0 }}",
    "no such entry": "{{ dict(a=1)['b'].c }}",
    "an endless macro": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "too long a range": "{% for i in range(10 ** 9) %}x{% endfor %}",
    "a break outside of a loop": "{% break %}",
    "a file": "{% include 'x' %}",
    "too much memory": "{{ 'a' * 10 ** 13 }}",
    "no text": 5,
    "an unknown filter": "{{ messages | nothing }}",
    "no default": {"tool_use": TURN, "rag": TURN},
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_template_is_reported_in_one_line(name):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = BROKEN[name]
    with pytest.raises(InputError, match="a chat template that cannot be rendered") as error:
        resolve_day("chat", None, tokenizer)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["syntax", "raises", "reaches for a class"])
def test_a_broken_template_ends_the_run_before_it_begins(dated, capsys, name):
    Path("model/chat_template.jinja").write_text(BROKEN[name])
    assert main([str(dated)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("streamprobe: a chat template that cannot be rendered")
    assert not Path("runs").exists()


@pytest.mark.parametrize("day", ["tomorrow", "20240305", "2024-3-5", "2024-02-30", "2024-03-05T00:00"])
def test_a_day_that_is_none(dated, capsys, day):
    assert main([str(dated), "--chat_date", day]) == 2
    assert f"chat_date {day}; expected a day of the form YYYY-MM-DD" in capsys.readouterr().err


def test_a_prompt_that_is_not_unicode(dated, capsys):
    assert main([str(dated), "--prompt", "\udcff{problem}"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and r"prompt '\udcff{problem}', with bytes that are no text" in error
    with pytest.raises(InputError, match="not Unicode"):
        generation.encode("why\ud83d?", "{problem}\n\n", make_tokenizer(), True)
