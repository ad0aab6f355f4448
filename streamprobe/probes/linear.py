"""Linear probes, all of a run as stacked tensors.

Shapes: N tokens, L sites, K columns, D features.  One probe per (site, column), in raw activation space.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from streamprobe.lags import Column
from streamprobe.probes.base import Scorer
from streamprobe.probes.describe import describe
from streamprobe.probes.places import place_of
from streamprobe.probes.sites import LINEAR, Site
from streamprobe.system.hardware import exact_float32


@dataclass(repr=False)
class ProbeBank:
    """The L x K linear probes of one run: logit[n, l, k] = weight[l, k] . acts[n, l] + bias[l, k].

    Another `kind` is as linear, and was found in another way.
    """

    sites: list[Site]
    columns: list[Column]
    weight: Tensor  # [L, K, D] float32
    bias: Tensor  # [L, K] float32
    threshold: Tensor | None = None  # [L, K] the logit from which on a probe says yes; None until validation chose it
    solver: str = ""
    about: Mapping[str, Any] = field(default_factory=dict)  # what the file that they were in says: see `load_probes`
    kind: str = LINEAR

    def __repr__(self) -> str:
        return describe(self)

    @property
    def reads(self) -> list[Site]:
        """What has to be read for them, in the order of `acts`: their sites."""
        return self.sites

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
        return linear_logits(self.weight, self.bias, acts)

    def scorer(self) -> Scorer:
        """The same for the tokens of a trip: see `Probes`."""
        return lambda acts, chain: self.scores(acts)

    def probabilities(self, acts: Tensor) -> Tensor:
        """Probabilities [N, L, K], float32, of activations [N, L, D]: see `scores`."""
        return self.scores(acts).sigmoid()

    def score(self, model: Any, tokenizer: Any, texts: Any, **options: Any) -> Any:
        """Probabilities at every token of texts: `streamprobe.score` of these probes."""
        import streamprobe  # by the package's front door: what lets a model read lies above this folder

        return streamprobe.score(self, model, tokenizer, texts, **options)

    def place(
        self, layer: int, lag: int, label: str | None = None, target: str | None = None, *, site: str | None = None
    ) -> tuple[int, int]:
        """Where a probe lies: (l, k), so that `bank.weight[l, k]` [D] is its direction, `scores[:, l, k]` its logits.

        Without a label, a target or a site (such as attn_out): the first that the bank holds.  Raises InputError for a
        probe that it has not.
        """
        return place_of(self.sites, self.columns, layer=layer, lag=lag, label=label, target=target, site=site)

    def tensors(self) -> dict[str, Tensor]:
        """The weights [L, K, D] and biases [L, K]."""
        return {"weight": self.weight, "bias": self.bias}

    @classmethod
    def from_tensors(
        cls, sites: list[Site], columns: list[Column], tensors: Mapping[str, Tensor], *, solver: str, kind: str = LINEAR
    ) -> "ProbeBank":
        """The probes whose `tensors` these are.  Raises ValueError for any that are not a grid of linear probes."""
        weight, bias = tensors["weight"], tensors["bias"]
        if not (weight.shape[:2] == bias.shape == (len(sites), len(columns)) and weight.dim() == 3):
            raise ValueError(f"tensors that are no grid of {len(sites)} layers x {len(columns)} columns")
        return cls(sites, columns, weight.float(), bias.float(), solver=solver, kind=kind)

    def mean_of_folds(self, n: int) -> "ProbeBank":
        """The means of those of n folds, whose columns stand fold by fold."""
        weight, bias = (each.unflatten(1, (n, -1)).double().mean(1).float() for each in (self.weight, self.bias))
        return replace(self, columns=self.columns[: bias.shape[1]], weight=weight, bias=bias, threshold=None)

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


def linear_logits(weight: Tensor, bias: Tensor, acts: Tensor) -> Tensor:
    """weight . acts + bias: logits [N, L, K] of weight [L, K, D], bias [L, K] and acts [N, L, D] of any float dtype."""
    weight, bias = weight.to(acts.device), bias.to(acts.device)
    x = acts.to(weight.dtype).permute(1, 2, 0)  # [L, D, N]
    with exact_float32():
        return torch.baddbmm(bias[..., None], weight, x).permute(2, 0, 1)


def mean_parts(parts: Mapping[str, Tensor], n: int) -> dict[str, Tensor]:
    """The means [L, K, ...] of parts [L, F K, ...] of F folds, fold by fold."""
    return {name: part.unflatten(1, (n, -1)).double().mean(1).float() for name, part in parts.items()}


def check_parts(parts: Mapping[str, Tensor], dims: Mapping[str, int]) -> None:
    """Raises ValueError for parts of other names or numbers of dimensions."""
    if {name: part.dim() for name, part in parts.items()} != dict(dims):
        raise ValueError(f"tensors that are not {', '.join(sorted(dims))}")


def to_raw(weight: Tensor, bias: Tensor, mean: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Probes of standardised features as probes of raw ones.

    weight [L, K, D] and bias [L, K] act on (x - mean) / scale, with mean [L, D], scale [L, K or 1, D]; the result acts
    on x: w'= w / scale, b' = b - w' . mean.
    """
    raw = weight / scale
    return raw, bias - torch.einsum("lkd,ld->lk", raw, mean)
