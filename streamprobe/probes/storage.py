"""Probes on disk and on the hub: safetensors, nothing unpickled; and what a checkpoint puts back.

Shapes: L layers, K columns, D hidden size.
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
from streamprobe.probes.linear import ProbeBank
from streamprobe.system.files import write_atomic
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


def bank_tensors(name: str, bank: ProbeBank) -> dict[str, Tensor]:
    """The bank as named tensors for a safetensors file: `<name>.weight` [L, K, D] and `<name>.bias` [L, K]."""
    return {f"{name}.weight": bank.weight.cpu().contiguous(), f"{name}.bias": bank.bias.cpu().contiguous()}


def load_probes(source: str | Path, solver: str | None = None, revision: str | None = None) -> ProbeBank:
    """The probes of a run: `source` is its folder, its `probes.safetensors`, or `user/name` on the Hugging Face hub.

    `solver` picks one of several, `revision` a branch, tag or commit on the hub, which is asked only where no file or
    folder has that name.  Nothing is unpickled.  Raises InputError for what is not there or holds no probes.
    """
    path = find_probes(source, revision)
    about = read_about(path)
    name = solver or about["solvers"][0]
    if name not in about["solvers"]:
        raise InputError(f"solver {name!r}", f"one whose probes {path} holds: {about['solvers']}", "choose another")
    layers, columns = about["layers"], [Column(*c) for c in about["columns"]]
    with safe_open(str(path), framework="pt") as f:
        weight, bias, threshold = (f.get_tensor(f"{name}.{part}") for part in ("weight", "bias", "threshold"))
    grid = (len(layers), len(columns))
    tensors = (weight, bias, threshold)
    if not (weight.shape[:2] == bias.shape == threshold.shape == grid and weight.dim() == 3):
        raise _broken(path, f"but tensors that are no grid of {grid[0]} layers x {grid[1]} columns")
    if not all(tensor.is_floating_point() for tensor in tensors):
        raise _broken(path, f"but tensors of {', '.join(sorted({str(tensor.dtype) for tensor in tensors}))}")
    if not (weight.isfinite().all() and bias.isfinite().all()):
        raise _broken(path, "but numbers that are infinite or none")
    return ProbeBank(layers, columns, weight.float(), bias.float(), threshold.double(), name)


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
    """What a file of probes says about itself: solvers, layers, columns and config, as `report.write_probes` put it."""
    try:
        with safe_open(path, framework="pt") as f:
            about, names = json.loads((f.metadata() or {})["streamprobe"]), set(f.keys())
        wanted = {f"{name}.{part}" for name in about["solvers"] for part in ("weight", "bias", "threshold")}
        if not wanted or not about["layers"] or not about["columns"] or wanted - names:
            raise KeyError(*sorted(wanted - names))
        layers = about["layers"]
        if not all(type(layer) is int for layer in layers) or len(set(layers)) < len(layers):
            raise ValueError(f"layers {layers}")
        about["columns"] = [_column(*column) for column in about["columns"]]
        about["config"] = dict(about.get("config", {}))
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise _broken(path, f"({type(error).__name__}: {error})") from error
    if all(control for *_, control, _seed in about["columns"]):
        raise _broken(path, "but controls")
    return about


def _column(label: object, target: object, lag: Any, control: object = "", seed: Any = 0) -> list[Any]:
    column = [label, target, lag, control, seed]
    if [type(each) for each in column] != [str, str, int, str, int]:
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


def save_tensors(path: Path, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
    """A safetensors file, written atomically and byte-identical for equal input; `about` is its JSON metadata."""
    _save(path, tensors, json.dumps(about, sort_keys=True))


def _save(path: Path, tensors: dict[str, Tensor], about: str) -> None:
    ready = {name: t.detach().cpu().contiguous() for name, t in sorted(tensors.items())}
    write_atomic(path, save(ready, {"streamprobe": about}))  # of two entries the order would be any


def raw_bytes(tensor: Tensor) -> bytes:
    """The numbers of a tensor as they lie in memory, in its order and whatever its strides."""
    whole = tensor.detach().cpu().contiguous()  # of a single row the strides may still be any
    flat = whole.as_strided((whole.numel(),), (1,))  # no copy, which would make 1 of any other true bool
    return flat.view(torch.uint8).numpy().tobytes()
