"""What several commands take and do: the folder of a run, one of its probes, how its model writes, a file to write."""

import os
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamprobe.errors import InputError
from streamprobe.solvers.table import SOLVERS
from streamprobe.system.console import say
from streamprobe.system.files import check_output, write_output

if TYPE_CHECKING:
    from streamprobe.config.load import RunConfig
    from streamprobe.model.sampling import Sampling
    from streamprobe.run.opened import OpenedRun


def add_run(parser: ArgumentParser) -> None:
    """The option that names a run."""
    parser.add_argument("run", metavar="RUN", type=Path, help="folder of a finished run")


def add_probe(parser: ArgumentParser) -> None:
    """Options that say which probe of the run is meant, and where its model lies."""
    add = parser.add_argument
    add("--solver", help=f"whose probes: {' or '.join(SOLVERS)} (default: the run's first)")
    add("--kind", help="kind of the probes: linear, or another one that the run has trained (default: linear)")
    add("--layer", type=int, help="layer of the probe (default: as in the run's verdict)")
    add(
        "--site",
        help="what of the layer it reads, such as attn_out (default: as in the run's verdict)",
    )
    add("--lag", type=int, help="tokens that the probe looks ahead (default: as in the run's verdict)")
    add("--label", help="label of the probe (default: the run's first)")
    add("--target", help="target of the probe: token, onset or within (default: as in the run's verdict)")
    add_model(parser)


def add_model(parser: ArgumentParser) -> None:
    """Options that say where the run's model lies."""
    add = parser.add_argument
    add("--model", help="folder or hub id of the model, if it is no longer where the run found it")
    add("--trust_remote_code", action="store_true", help="run the Python code that comes with the run's model")
    add("--device_map", help="where the model lies: auto, cpu, cuda, ... (default: as in the run)")


def add_sampling(parser: ArgumentParser) -> None:
    """Options that say how the model writes."""
    add = parser.add_argument
    add("--max_new_tokens", type=int, default=256, help="most tokens of a response (%(default)s)")
    add("--temperature", type=float, default=0.0, help="of the sampling; 0 takes the likeliest token (%(default)s)")
    add("--top_p", type=float, default=1.0, help="sample among the likeliest tokens of so much mass (%(default)s)")
    add("--seed", type=int, default=0, help="seed of the sampling (%(default)s)")


def sampling_of(given: Namespace) -> "Sampling":
    """How the model writes.  Raises InputError for what cannot be."""
    from streamprobe.model.sampling import Sampling

    return Sampling(given.max_new_tokens, given.temperature, given.top_p, given.seed)


def open_probes(given: Namespace, data: str | None = None) -> "OpenedRun":
    """The run that is meant, with what is given otherwise than it was.  Raises InputError as `open_run` does."""
    from streamprobe.run.opened import open_run

    changed = {"model": given.model, "device_map": given.device_map, "data": data}
    return open_run(given.run, solver=given.solver, kind=given.kind, changed=changed, trusted=given.trust_remote_code)


def refuse_data(config: "RunConfig", data: str | None) -> None:
    """Raises InputError where `data` are given as those of a run of a stream, which has kept its chains itself."""
    if config.stream.streaming and data:
        raise InputError(f"data {data} as those of a stream", "the chains that it has kept itself", "drop --data")


def place_of(given: Namespace, run: "OpenedRun") -> tuple[int, int]:
    """Where the probe that is meant lies in its bank, (l, k).  Raises InputError for one that the run has not."""
    from streamprobe.tools.choice import choose_probe

    return choose_probe(run.folder, run.probes, **given_place(given))


def given_place(given: Namespace) -> dict[str, Any]:
    """What is said of the probe that is meant."""
    return {name: getattr(given, name) for name in ("layer", "lag", "label", "target", "site")}


def check_file(path: Path | None, name: str, run: Path | None = None) -> None:
    """Raises InputError for a file that --`name` gives and that cannot be written, before the work is done.

    Nor may it be one that the `run` has written.
    """
    if not path:
        return
    from streamprobe.run.folder import file_names

    check_output(path, name)
    own = {os.path.realpath(run / each) for each in file_names()} if run else set()
    if os.path.realpath(path) in own:  # pathlib's resolve() raises on a loop of links before Python 3.13
        raise InputError(f"{name} {path}, which is a file of the run", "another file", f"give another --{name}")


def write_file(path: Path, name: str, content: str, tell: Callable[[str], None] = say) -> None:
    """Writes what --`name` asked for, and tells so; raises InputError where that cannot be."""
    write_output(path, content.encode(errors="backslashreplace"), name)
    tell(f"wrote {path}")
