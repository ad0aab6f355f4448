"""Converged probes from a few passes: Newton's method with one matrix per column, and L-BFGS from there.

Shapes: N tokens, L layers, K columns, D hidden size, E = D + 1: a weight for each feature, and the bias.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from streamprobe.errors import InputError
from streamprobe.lags import Column
from streamprobe.probes.linear import ProbeBank, fold
from streamprobe.probes.sites import Site
from streamprobe.probes.storage import restore
from streamprobe.solvers.running_sums import Grams, first_scaling, mapped_vector, with_one

PAIRS = 8  # steps that L-BFGS remembers
STATE = (  # of a NewtonSolver, for a checkpoint
    "point",
    "best",
    "best_gradient",
    "solved_gradient",
    "past",
    "best_loss",
    "gradient_norm",
    "scale_up",
    "passes",
    "converged",
)


def curvature_bytes(n_layers: int, n_columns: int, hidden_size: int) -> int:
    """What the matrices of all columns take: 8 (D + 1)^2 bytes each, 134 MB at D = 4,096."""
    return n_layers * n_columns * (hidden_size + 1) ** 2 * 8


def vector_bytes(n_layers: int, n_columns: int, hidden_size: int) -> int:
    """What a NewtonSolver takes beside the matrices."""
    return n_layers * n_columns * (hidden_size + 1) * 8 * (5 + 2 * PAIRS)


class NewtonSolver:
    """Class-weighted logistic regression with an L2 penalty, solved to a gradient that is as good as zero.

    The problem is AdamSolver's: for every probe, with z the logit, p = negatives / positives and the mean over the
    training tokens that are valid for its column,

        J = mean(p y softplus(-z) + (1 - y) softplus(z)) + l2 |w|^2        (scikit-learn: C = 1 / (2 n l2))

    on features standardised by all training tokens.  Its second derivative is at most H = C / (4 n) + 2 l2 (no penalty
    on the bias), C the weighted Gram that `Grams` sums, and is H where w = 0 (Boehning & Lindsay 1988).  So the first
    pass, which sums H and the gradient at zero, ends in an exact Newton step: the class-balanced ridge, all that a
    ranking needs.  Each further pass streams the gradient alone and steps by what L-BFGS makes of H^-1 and the last
    PAIRS steps (Nocedal & Wright 2006, algorithm 7.4).  Where J has risen the next pass tries a shorter step from the
    best point, so J falls.  A probe is converged when the norm of its gradient is at most `tolerance`, and then stays.

    `shared`: one H per layer, the mean of its columns', for when K of them do not fit.  It bounds nothing, but the
    probes that all this leads to are the same.
    """

    name = "newton"

    def __init__(
        self,
        sites: Sequence[Site],
        columns: Sequence[Column],
        hidden_size: int,
        positive_weight: Tensor,
        *,
        l2: float = 0.01,
        tolerance: float = 1e-4,
        standardize: bool = True,
        shared: bool = False,
        device: torch.device | str = "cpu",
    ):
        """`positive_weight` is [K]; `tolerance` is of the gradient's norm."""
        self.sites, self.columns = list(sites), list(columns)
        self.positive_weight = positive_weight.to(device, torch.float32)
        self.l2, self.tolerance, self.standardize, self.shared = l2, tolerance, standardize, shared
        probes = (len(sites), len(columns))
        wide: dict[str, Any] = {"dtype": torch.float64, "device": device}
        self.grams: Grams | None = None
        self.factor: Tensor | None = None  # [L, K or 1, E, E] Cholesky factors of H, once the first pass is over
        self.mean = torch.zeros(len(sites), hidden_size, device=device)
        self.scale = torch.ones_like(self.mean)
        self.penalty = torch.full((hidden_size + 1,), 2 * l2, **wide)  # of d J / d w
        self.penalty[-1] = 0
        # The point at which the pass takes the gradient, the best one so far, its gradient g and H^-1 g.
        zeros = torch.zeros(4, *probes, hidden_size + 1, **wide)
        self.point, self.best, self.best_gradient, self.solved_gradient = zeros
        self.past = torch.zeros(2, PAIRS, *probes, hidden_size + 1, **wide)  # steps and changes of g, newest first
        self.best_loss, self.gradient_norm = torch.full((2, *probes), math.inf, **wide)
        self.scale_up = torch.ones(probes, **wide)
        self.passes = torch.zeros((), dtype=torch.int64)
        self.converged = torch.zeros(probes, dtype=torch.bool, device=device)
        self._start_pass()
        self.recent_loss_, self.recent_n = torch.zeros(probes, **wide), torch.zeros(probes[1], **wide)

    def _start_pass(self) -> None:
        """Sums of a pass that has seen no token."""
        self.gradient_, self.loss_ = torch.zeros_like(self.point), torch.zeros_like(self.best_loss)
        self.n = torch.zeros_like(self.loss_[0])

    @torch.no_grad()
    def step(self, acts: Tensor, targets: Tensor, valid: Tensor) -> None:
        """Adds acts [N, L, D], targets [N, K] and valid [N, K] to the pass."""
        if self.grams is None and self.factor is None:
            self.mean, self.scale = first_scaling(acts)  # until the pass is over: it keeps the sums precise
            self.grams = Grams(self.mean, self.scale, self.positive_weight, self.shared)
        x = with_one(acts, self.mean, self.scale)  # [L, N, E]
        if self.grams is not None:
            self.grams.add(x, targets, valid)
        z = x @ self.point.mT.float()  # [L, N, K]
        weight = valid * torch.where(targets, self.positive_weight, 1.0)
        sign = torch.where(targets, -1.0, 1.0)  # softplus(z) - y z and sigmoid(z) - y, without their cancellation
        loss = (weight * softplus(sign * z)).sum(1, dtype=torch.float64)
        self.gradient_ += (weight * sign * (sign * z).sigmoid()).mT @ x
        n = valid.sum(0)
        self.loss_, self.n = self.loss_ + loss, self.n + n
        self.recent_loss_, self.recent_n = self.recent_loss_ + loss, self.recent_n + n

    @torch.no_grad()
    def end_pass(self) -> None:
        """The step, from what the pass has summed."""
        only_recalled = self.needs_first_pass
        if self.factor is None:
            self._factorise()
        if not only_recalled:
            self._update()
            self.passes += 1
        self._start_pass()

    def _factorise(self) -> None:
        """H of every column under the final map, in the memory of its Gram."""
        grams = self.grams
        assert grams is not None, "a pass without tokens"
        mean, scale = grams.final_scaling()
        if not self.standardize:
            mean, scale = torch.zeros_like(mean), torch.ones_like(scale)
        d, c = self.scale / scale, (self.mean - mean) / scale
        self.gradient_ = mapped_vector(self.gradient_, d[:, None], c[:, None])
        self.mean, self.scale = mean.float(), scale.float()
        ridge = self.penalty.clamp_min(1e-6 * (self.l2 == 0))  # a constant feature has no curvature of its own
        store = grams.common_[:, None] if grams.shared else grams.rest_
        n = self.n.mean().expand(1) if grams.shared else self.n
        for i in range(store.shape[0]):
            for k in range(store.shape[1]):
                bound = grams.curvature(i, k, mean, scale) / (4 * n[k]) + torch.diag(ridge)
                store[i, k], info = torch.linalg.cholesky_ex(bound)
                if info:  # features that say the same; sums over a batch are float32: outweigh their rounding
                    bound.diagonal().add_(torch.finfo(torch.float32).eps * bound.trace())
                    store[i, k], info = torch.linalg.cholesky_ex(bound)
                if info or not store[i, k].isfinite().all():
                    raise InputError(
                        f"activations of {self.sites[i].title} whose Gram matrix cannot be factorised",
                        "finite activations, and a penalty that outweighs rounding",
                        "use another --dtype, raise --l2, or leave --standardize on",
                    )
        self.factor, self.grams = store, None

    def _update(self) -> None:
        """One step of every probe that is not converged, from the loss and gradient at `point`."""
        loss = self.loss_ / self.n + self.l2 * self.point[..., :-1].square().sum(-1)
        gradient = self.gradient_ / self.n[:, None] + self.penalty * self.point
        solved = self._solve(gradient)
        better = ~self.converged & (loss <= self.best_loss + 1e-7 * self.best_loss.nan_to_num(posinf=0))
        shorter = self._step_back(loss)
        self._remember(better & (self.passes > 0), gradient - self.best_gradient, solved - self.solved_gradient)
        keep = better[..., None]
        self.best, self.best_gradient = self.point.where(keep, self.best), gradient.where(keep, self.best_gradient)
        self.solved_gradient = solved.where(keep, self.solved_gradient)
        self.best_loss = loss.where(better, self.best_loss)
        norm = self.best_gradient.norm(dim=-1)
        self.converged = self.converged | (better & (norm <= self.tolerance))
        self.gradient_norm = norm.where(self.converged | (self.passes > 0), math.nan)
        self.point = torch.where(keep, self.best - self._direction(), shorter)
        self.point = torch.where(self.converged[..., None], self.best, self.point)

    def _step_back(self, loss: Tensor) -> Tensor:
        """Where J has risen: the minimum of the parabola through both losses and the slope at `best`, [L, K, E]."""
        step = self.point - self.best
        slope = (step * self.best_gradient).sum(-1)
        fraction = -slope / (2 * (loss - self.best_loss - slope))
        return self.best + fraction.nan_to_num(0.5).clamp(0.1, 0.5)[..., None] * step

    def _remember(self, where: Tensor, y: Tensor, solved: Tensor) -> None:
        """Takes the pair (last step, what it did to the gradient) of the probes `where` [L, K]; solved is H^-1 y."""
        step = self.point - self.best
        curvature = (step * y).sum(-1)
        where = where & (curvature > 0)
        new = torch.cat([torch.stack([step, y])[:, None], self.past[:, :-1]], dim=1)
        self.past = new.where(where[..., None], self.past)
        self.scale_up = torch.where(where, (curvature / (y * solved).sum(-1)).clamp_min(1.0), self.scale_up)

    def _direction(self) -> Tensor:
        """What L-BFGS takes for the Newton step from `best`, [L, K, E]; H^-1 g where there is no past."""
        steps, changes = self.past  # [PAIRS, L, K, E], newest first
        curvature = (steps * changes).sum(-1)
        rho = torch.where(curvature > 0, 1 / curvature, 0.0)[..., None]
        q, alphas = self.best_gradient, []
        for s, y, r in zip(steps, changes, rho, strict=True):
            alphas.append(r * (s * q).sum(-1, keepdim=True))
            q = q - alphas[-1] * y
        q = self._solve(q) * self.scale_up[..., None]
        for s, y, r, alpha in reversed(list(zip(steps, changes, rho, alphas, strict=True))):
            q = q + s * (alpha - r * (y * q).sum(-1, keepdim=True))
        return q

    def _solve(self, gradient: Tensor) -> Tensor:
        """H^-1 g for g [L, K, E]; one matrix at a time, for a batched solve copies all of them."""
        assert self.factor is not None
        solved = torch.empty_like(gradient)
        for i, factors in enumerate(self.factor):
            for k, factor in enumerate(factors):
                columns = slice(None) if self.shared else slice(k, k + 1)
                solved[i, columns] = torch.cholesky_solve(gradient[i, columns].mT, factor).mT
        return solved

    @property
    def needs_first_pass(self) -> bool:
        """Whether the matrices of H are missing in a solver that has been loaded and is to go on."""
        return self.factor is None and int(self.passes) > 0 and not bool(self.converged.all())

    def bank(self) -> ProbeBank:
        """The best probes so far, in raw activation space: after one pass its Newton step, whose J no pass has seen."""
        probes = self.best if self.passes > 1 else self.point
        weight, bias = fold(probes[..., :-1], probes[..., -1], self.mean.double(), self.scale.double())
        return ProbeBank(self.sites, self.columns, weight.float(), bias.float())

    def loss(self) -> Tensor:
        """Mean class-weighted loss [L, K] since the last call, without the penalty; NaN where no token was valid."""
        mean = self.recent_loss_ / self.recent_n
        self.recent_loss_, self.recent_n = torch.zeros_like(self.recent_loss_), torch.zeros_like(self.recent_n)
        return mean

    def state(self) -> dict[str, Tensor]:
        """Where every probe stands, without the matrices: a resumed run streams its first pass again for those."""
        return {name: tensor.to("cpu", copy=True) for name, tensor in self._live().items()}

    def load(self, state: dict[str, Tensor]) -> None:
        """Takes up where the solver that gave `state` stood, after one more trip through the first pass.

        Raises InputError for the state of another solver.
        """
        restore(self._live(), state)

    def _live(self) -> dict[str, Tensor]:
        """The tensors themselves, by name."""
        return {name: getattr(self, name) for name in STATE}
