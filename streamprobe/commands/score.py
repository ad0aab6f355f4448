"""`streamprobe score`: the probes of a run look on while its model reads texts."""

import hashlib
from argparse import ArgumentParser, Namespace
from math import isnan
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamprobe.commands.shared import add_probe, add_run, check_file, given_place, open_probes, place_of
from streamprobe.data.detect import AUTO
from streamprobe.data.formats import FORMATS
from streamprobe.errors import InputError
from streamprobe.system.console import say

if TYPE_CHECKING:
    from streamprobe.data.records import Record, Refused
    from streamprobe.run.opened import OpenedRun
    from streamprobe.tools.score_tables import Layout
    from streamprobe.tools.score_windows import Scorer


def options(parser: ArgumentParser) -> None:
    """The options of `score`."""
    add_run(parser)
    add = parser.add_argument
    texts = "file, folder, glob, URL or data set on the hub, as streamprobe train reads; needs no labels"
    add("texts", metavar="TEXTS", help=texts)
    add(
        "--format", choices=[AUTO, *FORMATS], default=AUTO, help="how the texts lie there (%(default)s: by the columns)"
    )
    add("--data_split", help="split of a data set on the hub (default: as in the run)")
    add("--data_config", help="configuration of a data set on the hub")
    for name, what in (("response", "what is read"), ("problem", "the problem before it"), ("id", "the text's name")):
        add(f"--{name}_column", help=f"column with {what} (default: the run's, or found by its name)")
    add("--out", type=Path, metavar="FILE", help="a row a token: .parquet, .csv, .jsonl, .csv.gz or .jsonl.gz")
    add("--resume", action="store_true", help="go on with an --out that was interrupted")
    add("--probes", choices=["one", "all"], default="one", help="the one probe, or all that have what is given below")
    add_probe(parser)
    most = "most tokens in one forward pass, padding included (default: as in the run)"
    add("--max_batch_tokens", type=int, help=most)


def score(given: Namespace) -> None:
    """Scores every token of the texts, into the file that --out names or as a summary in the terminal."""
    _check(given)
    from streamprobe.tools import choice
    from streamprobe.tools.score_tables import layout_of
    from streamprobe.tools.watch import alarm_threshold

    run = open_probes(given)
    if given.probes == "all":
        bank = choice.choose_all(run.probes, **given_place(given))
    else:
        i, k = place_of(given, run)
        bank = choice.narrow(run.probes, [i], [k])
    run = run._replace(probes=bank)
    records = _read(given, run)
    layout = layout_of(bank, alarm_threshold(bank, (0, 0)) if given.probes == "one" else None)

    if given.out:
        _write(given, run, records, layout)
    else:
        _summarise(given, run, records, layout)


def _load(given: Namespace, run: "OpenedRun") -> "Scorer":
    """What scores the texts, with the model in memory."""
    from streamprobe.data.tokenize import text_options
    from streamprobe.run.opened import load_cut
    from streamprobe.tools.score_windows import Scorer

    model, tokenizer = load_cut(run)
    return Scorer(model, tokenizer, run.probes, text_options(vars(run.config.data)), _most(given, run))


def _most(given: Namespace, run: "OpenedRun") -> int:
    return given.max_batch_tokens or run.config.model.max_batch_tokens


def _check(given: Namespace) -> None:
    """Raises InputError for options that do not go together, and for a file that cannot be written."""
    from streamprobe.tools.score_tables import table_of

    if given.max_batch_tokens is not None and given.max_batch_tokens < 1:
        raise InputError(f"max_batch_tokens {given.max_batch_tokens}", "at least 1", "correct --max_batch_tokens")
    if given.out:
        table_of(given.out)
        check_file(given.out, "out", given.run)
    else:
        for name, asked in (("resume", given.resume), ("probes all", given.probes == "all")):
            if asked:
                raise InputError(f"--{name} without --out", "a file for every token", "give --out scores.csv")


def _read(given: Namespace, run: "OpenedRun") -> "list[Record | Refused]":
    from streamprobe.data.detect import FormatQuery
    from streamprobe.data.texts import read_texts_to_score
    from streamprobe.run.inputs import format_options

    asked = FormatQuery(given.format, given.id_column, given.problem_column, given.response_column)
    options = format_options(run.config.data)._replace(rules=())
    data = run.config.data
    where = {"split": given.data_split or data.data_split, "config": given.data_config}
    return read_texts_to_score(given.texts, asked, options, usual=data.asked, **where)


def _write(given: Namespace, run: "OpenedRun", records: Any, layout: "Layout") -> None:
    """Writes a row for each token; killed, the same command with --resume goes on behind the last whole window."""
    from streamprobe.data.texts import fingerprint
    from streamprobe.data.tokenize import text_options
    from streamprobe.probes.storage import find_probes
    from streamprobe.system.growing import grow
    from streamprobe.tools.score_tables import table_of
    from streamprobe.tools.score_windows import Tally, score_records

    config = run.config
    facts = {
        "texts": fingerprint(records),
        "probes": hashlib.sha256(find_probes(given.run).read_bytes()).hexdigest(),
        "columns": layout.columns,
        "solver": run.probes.solver,
        "model": config.model.model,
        "max_batch_tokens": _most(given, run),
        "read_as": repr(text_options(vars(config.data))),
    }
    table = table_of(given.out)
    with grow(given.out, "out", facts, given.resume) as file:
        tally = Tally.of(file.state, given.out)
        scorer = _load(given, run)
        for window in score_records(records, scorer, tally):
            head = b"" if file.size else table.head(layout)
            file.add(head + table.rows(layout, window), tally.as_dict())
        file.finish(table.convert)
    say("\n".join([*tally.lines(config.data.prompt), f"wrote {given.out}"]))


def _summarise(given: Namespace, run: "OpenedRun", records: Any, layout: "Layout") -> None:
    """Prints where the probe gives the highest probabilities."""
    from streamprobe.tools.score_windows import Summary, Tally, score_records

    assert layout.alarm is not None
    scorer, tally, summary = _load(given, run), Tally(), Summary(layout.alarm)
    for window in score_records(records, scorer, tally):
        for scored in window:
            summary.add(scored)
    counted, *rest = tally.lines(scorer.options.prompt)
    alarm = f"alarm from a probability of {layout.alarm:.3f} on"
    if isnan(layout.alarm):
        alarm = "no alarm, since validation had no class to choose a threshold by"
    say(f"{layout.probes[0]}, {scorer.probes.solver}; {alarm}\n")
    say("\n".join([*summary.lines(), "", f"{counted}; an alarm in {summary.alarmed:,} texts", *rest]))
    say("every token's probability: give --out scores.csv, .jsonl or .parquet; all probes: --probes all, too")
