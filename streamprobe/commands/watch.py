"""`streamprobe watch`: the model of a run answers, and each token is marked."""

import os
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from streamprobe.commands.shared import (
    add_probe,
    add_run,
    add_sampling,
    check_file,
    open_probes,
    place_of,
    sampling_of,
    write_file,
)
from streamprobe.config.load import check_text
from streamprobe.errors import InputError
from streamprobe.system.console import has_reader, read_lines, say, shows_colour, typed_at_terminal, warn, write

if TYPE_CHECKING:
    from streamprobe.config.data_keys import DataConfig
    from streamprobe.data.files import Rows
    from streamprobe.tools.conversation import Answer, Question
    from streamprobe.tools.generation import PromptStyle
    from streamprobe.tools.marked_text import Legend

SIGN = "\n> "
HINT = "a line is a turn; Ctrl-C stops an answer, an empty line or Ctrl-D ends"
NO_TURNS = "each line is a problem of its own, without history: the run's prompt is a format string, not chat"


def options(parser: ArgumentParser) -> None:
    """The options of `watch`."""
    add_run(parser)
    asked = parser.add_mutually_exclusive_group()
    asked.add_argument(
        "--prompt",
        help="the problem; the run's own `prompt` is put around it (default: a conversation, a line of standard input "
        "a turn)",
    )
    asked.add_argument(
        "--input",
        metavar="FILE",
        help="many prompts: a .json, .jsonl or .parquet file of rows with a problem, a prompt or chat messages",
    )
    parser.add_argument("--json", action="store_true", help="print a line of JSON for each token, and nothing else")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the marked text as a page, too")
    add_probe(parser)
    add_sampling(parser)


def watch(given: Namespace) -> None:
    """Lets the model of a run answer, marks each token, and writes the page that --html asks for."""
    from streamprobe.data.tokenize import text_options
    from streamprobe.model.blocks import context
    from streamprobe.probes.kinds import looks_back
    from streamprobe.run.opened import load_front, load_whole
    from streamprobe.tools.choice import row_of
    from streamprobe.tools.conversation import Monitor, converse
    from streamprobe.tools.generation import PromptStyle
    from streamprobe.tools.marked_text import legend_of

    sampling = sampling_of(given)
    rows = _check(given)
    run = open_probes(given)
    (probes, place), data = row_of(run.probes, place_of(given, run)), run.config.data
    front = load_front(run)
    read = text_options(vars(data)) if looks_back(probes.kind) else None
    style = PromptStyle(front.tokenizer, data.prompt, data.bos, data.chat_date, context(front.config), read)
    asked = _questions(given, rows, style, data)
    turns = _turns(given, style) if asked is None else None
    monitor = Monitor(*load_whole(run, front), probes, place, sampling, lines=given.json)
    legend, answers = legend_of(probes, place), list["Answer"]()
    _introduce(given, legend, style if turns else None)
    try:
        for answer in converse(turns, style, monitor.answer) if turns else map(monitor.answer, asked or ()):
            if given.html:
                answers.append(answer)
            if answer.stopped and not turns:
                raise KeyboardInterrupt
            if not (given.html or has_reader()):
                break
    finally:
        if answers:
            _, k = place
            _write_page(given, f"{given.run.name}: {probes.columns[k]}", legend, answers)


def _check(given: Namespace) -> "Rows | None":
    """The rows of --input, if it is given.  Raises InputError for what cannot be asked, or written."""
    from streamprobe.data.files import read_rows

    check_file(given.html, "html", given.run)
    if given.prompt is not None:
        if not given.prompt.strip():
            raise InputError("an empty prompt", "some text", "correct --prompt")
        check_text("prompt", given.prompt)
    if given.input is None:
        return None
    if given.html and os.path.realpath(given.html) == os.path.realpath(given.input):
        raise InputError(f"html {given.html}, which is the input", "another file", "give another --html")
    return read_rows(given.input, split="train")


def _questions(
    given: Namespace, rows: "Rows | None", style: "PromptStyle", data: "DataConfig"
) -> "list[Question] | None":
    """What --prompt or the rows of --input ask; None where a conversation is meant."""
    from streamprobe.data.columns import Table
    from streamprobe.data.formats import ID, PROBLEM
    from streamprobe.tools.conversation import Question, questions_of, users_turn

    if given.prompt is not None:
        said = [users_turn(given.prompt)]
        ids = style.encode(said)
        return [Question(1, given.prompt, ids, samples=style.samples(said, ids))]
    if rows is None:
        return None
    table = Table(rows)
    column, id_column = (
        table.find(role, own if own in table else None, ())
        for role, own in ((PROBLEM, data.problem_column), (ID, data.id_column))
    )
    return questions_of(rows, style, column=column or "problem", id_column=id_column or "id")


def _turns(given: Namespace, style: "PromptStyle") -> Iterator[str]:
    """What is typed, or comes through a pipe.

    Raises InputError for a pipe through which nothing comes, and for a chat template that cannot be rendered.
    """
    from streamprobe.tools.conversation import users_turn

    style.encode([users_turn("?")])
    lines = read_lines(SIGN, aside=given.json)
    if typed_at_terminal():
        return lines
    first = next(lines, None)
    if first is None:
        raise InputError(
            "standard input without a turn", "a line of text a turn", "write some, or give --prompt or --input"
        )
    return chain([first], lines)


def _introduce(given: Namespace, legend: "Legend", style: "PromptStyle | None") -> None:
    """Says which probe is watched and, in a conversation in this `style`, how it goes."""
    from streamprobe.tools.marked_text import legend_for_terminal

    said = [NO_TURNS] if style and not style.has_turns else []
    said += [HINT] if style and typed_at_terminal() else []
    if given.json:
        warn("\n".join([str(legend), *said]))
    else:
        write(legend_for_terminal(legend, shows_colour()) + "\n")
        for line in said:
            say(line)


def _write_page(given: Namespace, title: str, legend: "Legend", answers: "Sequence[Answer]") -> None:
    from streamprobe.tools.marked_text import Passage, page

    passages = [Passage(answer.question.name, answer.question.text, answer.marks) for answer in answers]
    write_file(given.html, "html", page(title, legend, passages), warn if given.json else say)
