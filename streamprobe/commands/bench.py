"""`streamprobe bench` and its kin: what training, watching, sharing the work and long streams cost."""

import json
from argparse import ArgumentParser, Namespace
from pathlib import Path

from streamprobe.bench.shapes import SHAPES, default_shape
from streamprobe.commands.shared import check_file
from streamprobe.system.console import say
from streamprobe.system.files import write_output


def _add_shape(parser: ArgumentParser) -> None:
    text = f"size of the model ({default_shape(cuda=True)} on a GPU, else {default_shape(cuda=False)})"
    parser.add_argument("--shape", choices=list(SHAPES), help=text)


def options(parser: ArgumentParser) -> None:
    """The options of `bench`."""
    _add_shape(parser)
    add = parser.add_argument
    add("--chains", type=int, help="synthetic chains, a tenth of them for validation (1000 on a GPU, else 60)")
    add(
        "--max_batch_tokens",
        type=int,
        default=8192,
        help="most tokens in one forward pass, padding included (%(default)s)",
    )
    add("--repeats", type=int, default=3, help="of each pass, of which the median counts (%(default)s)")
    add("--offline_chains", type=int, default=20, help="chains on which the offline way is measured (%(default)s)")
    add("--offline_epochs", type=int, default=5, help="epochs of the offline way; one is measured (%(default)s)")
    add("--peer", choices=["probelab"], help="another package to measure, where it is installed")
    add("--json", type=Path, metavar="FILE", help="where to write every number, with the hardware and the versions")


def watching_options(parser: ArgumentParser) -> None:
    """The options of `bench watching`."""
    _add_shape(parser)
    add = parser.add_argument
    add("--tokens", type=int, default=100, help="tokens to write (%(default)s)")
    add("--rounds", type=int, default=5, help="timed rounds (%(default)s)")
    add("--cpu_time", action="store_true", help="seconds of this process on the CPU, of all its threads")


def processes_options(parser: ArgumentParser) -> None:
    """The options of `bench processes`."""
    _add_shape(parser)
    add = parser.add_argument
    add("--processes", type=int, nargs="+", default=[1, 2], help="how many, each in turn (1 2)")
    add("--chains", type=int, default=60, help="synthetic chains, a tenth of them for validation (%(default)s)")
    add("--repeats", type=int, default=3, help="of each, of which the median counts (%(default)s)")
    add("--json", type=Path, metavar="FILE", help="where to write every number")


def streams_options(parser: ArgumentParser) -> None:
    """The options of `bench streams`."""
    add = parser.add_argument
    add("--tokens", type=int, nargs="+", default=[10**6, 10**7], help="of training chains, in turn (1000000 10000000)")
    add("--json", type=Path, metavar="FILE", help="where to write every number")


def bench(given: Namespace) -> None:
    """Measures what training costs, and writes the numbers that --json asks for."""
    import torch

    from streamprobe.bench import training_cost

    cuda = torch.cuda.is_available()
    chains = (1000 if cuda else 60) if given.chains is None else given.chains
    own = {name: value for name, value in vars(given).items() if name != "json"}
    asked = training_cost.Options(**own | {"shape": given.shape or default_shape(cuda), "chains": chains})
    check_file(given.json, "json")
    result = training_cost.measure_training(asked, torch.device("cuda" if cuda else "cpu"))
    if given.json:
        write_output(given.json, (json.dumps(result, indent=1, default=str) + "\n").encode(), "json")
    say(training_cost.table(result))


def watching(given: Namespace) -> None:
    """Measures what watching costs."""
    import torch

    from streamprobe.bench.monitor_cost import measure_watching

    cuda = torch.cuda.is_available()
    shape, device = given.shape or default_shape(cuda), torch.device("cuda" if cuda else "cpu")
    say(measure_watching(shape, device, tokens=given.tokens, rounds=given.rounds, cpu_time=given.cpu_time))


def processes(given: Namespace) -> None:
    """Measures what it costs to share a pass among processes."""
    from streamprobe.bench.processes import measure_processes, table

    check_file(given.json, "json")
    shape = given.shape or default_shape(cuda=False)
    result = measure_processes(shape, given.chains, given.processes, given.repeats)
    if given.json:
        write_output(given.json, (json.dumps(result, indent=1) + "\n").encode(), "json")
    say(table(result))


def streams(given: Namespace) -> None:
    """Measures whether memory grows with the length of a stream."""
    from streamprobe.bench.stream_memory import measure_streams, table

    check_file(given.json, "json")
    result = measure_streams(given.tokens)
    if given.json:
        write_output(given.json, (json.dumps(result, indent=1) + "\n").encode(), "json")
    say(table(result))
