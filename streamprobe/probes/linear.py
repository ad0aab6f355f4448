"""Linear probes, all of a run as stacked tensors.

Shapes: N tokens, L sites, K columns, D features.  One probe per (site, column), in raw activation space.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from streamprobe.errors import InputError
from streamprobe.lags import Column
from streamprobe.probes.describe import describe
from streamprobe.probes.sites import Site
from streamprobe.system.hardware import exact_float32


@dataclass(repr=False)
class ProbeBank:
    """The L x K linear probes of one run: logit[n, l, k] = weight[l, k] . acts[n, l] + bias[l, k]."""

    sites: list[Site]
    columns: list[Column]
    weight: Tensor  # [L, K, D] float32
    bias: Tensor  # [L, K] float32
    threshold: Tensor | None = None  # [L, K] the logit from which on a probe says yes; None until validation chose it
    solver: str = ""
    about: Mapping[str, Any] = field(default_factory=dict)  # what the file that they were in says: see `load_probes`
    kind = "linear"

    def __repr__(self) -> str:
        return describe(self)

    @property
    def layers(self) -> list[int]:
        """The numbers of the layers that are read, in the order of the sites."""
        return [site.layer for site in self.sites if site.layer is not None]

    @property
    def n_features(self) -> int:
        """D: the width of what each site holds."""
        return self.weight.shape[2]

    def scores(self, acts: Tensor) -> Tensor:
        """Logits [N, L, K], float32, of activations [N, L, D] of any float dtype, on whatever device these lie.

        Those of a probe lie side by side in memory: what follows takes one probe after another.
        """
        weight, bias = self.weight.to(acts.device), self.bias.to(acts.device)
        x = acts.to(weight.dtype).permute(1, 2, 0)  # [L, D, N]
        with exact_float32():
            return torch.baddbmm(bias[..., None], weight, x).permute(2, 0, 1)

    def probabilities(self, acts: Tensor) -> Tensor:
        """Probabilities [N, L, K], float32, of activations [N, L, D]: see `scores`."""
        return self.scores(acts).sigmoid()

    def score(self, model: Any, tokenizer: Any, texts: Any, **options: Any) -> Any:
        """Probabilities at every token of texts: `streamprobe.score` of these probes."""
        import streamprobe  # by the package's front door: what lets a model read lies above this folder

        return streamprobe.score(self, model, tokenizer, texts, **options)

    def place(self, layer: int, lag: int, label: str | None = None, target: str | None = None) -> tuple[int, int]:
        """Where a probe lies: (l, k), so that `bank.weight[l, k]` [D] is its direction, `scores[:, l, k]` its logits.

        Without a label or a target: the first that the bank holds.  Raises InputError for a probe that it has not.
        """
        real = {k: column for k, column in enumerate(self.columns) if not column.control}
        for name, value in (("label", label), ("target", target)):
            held = _unique(getattr(column, name) for column in real.values())
            value = held[0] if value is None else value
            real = {k: column for k, column in real.items() if getattr(column, name) == value}
            _require(value, held, name)
        lags = {column.lag: k for k, column in real.items()}
        _require(layer, self.layers, "layer")
        _require(lag, sorted(lags), "lag")
        return self.layers.index(layer), lags[lag]

    def tensors(self) -> dict[str, Tensor]:
        """The weights [L, K, D] and biases [L, K]."""
        return {"weight": self.weight, "bias": self.bias}

    @classmethod
    def from_tensors(
        cls, sites: list[Site], columns: list[Column], tensors: dict[str, Tensor], solver: str
    ) -> "ProbeBank":
        """The probes whose `tensors` these are.  Raises ValueError for any that are not a grid of linear probes."""
        weight, bias = tensors["weight"], tensors["bias"]
        if not (weight.shape[:2] == bias.shape == (len(sites), len(columns)) and weight.dim() == 3):
            raise ValueError(f"tensors that are no grid of {len(sites)} layers x {len(columns)} columns")
        return cls(sites, columns, weight.float(), bias.float(), solver=solver)

    def clone(self) -> "ProbeBank":
        """A copy that shares no tensor with this bank."""
        threshold = None if self.threshold is None else self.threshold.clone()
        weight, bias, sites, columns = self.weight.clone(), self.bias.clone(), list(self.sites), list(self.columns)
        return replace(self, sites=sites, columns=columns, weight=weight, bias=bias, threshold=threshold)

    def take(self, where: Tensor, other: Any) -> None:
        """Copies other's probes over this bank's where `where` [L, K] is True."""
        self.weight.copy_(torch.where(where[..., None], other.weight, self.weight))
        self.bias.copy_(torch.where(where, other.bias, self.bias))

    def add_to_logits(self, added: Tensor) -> "ProbeBank":
        """The probes with `added` [K] added to every logit."""
        return replace(self, bias=self.bias + added)

    def choose(self, columns: list[int], threshold: Tensor) -> "ProbeBank":
        """The probes of these columns, with their thresholds [L, len(columns)]."""
        chosen = [self.columns[k] for k in columns]
        weight, bias = self.weight[:, columns], self.bias[:, columns]
        return replace(self, columns=chosen, weight=weight, bias=bias, threshold=threshold)

    def to(self, device: torch.device | str) -> "ProbeBank":
        """This bank with its tensors on `device`."""
        threshold = None if self.threshold is None else self.threshold.to(device)
        return replace(self, weight=self.weight.to(device), bias=self.bias.to(device), threshold=threshold)


def _unique(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))


def _require(value: Any, held: list[Any], name: str) -> None:
    if value not in held:
        raise InputError(
            f"{name} {value}", f"one of {' '.join(map(str, held))}, as in the run", f"choose another {name}"
        )


def to_raw(weight: Tensor, bias: Tensor, mean: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Probes of standardised features as probes of raw ones.

    weight [L, K, D] and bias [L, K] act on (x - mean) / scale, with mean [L, D], scale [L, K or 1, D]; the result acts
    on x: w'= w / scale, b' = b - w' . mean.
    """
    raw = weight / scale
    return raw, bias - torch.einsum("lkd,ld->lk", raw, mean)
