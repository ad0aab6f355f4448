"""Probes of a running mean: what they read is the mean of the response so far, in which older tokens count less.

    m_t = sum_{s <= t} a^(t - s) x_s / sum_{s <= t} a^(t - s),    a = 2^(-1 / half_life)

Time t is counted in tokens that may be samples, from the first one of the response; half_life is in such tokens.
A linear probe of m_t is the running mean of its own logits w . x: scoring needs one number a probe and chain.

Shapes: N tokens of R chains, L sites, K columns, D features; B chains of T tokens, padded on the right.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from streamprobe.probes.base import Scorer
from streamprobe.probes.linear import check_parts, mean_parts
from streamprobe.probes.sequences import States, on_its_device, running_means, to_call, to_steps
from streamprobe.system.hardware import exact_float32

BLOCK = 64  # tokens whose means are one product of matrices


class MeanState(NamedTuple):
    """Where the running means of B chains stand."""

    mean: Tensor  # [B, D] float32
    weight: Tensor  # [B] float32: the sum of a^(t - s) so far, 0 where no token has come


class Means(NamedTuple):
    """Running means at the tokens of a chunk, and behind it."""

    values: Tensor  # [B, T, D] float32; of no use where a token is no sample
    state: MeanState


def running_mean(acts: Tensor, support: Tensor, half_life: float, state: MeanState | None = None) -> Means:
    """The means m_t of one site of B chains, from a chunk of their tokens: what the probes are trained on.

    acts [B, T, D] of any float dtype; support [B, T] bool: which tokens may be samples.  What others hold is not used,
    whatever it is; one that may and is not finite leaves no number in its block.  `state` is that behind the chunk
    before (None: the chains begin); chunks of any size give the same means but for rounding, about 1e-6 of the largest
    feature.
    """
    if state is None:
        zeros = torch.zeros(len(acts), acts.shape[2], device=acts.device)
        state = MeanState(zeros, zeros[:, :1].sum(1))
    values = torch.empty(acts.shape, device=acts.device)
    for x, own, found in zip(acts.split(BLOCK, 1), support.split(BLOCK, 1), values.split(BLOCK, 1), strict=True):
        shares = _shares(own, half_life, state.weight)
        said = torch.cat([x.new_empty(len(x), 1, x.shape[2]), x], 1).float()  # behind the mean of all before
        said[:, 0] = state.mean
        said[:, 1:].masked_fill_(~own[..., None], 0)
        with exact_float32():
            torch.bmm(shares.of_mean, said, out=found)
        state = MeanState(found[:, -1], shares.weight)
    return Means(values, state)


class _Shares(NamedTuple):
    """What the mean at each token of a block of n is made of."""

    of_mean: Tensor  # [B, n, 1 + n] float32: of the mean before the block, and of each of its tokens
    weight: Tensor  # [B] float32: the sum of a^(t - s) behind it


def _shares(support: Tensor, half_life: float, weight: Tensor) -> _Shares:
    """The shares in a block support [B, n], where that sum is weight [B] before it."""
    time = support.cumsum(1)  # since the block began
    age = (time[:, :, None] - time[:, None, :]).clamp_min(0)  # [B, t, s]
    earlier = torch.ones_like(age[0], dtype=torch.bool).tril() & support[:, None]
    before = torch.exp2(-time / half_life) * weight[:, None]  # [B, n]
    counted = torch.cat([before[..., None], torch.exp2(-age / half_life) * earlier], 2)
    whole = counted.sum(2, keepdim=True)
    return _Shares(counted / whole.clamp_min(torch.finfo(torch.float32).tiny), whole[:, -1, 0])


class EmaScorer:
    """Scores the tokens of a trip by linear probes of the running mean: a `Scorer`."""

    def __init__(self, weight: Tensor, bias: Tensor, half_life: float):
        """weight [L, K, D] and bias [L, K] of raw means m_t; half_life in tokens."""
        self.weight, self.bias, self.decay = weight.float(), bias.float(), 2 ** (-1 / half_life)
        self.states = States(torch.zeros_like(self.bias), self.bias.new_zeros(()))

    @torch.no_grad()
    def __call__(self, acts: Tensor, chain: Tensor) -> Tensor:
        """Logits [N, L, K], float32, of acts [N, L, D] and chain [N] int64."""
        steps = to_steps(chain)
        x = acts[steps.order].float().transpose(0, 1)  # [L, N, D]
        with exact_float32():
            own = torch.bmm(x, self.weight.mT)  # [L, N, K]: w . x_t
        mean, weight = self.states.of(steps.chains)  # [R, L, K], [R]
        weights = own.new_empty(len(chain))  # [N]
        for size, behind in zip(steps.sizes, weights.split(steps.sizes), strict=True):
            weight = torch.add(1, weight[:size], alpha=self.decay, out=behind)
        logits = running_means(own, 1 / weights[None, :, None], steps.sizes, mean.transpose(0, 1))
        self.states.keep(steps.chains, logits[:, steps.last].transpose(0, 1), weights[steps.last])
        return to_call(logits + self.bias[:, None], steps.order)


@dataclass(frozen=True)
class RunningMeans:
    """Linear probes of the running mean: weight [L, K, D] and bias [L, K]."""

    half_life: int
    joined: bool = False
    looks_back: bool = True

    @property
    def kind(self) -> str:
        """What it is called in configs and files."""
        return f"ema{self.half_life}"

    def scorer(self, parts: Mapping[str, Tensor]) -> Scorer:
        """What gives logits of tokens in one trip."""
        weight, bias = parts["weight"], parts["bias"]
        return on_its_device(lambda device: EmaScorer(weight.to(device), bias.to(device), self.half_life))

    def mean_of_folds(self, parts: Mapping[str, Tensor], n: int) -> dict[str, Tensor]:
        """The means of those of n folds."""
        return mean_parts(parts, n)

    def n_features(self, parts: Mapping[str, Tensor]) -> int:
        """D.  Raises ValueError for parts that do not go together."""
        check_parts(parts, {"weight": 3, "bias": 2})
        return parts["weight"].shape[2]
