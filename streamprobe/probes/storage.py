"""Probes on disk and on the hub: safetensors, nothing unpickled; and what a checkpoint puts back.

Shapes: L sites, K columns, D features.
"""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from streamprobe.errors import InputError, first_line
from streamprobe.lags import Column
from streamprobe.probes.base import Probes
from streamprobe.probes.kind_bank import KindBank
from streamprobe.probes.kinds import form_if_any
from streamprobe.probes.linear import LINEAR, ProbeBank
from streamprobe.probes.merged import WIDTHS
from streamprobe.probes.nested import NESTED, NestedProbes
from streamprobe.probes.sites import RESID_POST, Site, checked_site, layer_sites
from streamprobe.system.network import look_for_hub

FILE = "probes.safetensors"


def restore(live: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Copies a saved state over tensors in use, by name; nothing is broadcast or cast.

    Raises InputError, before anything is copied, unless both hold the same names, shapes and dtypes.
    """
    saved, wanted = ({name: _kind(tensor) for name, tensor in own.items()} for own in (state, live))
    for name in sorted(saved.keys() | wanted.keys()):
        if saved.get(name) != wanted.get(name):
            raise InputError(
                f"a checkpoint with {saved.get(name, 'nothing')} as {name}",
                wanted.get(name, "nothing of that name"),
                "put back the checkpoint of this run, or start a new one without --resume",
            )
    for name, tensor in live.items():
        tensor.copy_(state[name])


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def class_of(kind: str) -> type[Probes]:
    """The class of the probes of a kind.  Raises ValueError for a kind that is not known."""
    if kind == NESTED:
        return NestedProbes
    return ProbeBank if form_if_any(kind) is None else KindBank


def group_of(solver: str, kind: str) -> str:
    """What the probes of a solver and kind are called in a file: newton, newton/mlp64."""
    return solver if kind == LINEAR else f"{solver}/{kind}"


def pack_probes(banks: Mapping[str, Probes], about: Mapping[str, Any]) -> bytes:
    """The content of a file of probes: those of each group (see `group_of`), with `about` and their layout as metadata.

    `<solver>.weight` [L, K, D], `.bias` [L, K] and `.threshold` [L, K] are for raw activations; another kind than
    `linear` has tensors of its own names, `<solver>/<kind>.<name>`.  Where other sites are read than the outputs of
    blocks, `sites` says which, and `widths` how many features each has, if not all have as many.
    """
    tensors: dict[str, Tensor] = {}
    kinds: dict[str, list[str]] = {}
    for group, bank in banks.items():
        assert bank.threshold is not None, "probes without a threshold"
        own = bank.tensors() | {"threshold": bank.threshold}
        tensors |= {f"{group}.{name}": tensor for name, tensor in own.items()}
        kinds.setdefault(group.partition("/")[0], []).append(bank.kind)
    first = next(iter(banks.values()))
    layers = [site.layer for site in first.reads]
    layout = {"solvers": list(kinds), "layers": layers, "columns": [column.saved for column in first.columns]}
    more: dict[str, Any] = {"kinds": kinds} if any(own != [LINEAR] for own in kinds.values()) else {}
    if any(site.point != RESID_POST for site in first.reads):
        more |= {"sites": [list(site) for site in first.reads]}
        more |= {WIDTHS: first.about[WIDTHS]} if WIDTHS in first.about else {}
    return pack_tensors(tensors, {**about, **layout, **more})


def load_probes(
    source: str | Path, solver: str | None = None, revision: str | None = None, *, kind: str | None = None
) -> Any:
    """The probes of a run: `source` is its folder, its `probes.safetensors`, or `user/name` on the Hugging Face hub.

    `solver` and `kind` pick one of several (none: the first, which is linear); `revision` is a branch, tag or commit on
    the hub, which is asked only where no file or folder has that name.  Their `about` is what `pack_probes` put into
    the file, and the `source`.  Nothing is unpickled.  Raises InputError for what is not there or holds no probes.
    """
    path = find_probes(source, revision)
    about = read_about(path)
    name = solver or about["solvers"][0]
    if name not in about["solvers"]:
        raise InputError(f"solver {name!r}", f"one whose probes {path} holds: {about['solvers']}", "choose another")
    kinds = kinds_in(about, name)
    chosen = kinds[0] if kind is None else kind
    if chosen not in kinds:
        raise InputError(f"kind {chosen!r}", f"one whose probes {path} holds: {' '.join(kinds)}", "choose another")
    bank = _read(path, about, name, chosen)
    bank.about = about | {"source": str(source)}
    return bank


def kinds_in(about: Mapping[str, Any], solver: str) -> list[str]:
    """The kinds of probes of a solver that a file holds, by what it says of itself."""
    return about.get("kinds", {}).get(solver, [LINEAR])


def sites_in(about: Mapping[str, Any]) -> list[Site]:
    """The sites whose probes a file holds, by what it says of itself."""
    return [Site(*site) for site in about["sites"]] if "sites" in about else layer_sites(about["layers"])


def _read(path: Path, about: Mapping[str, Any], solver: str, kind: str) -> Any:
    """The probes of one solver and kind that a file holds."""
    group = group_of(solver, kind)
    with safe_open(str(path), framework="pt") as f:
        own = [key for key in f.keys() if key.startswith(f"{group}.")]
        tensors = {key.removeprefix(f"{group}."): f.get_tensor(key) for key in own}
    if not all(tensor.is_floating_point() for tensor in tensors.values()):
        raise _broken(path, f"but tensors of {', '.join(sorted({str(each.dtype) for each in tensors.values()}))}")
    if "threshold" not in tensors:
        raise _broken(path, f"of kind {kind}")
    threshold = tensors.pop("threshold")
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise _broken(path, "but numbers that are infinite or none")
    columns = [Column(*c) for c in about["columns"]]
    try:
        bank = class_of(kind).from_tensors(sites_in(about), columns, tensors, solver=solver, kind=kind)
        if threshold.shape != bank.bias.shape:
            raise ValueError(f"tensors that are no grid of {len(bank.sites)} layers x {len(columns)} columns")
    except (KeyError, ValueError) as error:
        raise _broken(path, f"but {error}") from error
    bank.threshold = threshold.double()
    return bank


def find_probes(source: str | Path, revision: str | None = None) -> Path:
    """The safetensors file that `source` of `load_probes` stands for; fetched, if it is on the hub."""
    path = Path(source)
    if os.path.isdir(path) and not os.path.isfile(path / FILE):
        raise InputError(f"{path}, a folder without {FILE}", "the folder of a finished run", "let it finish: --resume")
    if os.path.exists(path):
        return path / FILE if path.is_dir() else path
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(source)):
        raise InputError(f"{path}, which does not exist", "the folder of a run, or user/name on the hub", "check it")
    return _fetch(str(source), revision)


def read_about(path: Path) -> dict[str, Any]:
    """What a file of probes says about itself: solvers, layers, columns and config, as `pack_probes` put it."""
    try:
        with safe_open(path, framework="pt") as f:
            about, names = json.loads((f.metadata() or {})["streamprobe"]), set(f.keys())
        wanted = {f"{name}.threshold" for name in about["solvers"]}
        if not wanted or not about["layers"] or not about["columns"] or wanted - names:
            raise KeyError(*sorted(wanted - names))
        _check_sites(about)
        about["columns"] = [checked_column(*column) for column in about["columns"]]
        about["config"] = dict(about.get("config", {}))
        kinds = about.get("kinds", {})
        if not all(isinstance(own, list) and all(isinstance(kind, str) for kind in own) for own in kinds.values()):
            raise TypeError(f"kinds {kinds}")
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise _broken(path, f"({type(error).__name__}: {error})") from error
    if all(control for *_, control, _seed in about["columns"]):
        raise _broken(path, "but controls")
    return about


def _check_sites(about: Mapping[str, Any]) -> None:
    """Raises ValueError or TypeError for layers and sites that cannot be those of probes."""
    layers, given = about["layers"], about.get("sites")
    sites = layer_sites(layers) if given is None else [checked_site(*site) for site in given]
    if not all(type(layer) is int for layer in layers) or len(set(sites)) < len(sites):
        raise ValueError(f"layers {layers}")
    if [site.layer for site in sites] != layers or any(site.is_control for site in sites):
        raise ValueError(f"sites {given} of layers {layers}")
    widths = about.get(WIDTHS, [1] * len(sites))
    if len(widths) != len(sites) or not all(type(width) is int and width > 0 for width in widths):
        raise ValueError(f"widths {widths}")


def checked_column(*given: Any) -> list[Any]:
    """A column as a file holds it: label, target and lag, and where it is of a control its name and seed."""
    column = Column(*given).saved
    if [type(each) for each in column] != [str, str, int, str, int] or len(given) > len(column):
        raise TypeError(f"column {column}")
    return column


def _broken(path: Path, why: str) -> InputError:
    return InputError(f"{path}, which holds no probes {why}", f"a {FILE} that a run wrote", "check the path")


def _fetch(repo: str, revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HFValidationError, HTTPError

    look_for_hub(repo)
    try:
        return Path(hf_hub_download(repo, FILE, revision=revision))
    except (OSError, HTTPError, HFValidationError) as error:
        raise InputError(
            f"{repo}, which is no folder here and was not found on the hub ({first_line(error)})",
            f"the folder of a run, or a repository on the hub that holds {FILE}",
            "check the name and the connection; for a private one `hf auth login` or set HF_TOKEN",
        ) from error


def pack_tensors(tensors: Mapping[str, Tensor], about: Any) -> bytes:
    """The content of a safetensors file, byte-identical for equal input; `about` is its metadata: text, or JSON."""
    ready = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in sorted(tensors.items())}
    text = about if isinstance(about, str) else json.dumps(about, sort_keys=True)
    return save(ready, {"streamprobe": text})  # of two entries the order would be any


def raw_bytes(tensor: Tensor) -> bytes:
    """The numbers of a tensor as they lie in memory, in its order and whatever its strides."""
    whole = tensor.detach().cpu().contiguous()  # of a single row the strides may still be any
    flat = whole.as_strided((whole.numel(),), (1,))  # no copy, which would make 1 of any other true bool
    return flat.view(torch.uint8).numpy().tobytes()
