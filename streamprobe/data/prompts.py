"""The text in front of a response: a format string around the problem, or the tokenizer's chat template.

Also what a chat template may do to it: write the date, open a `<think>` that the response opens too, use the BOS token
as the marker of a role.
"""

import re
from collections.abc import Mapping, Sequence
from datetime import date
from itertools import groupby, pairwise
from typing import Any

from streamprobe.errors import InputError, first_line

PROBLEM = "\ue000"  # stands for a problem in a prompt whose own text is asked for: a letter that no text has
MARKER = re.compile(r"<[^<>]+>|\[[^\[\]]+\]")
SURROGATE = re.compile("[\ud800-\udfff]")
CLOCK = (  # in front of a chat template: its `strftime_now` writes the day that it is given, at midnight
    "{% macro strftime_now(format) %}{% set ns = namespace(text=format) %}{% for code, value in chat_day.items() %}"
    "{% set ns.text = ns.text.replace(code, value) %}{% endfor %}{{ ns.text }}{% endmacro %}\n"
)
TEMPLATE_RAISES = (  # a template is a program
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
)


def is_unicode(text: str) -> bool:
    """Whether text holds no lone surrogate, so that it can be encoded."""
    return not SURROGATE.search(text)


def format_prompt(problem: str, prompt: str, tokenizer: Any, day: str | None = None) -> str:
    """The text before the response: `chat` is the tokenizer's chat template, all else a format string of {problem}.

    A template that writes the date writes `day` (YYYY-MM-DD), or today.  Raises InputError for a template that is
    missing or cannot be rendered, and for text that is not Unicode.
    """
    if prompt == "chat":
        return format_chat([{"role": "user", "content": problem}], tokenizer, day)
    return _check_unicode(prompt.replace("{problem}", problem))


def format_chat(turns: Sequence[Mapping[str, Any]], tokenizer: Any, day: str | None = None) -> str:
    """The chat template's text for turns (`role`, `content`), up to where the next answer begins.

    Dated and refused as in `format_prompt`.
    """
    return _check_unicode(render_chat(turns, tokenizer, day, add_generation_prompt=True))


def _check_unicode(head: str) -> str:
    """The text itself."""
    if not is_unicode(head):
        raise InputError(
            f"the prompt {ascii(head[:60])}, which is not Unicode",
            "text without half characters (surrogates)",
            "write --prompt, or the chat template, without them",
        )
    return head


def render_chat(messages: Sequence[Any], tokenizer: Any, day: str | None = None, **options: Any) -> str:
    """The chat template's text for some turns; `options` are more that it is given, such as its tools.

    A template that writes the date writes `day` (YYYY-MM-DD), or today.  Raises InputError for a template that is
    missing or cannot be rendered.
    """
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise InputError(
            "a chat with a tokenizer that has no chat template",
            "a tokenizer with one",
            "use a model that was trained to chat, or data of another format with --prompt '{problem}\\n\\n'",
        )
    try:
        template = tokenizer.get_chat_template()
        if "strftime_now" in template:
            chosen = date.fromisoformat(day) if day else date.today()
            options |= {"chat_template": CLOCK + template, "chat_day": _codes(chosen)}
        return tokenizer.apply_chat_template(list(messages), tokenize=False, **options)
    except (TemplateError, *TEMPLATE_RAISES) as error:
        raise InputError(
            f"a chat template that cannot be rendered ({type(error).__name__}: {first_line(error)})",
            f"one that takes turns of {' and '.join(sorted({turn['role'] for turn in messages}))}",
            "fix the tokenizer's chat template or the data; --prompt '{problem}\\n\\n' needs none",
        ) from error


def _codes(day: date) -> dict[str, str]:
    """What each code of `strftime` stands for on a day."""
    plain = {f"%-{code}": day.strftime(f"%{code}").lstrip("0") or "0" for code in "dmyjHIMSUW"}
    coded = {f"%{code}": day.strftime(f"%{code}") for code in "aAbBcdfGHIjmMpSuUVwWxXyYzZ"}
    return {"%F": day.isoformat(), "%e": f"{day.day:2}", **plain, **coded}


def resolve_day(prompt: str, day: str | None, tokenizer: Any) -> str | None:
    """The day that the prompts are written on: `day`, else today, or none where the prompt does not depend on it.

    Raises InputError for a day that is given and not used.
    """
    days = ("2001-02-03", "2024-11-25")  # no part of them is the same
    if prompt == "chat" and len({format_prompt(PROBLEM, prompt, tokenizer, other) for other in days}) > 1:
        return day or date.today().isoformat()
    if day:
        raise InputError(
            f"chat_date {day} with a prompt that does not write the date",
            "prompt chat and a chat template that does",
            "drop --chat_date",
        )
    return None


def open_response(
    problem: str, response: str, prompt: str, tokenizer: Any, *, day: str | None = None
) -> tuple[str, str]:
    """The text before this very response, and the marker (such as `<think>`) that was left out at its end, or "".

    It is left out where the response begins with it, so that it stands in the text once.
    """
    head = format_prompt(problem, prompt, tokenizer, day)
    start = response.lstrip()
    if not MARKER.match(start):
        return head, ""
    _, _, tail = format_prompt(PROBLEM, prompt, tokenizer, day).rpartition(PROBLEM)  # the problem itself is left alone
    marker = repeated_marker(tail, start) if head.endswith(tail) else ""
    return (head.rstrip().removesuffix(marker) if marker else head), marker


def repeated_marker(tail: str, start: str) -> str:
    """What `tail`, but for white space, ends and `start` begins with: `<...>` or `[...]`, and more if there is; or "".

    Whole words: `[answer] a` is none where `start` goes on as `[answer] also`.
    """
    tail, marker = tail.rstrip(), MARKER.match(start)
    for n in range(min(len(tail), len(start)), marker.end() - 1 if marker else len(start), -1):
        if tail.endswith(start[:n]) and not (start[n - 1].isalnum() and start[n : n + 1].isalnum()):
            return start[:n]
    return ""


def encode(text: str, prompt: str, tokenizer: Any, with_bos: bool) -> tuple[list[int], list[tuple[int, int]]]:
    """Token ids of a text that `format_prompt` began, and the characters start .. end that each covers.

    Where the tokenizer has a BOS token the ids start with exactly one, or with none if not `with_bos`; one that the
    chat template writes as the marker of a role stays.
    """
    options = {"return_offsets_mapping": True, "verbose": False}  # a text that is too long is reported by the caller
    encoded = tokenizer(text, add_special_tokens=prompt != "chat", **options)
    ids, offsets = list(encoded["input_ids"]), _letter_by_letter(encoded["offset_mapping"], text)
    bos = tokenizer.bos_token_id
    if bos is None:
        return ids, offsets
    lead = next((i for i, token in enumerate(ids) if token != bos), len(ids))
    n = int(with_bos or (lead > 0 and _marks_roles(prompt, tokenizer)))
    return [bos] * n + ids[lead:], [(0, 0)] * n + offsets[lead:]


def encode_head(head: str, prompt: str, tokenizer: Any, with_bos: bool) -> tuple[list[int], list[tuple[int, int]]]:
    """As `encode`, of the text that stands before a response alone: what a model reads before it writes.

    An EOS token that the tokenizer puts behind every text is left out, unless the chat template writes it.
    """
    ids, offsets = encode(head, prompt, tokenizer, with_bos)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    n = len(ids)
    while prompt != "chat" and n and eos not in (None, bos) and ids[n - 1] == eos:
        n -= 1
    return ids[:n], offsets[:n]


def special_ids(tokenizer: Any) -> set[int]:
    """The tokens that stand for no text; the one for unknown letters does, unless it is a BOS, EOS or pad token too."""
    others = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    return set(tokenizer.all_special_ids) - ({tokenizer.unk_token_id} - others)


def _letter_by_letter(offsets: Sequence[tuple[int, int]], text: str) -> list[tuple[int, int]]:
    """Offsets in which the tokens of single bytes are those of their own letter.

    Some tokenizers (Unigram with byte fallback) say of every byte of several unknown letters that it covers them all.
    """
    if not any(one == other and other[1] - other[0] > 1 for one, other in pairwise(offsets)):
        return list(offsets)
    found: list[tuple[int, int]] = []
    for (start, end), equal in groupby(offsets):
        n = len(list(equal))
        letters = [i for i in range(start, end) for _ in text[i].encode()] if n > 1 else []
        found += [(i, i + 1) for i in letters] if len(letters) == n else [(start, end)] * n
    return found


def _marks_roles(prompt: str, tokenizer: Any) -> bool:
    """Whether the chat template writes the BOS token elsewhere than at its start, as ChatML may: it marks the turns."""
    if prompt != "chat":
        return False
    head, bos = format_prompt(PROBLEM, prompt, tokenizer), tokenizer.bos_token
    return bos in re.sub(rf"\A(?:{re.escape(bos)})+", "", head)
