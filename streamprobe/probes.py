"""All probes as stacked tensors.

Shapes: N tokens, L layers, K columns, D hidden size.  One linear probe per (layer, column), in raw activation space.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from streamprobe.lags import Column


@dataclass
class ProbeBank:
    """The L x K probes of one run: logit[n, l, k] = weight[l, k] . acts[n, l] + bias[l, k]."""

    layers: list[int | str]  # numbers of layers, or names of controls
    columns: list[Column]
    weight: Tensor  # [L, K, D] float32
    bias: Tensor  # [L, K] float32

    def scores(self, acts: Tensor) -> Tensor:
        """Logits [N, L, K], float32, of activations [N, L, D] of any float dtype."""
        x = acts.to(self.weight.dtype).transpose(0, 1)  # [L, N, D]
        return torch.baddbmm(self.bias[:, None], x, self.weight.transpose(1, 2)).transpose(0, 1)

    def clone(self) -> "ProbeBank":
        """A copy that shares no tensor with this bank."""
        return ProbeBank(list(self.layers), list(self.columns), self.weight.clone(), self.bias.clone())

    def take(self, where: Tensor, other: "ProbeBank") -> None:
        """Copies other's probes over this bank's where `where` [L, K] is True."""
        self.weight.copy_(torch.where(where[..., None], other.weight, self.weight))
        self.bias.copy_(torch.where(where, other.bias, self.bias))

    def to(self, device: torch.device | str) -> "ProbeBank":
        """This bank with its tensors on `device`."""
        return ProbeBank(self.layers, self.columns, self.weight.to(device), self.bias.to(device))


def fold(weight: Tensor, bias: Tensor, mean: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Probes of standardised features as probes of raw ones.

    weight [L, K, D] and bias [L, K] act on (x - mean) / scale, with mean, scale [L, D]; the result acts on x:
    w'= w / scale, b' = b - w' . mean.
    """
    raw = weight / scale[:, None]
    return raw, bias - torch.einsum("lkd,ld->lk", raw, mean)


def bank_tensors(name: str, bank: ProbeBank) -> dict[str, Tensor]:
    """The bank as named tensors for a safetensors file: `<name>.weight` [L, K, D] and `<name>.bias` [L, K]."""
    return {f"{name}.weight": bank.weight.cpu().contiguous(), f"{name}.bias": bank.bias.cpu().contiguous()}


def load_probes(path: str | Path, solver: str | None = None) -> ProbeBank:
    """The probes of a run: `path` is its folder or its `probes.safetensors`; `solver` picks one of several.

    Raises FileNotFoundError where there is no such file, KeyError where it has no such solver.  Nothing is unpickled.
    """
    path = Path(path)
    with safe_open(path / "probes.safetensors" if path.is_dir() else path, framework="pt") as f:
        about = json.loads(f.metadata()["streamprobe"])
        name = solver or about["solvers"][0]
        if name not in about["solvers"]:
            raise KeyError(f"no probes of solver {name!r} in {path}; it holds {about['solvers']}")
        columns = [Column(*c) for c in about["columns"]]
        return ProbeBank(about["layers"], columns, f.get_tensor(f"{name}.weight"), f.get_tensor(f"{name}.bias"))
