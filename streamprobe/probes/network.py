"""What a small network adds to a linear logit: one layer of rectified units over a site's features.

    residual = sum over units h of outer[h] relu(inner[h] . x + inner_bias[h])

It is a dict of such parts, each beginning [L, K]; in training x is standardised, and `to_raw` folds that in.

Shapes: N tokens that all columns share, n tokens of each column, L sites, K columns, F folds, H units, D features.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from streamprobe.probes.base import Scorer
from streamprobe.probes.linear import check_parts, linear_logits, mean_parts
from streamprobe.system.hardware import exact_float32

MOST_NUMBERS = 2**23  # that units say at once


def start(
    n_sites: int, columns: Sequence[int], n_features: int, *, width: int, seed: int, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Networks of `width` units H for the columns of these numbers, at first without any effect.

    `inner` [L, K, H, D] and `inner_bias` [L, K, H] are uniform in +- 1 / sqrt(D), as those of torch's `nn.Linear`, and
    `outer` [L, K, H] is 0.  What a column is given depends on the seed and its number alone.
    """
    bound = n_features**-0.5
    drawn = []
    for column in columns:
        random = torch.Generator().manual_seed(int(np.random.SeedSequence([seed, column]).generate_state(1)[0]))
        uniform = torch.empty(n_sites, width, n_features + 1).uniform_(-bound, bound, generator=random)
        drawn.append(uniform.to(dtype))
    every = torch.stack(drawn, 1)
    outer = torch.zeros(every.shape[:3], dtype=dtype)
    return {"inner": every[..., :-1].contiguous(), "inner_bias": every[..., -1].contiguous(), "outer": outer}


def units(parts: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """inner . x + inner_bias of every unit [L, K, n, H], of each column's own tokens x [L, K, n, D] or shared ones.

    Shared tokens [L, N, D] take one product per site, and L N K H numbers: give many of them in pieces.
    """
    inner, bias = parts["inner"], parts["inner_bias"]
    if x.dim() == 4:
        return x @ inner.mT + bias[:, :, None]
    found = torch.baddbmm(bias.flatten(1, 2)[:, None], x, inner.flatten(1, 2).mT)  # [L, N, K H]
    return found.unflatten(2, inner.shape[1:3]).transpose(1, 2)


def weigh(parts: Mapping[str, Tensor], active: Tensor) -> Tensor:
    """The sum of what units say, active [L, K, n, H], each times its outer weight: [L, K, n]."""
    return (active @ parts["outer"][..., None])[..., 0]


def residual(parts: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """What networks add to logits [L, K, n], of each column's own tokens x [L, K, n, D] or shared ones [L, n, D]."""
    return weigh(parts, units(parts, x).relu())


def to_raw(parts: Mapping[str, Tensor], mean: Tensor, scale: Tensor) -> dict[str, Tensor]:
    """The parts that read raw features as these read (x - mean) / scale: mean [L, D], scale [L, K or 1, D]."""
    inner = parts["inner"].double() / scale.double()[:, :, None]
    bias = parts["inner_bias"] - torch.einsum("lkhd,ld->lkh", inner, mean.double())
    dtype = parts["inner"].dtype
    return dict(parts) | {"inner": inner.to(dtype), "inner_bias": bias.to(dtype)}


def mean_of_folds(parts: Mapping[str, Tensor], n_folds: int) -> dict[str, Tensor]:
    """The parts [L, K, ...] whose residual is the mean of that of F folds, [L, F K, ...], fold by fold.

    They have the units of all folds, F H of them.
    """
    of_folds = {name: part.unflatten(1, (n_folds, -1)) for name, part in parts.items()}
    joined = {name: part.transpose(1, 2).flatten(2, 3) for name, part in of_folds.items() if part.dim() > 3}
    means = {name: part.mean(1) for name, part in of_folds.items() if part.dim() == 3}
    return joined | means | {"outer": joined["outer"] / n_folds}


@dataclass(frozen=True)
class Units:
    """Linear probes (weight, bias) with units beside, of which `active` makes of what they read what they say."""

    name: str
    n_units: int
    active: Callable[[Tensor], Tensor]
    joined: bool = False
    looks_back: bool = False

    @property
    def kind(self) -> str:
        """What it is called in configs and files."""
        return f"{self.name}{self.n_units}"

    def scorer(self, parts: Mapping[str, Tensor]) -> Scorer:
        """What gives logits of tokens in one trip, a few at a time."""
        at_once = max(64, MOST_NUMBERS // parts["inner"][..., 0].numel())

        def logits(acts: Tensor, chain: Tensor) -> Tensor:
            ours = {name: part.to(acts.device) for name, part in parts.items()}
            found = linear_logits(ours["weight"], ours["bias"], acts)
            with exact_float32():
                for some, into in zip(acts.split(at_once), found.split(at_once), strict=True):
                    x = some.to(ours["inner"].dtype).transpose(0, 1)  # [L, n, D]
                    into += weigh(ours, self.active(units(ours, x))).permute(2, 0, 1)
            return found

        return logits

    def mean_of_folds(self, parts: Mapping[str, Tensor], n: int) -> dict[str, Tensor]:
        """Probes with the units of all n folds, whose logits are the means of theirs."""
        linear = mean_parts({name: parts[name] for name in ("weight", "bias")}, n)
        return linear | mean_of_folds({name: part for name, part in parts.items() if name not in linear}, n)

    def n_features(self, parts: Mapping[str, Tensor]) -> int:
        """D.  Raises ValueError for parts that do not go together."""
        check_parts(parts, {"weight": 3, "bias": 2, "inner": 4, "inner_bias": 3, "outer": 3})
        return parts["weight"].shape[2]


def networks(width: int) -> Units:
    """Networks of so many rectified units."""
    return Units("mlp", width, torch.relu)
