"""Probes trained step by step, as the original experiment did.

Shapes: N tokens, L layers, K columns, D hidden size.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import softplus

from streamprobe.activations.batch import Extras
from streamprobe.lags import Column
from streamprobe.probes.linear import ProbeBank, to_raw
from streamprobe.probes.sites import Site
from streamprobe.probes.storage import restore
from streamprobe.solvers.scaling import first_scaling


class AdamSolver:
    """Class-weighted logistic regression by Adam on mini-batches: the recipe of the original experiment.

    For every probe, with z the logit, y the target and the mean over those tokens of the mini-batch that are valid for
    the probe's column:

        loss = mean(p y softplus(-z) + (1 - y) softplus(z)) + l2 |w|^2

    p = negatives / positives in the training data (`positive_weight`).  The losses are summed over probes, so each is
    trained as if it were alone.  Gradients are in closed form; one batched product serves all layers and columns.
    With `standardize`, features are (x - mean) / std, by the moments of the first chunk of tokens, which are then kept:
    any fixed affine map gives the same family of probes, and `bank` folds this one back into raw space.
    """

    name = "adam"
    shuffles, resumable = True, True

    def __init__(
        self,
        sites: Sequence[Site],
        columns: Sequence[Column],
        hidden_size: int,
        positive_weight: Tensor,
        *,
        learning_rate: float = 1e-3,
        l2: float = 0.01,
        batch_size: int = 64,
        standardize: bool = True,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ):
        """`positive_weight` is [K], `batch_size` tokens.

        Weights start as `nn.Linear`'s do: uniform in +- 1 / sqrt(hidden_size).
        """
        self.sites, self.columns = list(sites), list(columns)
        self.positive_weight = positive_weight.to(device, torch.float32)
        self.l2, self.batch_size, self.standardize = l2, batch_size, standardize
        random = torch.Generator().manual_seed(seed)
        bound = hidden_size**-0.5
        n_sites, n_columns = len(sites), len(columns)
        start = torch.empty(n_columns, n_sites, hidden_size + 1).uniform_(-bound, bound, generator=random)
        start = start.transpose(0, 1).to(device)  # a column's start does not depend on those behind it
        self.weight = start[..., :-1].contiguous()  # [L, K, D]
        self.bias = start[..., -1].contiguous()  # [L, K]
        self.mean = torch.zeros(n_sites, hidden_size, device=device)
        self.scale = torch.ones_like(self.mean)
        self.started = torch.zeros((), dtype=torch.bool)  # mean and scale are final
        self.adam = torch.optim.Adam([self.weight, self.bias], lr=learning_rate, fused=True)
        self._create_adam_state()
        self.loss_ = torch.zeros(n_sites, n_columns, device=device)
        self.n_loss = torch.zeros(n_columns, device=device)
        self.converged = torch.zeros_like(self.loss_, dtype=torch.bool)
        self.gradient_norm = torch.full_like(self.loss_, float("nan"))

    def _create_adam_state(self) -> None:
        """Adam makes its moments at its first step; a step along a zero gradient leaves all but its count at zero."""
        self.weight.grad, self.bias.grad = torch.zeros_like(self.weight), torch.zeros_like(self.bias)
        self.adam.step()
        for state in self.adam.state.values():
            state["step"].zero_()

    def begin(self, acts: Tensor | None, source: int) -> None:
        """Nothing: every rank is given the same tokens."""

    @torch.no_grad()
    def step(self, acts: Tensor, targets: Tensor, valid: Tensor, extras: Extras | None = None) -> None:
        """One Adam step for each `batch_size` tokens of acts [N, L, D], targets [N, K] and valid [N, K].

        Their folds do not matter here: those that do not train a column are not valid for it.
        """
        if not self.started:
            self.started.fill_(True)
            if self.standardize:
                for ours, first in zip((self.mean, self.scale), first_scaling(acts), strict=True):
                    ours.copy_(first)
        y, n = targets.float(), len(targets)
        weight = valid * torch.where(targets, self.positive_weight, 1.0)  # [N, K]
        for rows in (slice(start, start + self.batch_size) for start in range(0, n, self.batch_size)):
            # Made for a mini-batch at a time: in memory that is warm, four times as fast as for all of the tokens.
            x = (acts[rows].transpose(0, 1) - self.mean[:, None]) / self.scale[:, None]
            self._update(x, y[rows], weight[rows], valid[rows].sum(0))

    def _update(self, x: Tensor, y: Tensor, weight: Tensor, n: Tensor) -> None:
        """x [L, n, D], y [n, K], weight [n, K] of each token in its column, n [K] tokens that are valid."""
        z = torch.baddbmm(self.bias[:, None], x, self.weight.transpose(1, 2))  # [L, n, K]
        self.loss_ += (weight * (softplus(z) - y * z)).sum(1)
        self.n_loss += n
        slope = weight / n.clamp_min(1) * (z.sigmoid() - y)
        self.weight.grad = torch.baddbmm(self.weight, slope.transpose(1, 2), x, beta=2 * self.l2)
        self.bias.grad = slope.sum(1)
        self.adam.step()

    def end_part(self) -> None:
        """Nothing: no token waits."""

    def end_pass(self) -> None:
        """Nothing: Adam's steps do not wait for the end of a pass."""

    def bank(self) -> ProbeBank:
        """The probes as they are now, in raw activation space."""
        return ProbeBank(
            self.sites, self.columns, *to_raw(self.weight, self.bias, self.mean, self.scale[:, None]), solver=self.name
        ).clone()

    def loss(self) -> Tensor:
        """Mean class-weighted loss [L, K] since the last call, each mini-batch's before its step, without the penalty.

        NaN where no token was valid.
        """
        mean = self.loss_ / self.n_loss
        self.loss_, self.n_loss = torch.zeros_like(self.loss_), torch.zeros_like(self.n_loss)
        return mean

    def state(self) -> dict[str, Tensor]:
        """Weights, Adam's moments and the standardisation."""
        return {key: value.to("cpu", copy=True) for key, value in self._live().items()}

    def load(self, state: dict[str, Tensor]) -> None:
        """Takes up where the solver that gave `state` stood.  Raises InputError for the state of another one."""
        restore(self._live(), state)

    def _live(self) -> dict[str, Tensor]:
        """The tensors themselves, by name."""
        tensors = {name: getattr(self, name) for name in ("weight", "bias", "mean", "scale", "started")}
        for name, parameter in (("weight", self.weight), ("bias", self.bias)):
            tensors |= {f"{name}.{key}": value for key, value in self.adam.state[parameter].items()}
        return tensors
