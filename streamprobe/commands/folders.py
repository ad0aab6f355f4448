"""`streamprobe report`, `push` and `configs`: what is done with the files of a run, and those of the package."""

from argparse import ArgumentParser, Namespace

from streamprobe.commands.shared import add_run
from streamprobe.system.console import say
from streamprobe.system.shipped import shipped_configs


def push_options(parser: ArgumentParser) -> None:
    """The options of `push`."""
    add_run(parser)
    parser.add_argument("repo", metavar="USER/NAME", help="repository on the hub; made if there is none")
    parser.add_argument("--private", action="store_true", help="make it a private one")


def no_options(_parser: ArgumentParser) -> None:
    """Takes no options."""


def report(given: Namespace) -> None:
    """Draws the page of a run anew."""
    from streamprobe.reporting.files import write_report

    write_report(given.run)
    say(f"wrote {given.run / 'report.html'}")


def push(given: Namespace) -> None:
    """Puts the probes of a run on the hub, and says where."""
    from streamprobe.tools.hub import push_to_hub

    say(push_to_hub(given.run, given.repo, given.private))


def configs(_given: Namespace) -> None:
    """Lists the configs that come with the package: name, what it is for, how to launch it, path."""
    for name, path in shipped_configs().items():
        launch, _, about, *_ = path.read_text(encoding="utf-8").splitlines()
        say(f"{name}\n    {about.lstrip('# ')}\n    {launch.lstrip('# ')}\n    {path}")
