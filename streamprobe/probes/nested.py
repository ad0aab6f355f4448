"""Probes that read a control's features and a layer: what does the layer add to them?

Shapes: N tokens, L layers, S = L + 1 sites, K columns, P features of the control, D hidden size.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from streamprobe.errors import InputError
from streamprobe.lags import Column
from streamprobe.probes.base import Scorer
from streamprobe.probes.sites import Site
from streamprobe.system.hardware import exact_float32

NESTED = "nested"


class Blocks(NamedTuple):
    """What nested probes read of some tokens."""

    control: Tensor  # [N, P]
    layers: Tensor  # [N, L, D]


@dataclass(repr=False)
class NestedProbes:
    """At the first site the control itself, and then a probe for each layer that reads both.

    logit[n, s, k] = control_weight[s, k] . control[n] + weight[s, k] . layers[n, s - 1] + bias[s, k]
    """

    sites: list[Site]  # the control's, and then the layers'
    columns: list[Column]
    control_weight: Tensor  # [S, K, P] float32
    weight: Tensor  # [S, K, D] float32; the control's are 0
    bias: Tensor  # [S, K] float32
    threshold: Tensor | None = None  # [S, K]
    solver: str = ""
    about: Mapping[str, Any] = field(default_factory=dict)
    kind: str = NESTED

    @property
    def reads(self) -> list[Site]:
        """What has to be read for them: their sites."""
        return self.sites

    @property
    def layers(self) -> list[int]:
        """The numbers of the layers that are read."""
        return [site.layer for site in self.sites if site.layer is not None]

    @property
    def n_features(self) -> int:
        """P + D."""
        return self.control_weight.shape[2] + self.weight.shape[2]

    def scores(self, acts: Any) -> Tensor:
        """Logits [N, S, K], float32, of Blocks of any float dtype; those of a probe lie side by side in memory."""
        control, layers = acts
        weights = self.control_weight.to(control.device).flatten(0, 1)  # [S K, P]
        with exact_float32():
            logits = torch.addmm(self.bias.to(control.device).flatten()[:, None], weights, control.to(weights.dtype).T)
            logits = logits.unflatten(0, self.bias.shape)  # [S, K, N]
            for site, layer in zip(range(1, len(self.sites)), layers.unbind(1), strict=True):
                logits[site].addmm_(self.weight[site].to(control.device), layer.to(weights.dtype).T)
        return logits.permute(2, 0, 1)

    def scorer(self) -> Scorer:
        """The same for the tokens of a trip: see `Probes`."""
        return lambda acts, chain: self.scores(acts)

    def probabilities(self, acts: Any) -> Tensor:
        """The sigmoids of `scores`, [N, S, K]."""
        return self.scores(acts).sigmoid()

    def place(
        self, layer: int, lag: int, label: str | None = None, target: str | None = None, *, site: str | None = None
    ) -> tuple[int, int]:
        """Where the probe of a layer and a column lies, (s, k).  Raises InputError for one that these have not."""
        for s, each in enumerate(self.sites):
            for k, column in enumerate(self.columns):
                named = (label or column.label, target or column.target, site or each.point)
                if (each.layer, column.lag, column.label, column.target, each.point) == (layer, lag, *named):
                    return s, k
        raise InputError(f"layer {layer} at lag {lag}", "a nested probe of the run", "choose another")

    def tensors(self) -> dict[str, Tensor]:
        """The weights and biases, each beginning with [S, K]."""
        return {"control_weight": self.control_weight, "weight": self.weight, "bias": self.bias}

    @classmethod
    def from_tensors(
        cls, sites: list[Site], columns: list[Column], tensors: Mapping[str, Tensor], *, solver: str, kind: str = NESTED
    ) -> "NestedProbes":
        """The probes whose `tensors` these are.  Raises ValueError for any that are not a grid of nested probes."""
        control, weight, bias = (tensors[name] for name in ("control_weight", "weight", "bias"))
        shape = (len(sites), len(columns))
        if not (control.shape[:2] == weight.shape[:2] == bias.shape == shape and control.dim() == weight.dim() == 3):
            raise ValueError(f"tensors that are no grid of {shape[0]} sites x {shape[1]} columns")
        return cls(sites, columns, control.float(), weight.float(), bias.float(), solver=solver, kind=kind)

    def mean_of_folds(self, n: int) -> "NestedProbes":
        """The means of those of n folds, whose columns stand fold by fold."""
        columns = self.columns[: len(self.columns) // n]
        means = {name: each.unflatten(1, (n, -1)).double().mean(1).float() for name, each in self.tensors().items()}
        return replace(self, columns=columns, threshold=None, **means)

    def clone(self) -> "NestedProbes":
        """A copy that shares no tensor with these."""
        return self._with(Tensor.clone, sites=list(self.sites), columns=list(self.columns))

    def take(self, where: Tensor, other: Any) -> None:
        """Copies other's probes over these where `where` [S, K] is True."""
        for name, ours in self.tensors().items():
            wide = where.view(*where.shape, *[1] * (ours.dim() - 2))
            ours.copy_(torch.where(wide, getattr(other, name), ours))

    def add_to_logits(self, added: Tensor) -> "NestedProbes":
        """The probes with `added` [K] added to every logit."""
        return replace(self, bias=self.bias + added)

    def mapped(self, slope: Tensor, offset: Tensor) -> "NestedProbes":
        """The probes whose logits are slope z + offset for logits z of these; slope, offset [S, K]."""
        slope, offset = (each.to(self.bias) for each in (slope, offset))
        control, weight = self.control_weight * slope[..., None], self.weight * slope[..., None]
        return replace(self, control_weight=control, weight=weight, bias=self.bias * slope + offset)

    def choose(self, columns: list[int], threshold: Tensor) -> "NestedProbes":
        """The probes of these columns, with their thresholds [S, len(columns)]."""
        chosen = self._with(lambda tensor: tensor[:, columns], columns=[self.columns[k] for k in columns])
        return replace(chosen, threshold=threshold)

    def to(self, device: Any) -> "NestedProbes":
        """These with their tensors on `device`."""
        return self._with(lambda tensor: tensor.to(device))

    def _with(self, change: Callable[[Tensor], Tensor], **other: Any) -> "NestedProbes":
        """These with every tensor changed."""
        threshold = None if self.threshold is None else change(self.threshold)
        control, weight, bias = (change(tensor) for tensor in self.tensors().values())
        return replace(self, control_weight=control, weight=weight, bias=bias, threshold=threshold, **other)
