"""Probes that look back: a few heads, each of which chooses by itself which earlier tokens count, and for how long.

    residual_t = sum over heads of N_t / S_t
    S_t = e^-p S_(t-1) + e^(q . x_t)            the weight of all tokens so far
    N_t = e^-p N_(t-1) + e^(q . x_t) v . x_t    what they say

It is attention with one learned question for every head, under which older tokens fade (Vaswani et al. 2017; Press et
al. 2022); the state of a chain has a constant size.  Nothing overflows: instead of S its logarithm is kept, and instead
of N the mean N / S, which every token moves by its share e^(q . x_t) / S_t of the weight.

Shapes: N tokens of a call, L sites, K columns, H heads, D features; S segments of T tokens; M = H K, head by head.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from streamprobe.probes.base import Scorer
from streamprobe.probes.linear import check_parts, linear_logits, mean_parts
from streamprobe.probes.sequences import States, first, on_its_device, running_means, to_call, to_steps
from streamprobe.system.hardware import coarse_float32, exact_float32

SHORTEST = 4.0  # half-life of the first head at the start, in tokens: that of every further one is twice as long
NOTHING = -1e30  # the logarithm of S before the first token; an infinite one would have no difference from itself


def start(n_sites: int, n_columns: int, *, n_heads: int, n_features: int) -> dict[str, Tensor]:
    """The parts of L x K probes whose residual is 0, float32: what training begins with.

    `query` q and `value` v [L, K, H, D], and `pace` [L, K, H]: the logarithm of p over what it is at the start.
    """
    wide = torch.zeros(2, n_sites, n_columns, n_heads, n_features)
    return {"query": wide[0], "value": wide[1], "pace": torch.zeros(n_sites, n_columns, n_heads)}


def _decay(pace: Tensor) -> Tensor:
    """p [L, K, H] of a pace."""
    half_lives = SHORTEST * 2.0 ** torch.arange(pace.shape[-1], dtype=pace.dtype, device=pace.device)
    return math.log(2) / half_lives * pace.exp()


def residual(parts: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """What the probes add to the linear logit, [L, K, S, T], of segments x [L, S, T, D]; differentiable by the parts.

    Each segment is read from its first token on, with nothing before it.  It is fastest where the tokens of a place t
    lie side by side in memory: [L, T, S, D].  While derivatives are taken, factors of float32 products are rounded to
    bfloat16 or TF32 where that is faster.
    """
    weight = torch.cat([_rows(parts["query"]), _rows(parts["value"])], 1)  # [L, 2 M, D]
    decay = _rows(_decay(parts["pace"])[..., None])[..., 0]  # [L, M]
    means = _LookBack.apply(x.transpose(1, 2).contiguous(), weight, decay)  # [L, T, S, M]
    n_heads = parts["pace"].shape[-1]
    return means.unflatten(3, (n_heads, -1)).sum(3).permute(0, 3, 2, 1)


def _rows(part: Tensor) -> Tensor:
    """A part [L, K, H, D] head by head, [L, M, D]: neighbours in memory are alike then, also in sums over heads."""
    return part.transpose(1, 2).flatten(1, 2)


def _log_weights(scores: Tensor, decay: Tensor, sizes: Sequence[int], before: Tensor) -> Tensor:
    """The logarithm of S [L, N, M] from q . x [L, N, M] and p [L, 1, M], in steps; before [L, R, M]: that so far."""
    found = torch.empty_like(scores)
    steps = (x.split(list(sizes), 1) for x in (scores, found))
    for size, score, after in zip(sizes, *steps, strict=True):
        torch.sub(first(before, size), decay, out=after)
        torch.logaddexp(after, score, out=after)
        before = after
    return found


class _LookBack(torch.autograd.Function):
    """The means N / S of every head, with their derivatives in closed form.

    With c_t = 1 - e^(q . x_t) / S_t and G_t the derivative of the loss by mean_t, later tokens reach token t by

        o_t = G_t + c_(t+1) o_(t+1)            d loss / d v . x_t = (1 - c_t) o_t
        b_t = G_t mean_t + c_(t+1) b_(t+1)     d loss / d q . x_t = (1 - c_t) (o_t v . x_t - b_t)

    and, since p adds p t to q . x_t but for what all tokens share, d loss / d p = sum_t t d loss / d q . x_t.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, decay: Tensor) -> Tensor:
        """x [L, T, S, D], weight [L, 2 M, D] (q, then v) and decay [L, M] -> [L, T, S, M]."""
        rows, sizes = x.flatten(1, 2), [x.shape[2]] * x.shape[1]
        with coarse_float32() if any(ctx.needs_input_grad) else exact_float32():
            scores, values = (torch.bmm(rows, own.mT) for own in weight.chunk(2, 1))  # [L, N, M]
        nothing = torch.zeros_like(scores[:, : sizes[0]])
        logs = _log_weights(scores, decay[:, None], sizes, nothing + NOTHING)
        shares = scores.sub_(logs).exp_()
        means = running_means(values, shares, sizes, nothing)
        ctx.save_for_backward(rows, shares, values, means)
        ctx.sizes = sizes
        return means.unflatten(1, x.shape[1:3])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor, Tensor]:
        """The derivatives by weight and decay."""
        x, shares, values, means = ctx.saved_tensors
        [gradient] = gradients
        reaching = gradient.flatten(1, 2).clone(memory_format=torch.contiguous_format)
        pulled = reaching * means
        staying = 1 - shares
        c, o, b = (own.split(ctx.sizes, 1) for own in (staying, reaching, pulled))
        for t in range(len(ctx.sizes) - 1, 0, -1):
            o[t - 1].addcmul_(c[t], o[t])
            b[t - 1].addcmul_(c[t], b[t])
        by_scores = torch.mul(reaching, values, out=staying).sub_(pulled).mul_(shares)
        by_values = reaching.mul_(shares)
        with coarse_float32():
            by_weight = torch.cat([torch.bmm(own.mT, x) for own in (by_scores, by_values)], 1)
        time = torch.arange(len(ctx.sizes), dtype=x.dtype, device=x.device).repeat_interleave(ctx.sizes[0])
        return None, by_weight, time @ by_scores


def to_raw(parts: Mapping[str, Tensor], mean: Tensor, scale: Tensor) -> dict[str, Tensor]:
    """The same residual of raw activations, from parts that act on (x - mean) / scale.

    mean [L, D], scale [L, K or 1, D].  `query` and `value` [L, K, H, D]; `value_bias` [L, K], since the means of the
    constant -v . mean / scale are that constant; that of q . x cancels in N / S.  `decay` is p [L, K, H].
    """
    query, value = (parts[name] / scale[:, :, None] for name in ("query", "value"))
    bias = -torch.einsum("lkhd,ld->lk", value, mean)
    return {"query": query, "value": value, "value_bias": bias, "decay": _decay(parts["pace"])}


def mean_of_folds(parts: Mapping[str, Tensor], n_folds: int) -> dict[str, Tensor]:
    """Raw parts whose residual is the mean of those of F folds: parts [L, F K, ...], fold by fold -> [L, K, ...].

    Each has the heads of all F.
    """
    folds = {name: part.unflatten(1, (n_folds, -1)) for name, part in parts.items()}
    heads = {name: folds[name].transpose(1, 2).flatten(2, 3) for name in ("query", "value", "decay")}
    return heads | {"value": heads["value"] / n_folds, "value_bias": folds["value_bias"].mean(1)}


class AttentionScorer:
    """What heads add to the logits of the tokens of a trip: a `Scorer`."""

    def __init__(self, parts: Mapping[str, Tensor]):
        """`parts` of raw activations, as `to_raw` gives them."""
        self.weight = torch.cat([_rows(parts["query"]), _rows(parts["value"])], 1).float()  # [L, 2 M, D]
        self.decay = _rows(parts["decay"][..., None])[..., 0].float()  # [L, M]
        self.bias, self.n_heads = parts["value_bias"].float(), parts["decay"].shape[-1]
        self.states = States(torch.full_like(self.decay, NOTHING), torch.zeros_like(self.decay))

    @torch.no_grad()
    def __call__(self, acts: Tensor, chain: Tensor) -> Tensor:
        """Residuals [N, L, K], float32, of acts [N, L, D] and chain [N] int64."""
        steps = to_steps(chain)
        x = acts[steps.order].float().transpose(0, 1)  # [L, N, D]
        with exact_float32():
            scores, values = torch.bmm(x, self.weight.mT).chunk(2, 2)  # [L, N, M] each
        log_weight, mean = (own.transpose(0, 1) for own in self.states.of(steps.chains))  # [L, R, M] each
        logs = _log_weights(scores, self.decay[:, None], steps.sizes, log_weight)
        means = running_means(values, (scores - logs).exp_(), steps.sizes, mean)
        self.states.keep(steps.chains, *(own[:, steps.last].transpose(0, 1) for own in (logs, means)))
        return to_call(means.unflatten(2, (self.n_heads, -1)).sum(2) + self.bias[:, None], steps.order)


@dataclass(frozen=True)
class Attention:
    """Linear probes (weight, bias) with such heads beside, of raw activations: see `to_raw`."""

    n_heads: int
    joined: bool = False
    looks_back: bool = True

    @property
    def kind(self) -> str:
        """What it is called in configs and files."""
        return f"attn{self.n_heads}"

    def scorer(self, parts: Mapping[str, Tensor]) -> Scorer:
        """What gives logits of tokens in one trip."""
        heads = on_its_device(lambda device: AttentionScorer({name: part.to(device) for name, part in parts.items()}))
        return lambda acts, chain: linear_logits(parts["weight"], parts["bias"], acts) + heads(acts, chain)

    def mean_of_folds(self, parts: Mapping[str, Tensor], n: int) -> dict[str, Tensor]:
        """Probes with the heads of all n folds, whose logits are the means of theirs."""
        linear = mean_parts({name: parts[name] for name in ("weight", "bias")}, n)
        return linear | mean_of_folds({name: part for name, part in parts.items() if name not in linear}, n)

    def n_features(self, parts: Mapping[str, Tensor]) -> int:
        """D.  Raises ValueError for parts that do not go together."""
        check_parts(parts, {"weight": 3, "bias": 2, "query": 4, "value": 4, "value_bias": 2, "decay": 3})
        return parts["weight"].shape[2]
