"""All probes as stacked tensors.

Shapes: N tokens, L layers, K columns, D hidden size.  One linear probe per (layer, column), in raw activation space.
"""

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from streamprobe.errors import InputError, first_line
from streamprobe.lags import Column
from streamprobe.system.network import look_for_hub

FILE = "probes.safetensors"


@dataclass
class ProbeBank:
    """The L x K probes of one run: logit[n, l, k] = weight[l, k] . acts[n, l] + bias[l, k]."""

    layers: list[Any]  # numbers; while a run trains its controls also names
    columns: list[Column]
    weight: Tensor  # [L, K, D] float32
    bias: Tensor  # [L, K] float32
    threshold: Tensor | None = None  # [L, K] the logit from which on a probe says yes; None until validation chose it
    solver: str = ""

    def scores(self, acts: Tensor) -> Tensor:
        """Logits [N, L, K], float32, of activations [N, L, D] of any float dtype, on whatever device these lie."""
        weight, bias = self.weight.to(acts.device), self.bias.to(acts.device)
        x = acts.to(weight.dtype).transpose(0, 1)  # [L, N, D]
        return torch.baddbmm(bias[:, None], x, weight.transpose(1, 2)).transpose(0, 1)

    def probabilities(self, acts: Tensor) -> Tensor:
        """Probabilities [N, L, K], float32, of activations [N, L, D]: see `scores`."""
        return self.scores(acts).sigmoid()

    def place(self, layer: int, lag: int, label: str | None = None, target: str | None = None) -> tuple[int, int]:
        """Where a probe lies: (l, k), so that `bank.weight[l, k]` [D] is its direction, `scores[:, l, k]` its logits.

        Without a label or a target: the first that the bank holds.  Raises InputError for a probe that it has not.
        """
        real = {k: column for k, column in enumerate(self.columns) if not getattr(column, "control", "")}
        for name, value in (("label", label), ("target", target)):
            held = _unique(getattr(column, name) for column in real.values())
            value = held[0] if value is None else value
            real = {k: column for k, column in real.items() if getattr(column, name) == value}
            _require(value, held, name)
        lags = {column.lag: k for k, column in real.items()}
        _require(layer, self.layers, "layer")
        _require(lag, sorted(lags), "lag")
        return self.layers.index(layer), lags[lag]

    def clone(self) -> "ProbeBank":
        """A copy that shares no tensor with this bank."""
        threshold = None if self.threshold is None else self.threshold.clone()
        copies = self.weight.clone(), self.bias.clone(), threshold
        return ProbeBank(list(self.layers), list(self.columns), *copies, self.solver)

    def take(self, where: Tensor, other: "ProbeBank") -> None:
        """Copies other's probes over this bank's where `where` [L, K] is True."""
        self.weight.copy_(torch.where(where[..., None], other.weight, self.weight))
        self.bias.copy_(torch.where(where, other.bias, self.bias))

    def to(self, device: torch.device | str) -> "ProbeBank":
        """This bank with its tensors on `device`."""
        threshold = None if self.threshold is None else self.threshold.to(device)
        moved = self.weight.to(device), self.bias.to(device), threshold
        return ProbeBank(self.layers, self.columns, *moved, self.solver)


def _unique(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))


def _require(value: Any, held: list[Any], name: str) -> None:
    if value not in held:
        raise InputError(
            f"{name} {value}", f"one of {' '.join(map(str, held))}, as in the run", f"choose another {name}"
        )


def fold(weight: Tensor, bias: Tensor, mean: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Probes of standardised features as probes of raw ones.

    weight [L, K, D] and bias [L, K] act on (x - mean) / scale, with mean, scale [L, D]; the result acts on x:
    w'= w / scale, b' = b - w' . mean.
    """
    raw = weight / scale[:, None]
    return raw, bias - torch.einsum("lkd,ld->lk", raw, mean)


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
