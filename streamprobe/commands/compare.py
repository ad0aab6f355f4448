"""`streamprobe compare`: runs side by side, in the terminal and as a page."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from streamprobe.commands.shared import check_file, write_file
from streamprobe.errors import InputError
from streamprobe.system.console import say
from streamprobe.system.wrapping import columns


def options(parser: ArgumentParser) -> None:
    """The options of `compare`."""
    parser.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="folders of finished runs, two or more")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page with their curves and heat maps, too")


def compare(given: Namespace) -> None:
    """Prints what the runs are of and what they found, and writes the page that --html asks for."""
    if len(given.runs) < 2:
        raise InputError(f"{given.runs[0]} alone", "two runs or more", "give another RUN to compare it with")
    for run in given.runs:
        check_file(given.html, "html", run)
    from streamprobe.reporting.comparison import describe, read_runs

    runs = read_runs(given.runs)
    say(describe(runs, columns()))
    if given.html:
        from streamprobe.reporting.html.comparison import render

        write_file(given.html, "html", render(runs))
