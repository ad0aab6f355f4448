"""What a layer adds to a control: nested probes by Newton's method, each with the penalty that validation prefers.

Shapes: N tokens, L layers, S = L + 1 sites, K columns, G groups of columns, P features of the control, D hidden size,
E = P + 1 + D: the weights of the control's features, the bias, and those of a layer.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from streamprobe.activations.batch import Extras
from streamprobe.probes.nested import Blocks, NestedProbes
from streamprobe.probes.sites import Site
from streamprobe.probes.storage import restore
from streamprobe.solvers.block_matrices import PENALTIES, BlockMatrices, Start
from streamprobe.solvers.lbfgs import PAIRS, newton_step, remember, step_back
from streamprobe.solvers.nested_sums import Live, NestedCurvature, NestedSums

PATIENCE = 2  # penalties in a row that validation finds no better, by chance perhaps, before no more are tried
SAVED = "chosen chosen_loss chosen_norm chosen_level chosen_pass passes converged"  # what a checkpoint holds


class NestedSolver:
    """Logistic regression on [control, layer] for every layer and column, with the control's features and penalties.

    The problem is NewtonSolver's, but for the penalty of the layer's weights w, of features that are standardised, too:

        J = mean(p y softplus(-z) + (1 - y) softplus(z)) + (penalty of the control's weights u) + lambda |w|^2

    It begins where the control ended, with w = 0, so that J is never above the control's.  PENALTIES are tried one
    after another, each from where the last one ended: once the gradient is at most `tolerance`, the log-loss of the
    validation tokens is asked.  Where that is not the lowest so far for the PATIENCE-th time in a row, the probe is
    final, and is the best one so far: at first the control itself, as if lambda were infinite.

    The first pass takes the second derivatives at the control, from drawn tokens: [A, B; B' C] of u and w.  All layers
    share A, and lambda is in C alone, so that C - B' A^-1 B + 2 lambda (Schur's complement) is all that is factorised
    anew for another lambda.  L-BFGS corrects for what changes from there on.
    """

    name = "nested"

    def __init__(
        self,
        start: Start,
        layers: list[Site],
        columns: list[Any],
        validation_loss: Callable[[NestedProbes], Tensor],
        *,
        tolerance: float,
        seed: int,
    ):
        """`validation_loss` gives the log-loss [S, K] of probes on the validation tokens."""
        self.start, self.sites, self.columns = start, [start.site, *layers], columns
        self.validation_loss, self.tolerance, self.seed = validation_loss, tolerance, seed
        device = start.point.device
        shape, self.n_control = (len(layers), len(columns), start.scale.shape[2]), start.point.shape[1]
        self.point = torch.zeros(shape, dtype=torch.float64, device=device)
        self.point[..., : self.n_control] = start.point
        self.best, self.chosen, self.best_gradient = (
            self.point.clone(),
            self.point.clone(),
            torch.zeros_like(self.point),
        )
        self.past = torch.zeros(2, PAIRS, *shape, dtype=torch.float64, device=device)
        self.best_loss, self.chosen_loss = torch.full((2, *shape[:2]), math.inf, dtype=torch.float64, device=device)
        self.gradient_norm = self.chosen_norm = start.norm.repeat(len(layers), 1)
        self.level, self.chosen_pass = torch.zeros(2, *shape[:2], dtype=torch.int64, device=device)
        self.chosen_level = torch.full_like(self.level, -1)  # of the control
        self.passes = torch.zeros((), dtype=torch.int64)
        self.converged = torch.zeros(shape[:2], dtype=torch.bool, device=device)
        self.matrices: BlockMatrices | None = None
        self.curvature: NestedCurvature | None = NestedCurvature(
            self._shares(),
            start.expected,
            (start.point / start.scale[0, :, : self.n_control]).float(),
            n_features=shape[2] - self.n_control,
            seed=seed,
        )
        self.sums = self._start_pass()

    def _shares(self) -> Tensor:
        """What of the matrix of each group is that of each column, [G, K]."""
        shares = torch.zeros(len(self.start.groups), len(self.columns))
        for group, columns in enumerate(self.start.groups):
            shares[group, columns] = 1 / len(columns)
        return shares.to(self.point.device)

    def _start_pass(self) -> NestedSums:
        """Sums of the next pass, which has seen no token."""
        raw = (self.point / self.start.scale).float()
        return NestedSums(Live.of(self.converged), raw, self.start.centres, self.start.positive_weight)

    @torch.no_grad()
    def step(self, blocks: Blocks, targets: Tensor, valid: Tensor, extras: Extras | None = None) -> None:
        """Adds tokens to the pass; targets [N, K] and valid [N, K], so that their folds do not matter here."""
        self.sums.add(blocks, targets, valid)
        if self.curvature is not None:
            self.curvature.add(self.sums, blocks, targets, valid, chance=extras.chance if extras else None)

    @torch.no_grad()
    def end_part(self) -> None:
        """Adds the drawn tokens that wait, so that no sum depends on those of another part of the pass."""
        if self.curvature is not None:
            self.curvature.settle(self.sums)

    @torch.no_grad()
    def end_pass(self) -> None:
        """A step of every probe that is not final, or its next penalty, from what the pass has summed on all ranks."""
        self.end_part()
        sums, penalty = self.sums, self._penalty(self.level)
        sums.add_other_ranks()
        if self.curvature is not None:
            self.matrices = BlockMatrices(self.curvature, self.start, sums.n)
            self.curvature = None
        slope = self.start.slope
        gradient = sums.gradient_ / self.start.scale / sums.n[:, None] + penalty * self.point + slope
        loss = sums.loss_ / sums.n + (penalty * self.point.square()).sum(-1) / 2 + (slope * self.point).sum(-1)
        self.passes += 1
        better = ~self.converged & (loss <= self.best_loss + 1e-7 * self.best_loss.nan_to_num(posinf=0))
        shorter = step_back(self.point - self.best, self.best_gradient, loss - self.best_loss) + self.best
        bends = better & (self.passes > 1)
        self.past = remember(self.past, self.point - self.best, gradient - self.best_gradient, where=bends)
        self.best = self.point.where(better[..., None], self.best)
        self.best_gradient = gradient.where(better[..., None], self.best_gradient)
        self.best_loss = loss.where(better, self.best_loss)
        self.gradient_norm = self.best_gradient.norm(dim=-1).where(~self.converged, self.gradient_norm)
        self._choose(better & (self.gradient_norm <= self.tolerance))
        moving = better & ~self.converged
        assert self.matrices is not None
        matrices, level = self.matrices, self.level
        direction = newton_step(self.past, self.best_gradient, lambda given: matrices.solve(given, level, moving))
        self.point = torch.where(moving[..., None], self.best - direction, shorter)
        self.point = torch.where(self.converged[..., None], self.best, self.point)
        self.sums = self._start_pass()

    def _penalty(self, level: Tensor) -> Tensor:
        """Of d J / d (u, w) at these levels [L, K]: [L, K, E]."""
        of_layer = 2 * torch.tensor(PENALTIES, dtype=torch.float64, device=level.device)[level.clamp_min(0)]
        n_layer = self.point.shape[-1] - self.n_control
        control = self.start.penalty.expand(*level.shape, -1)
        return torch.cat([control, of_layer[..., None].expand(-1, -1, n_layer)], -1)

    def _choose(self, settled: Tensor) -> None:
        """What validation says of the probes [L, K] that have settled with their penalty: another one, or final."""
        if not settled.any():
            return
        losses = self.validation_loss(self._bank(self.best)).to(self.best_loss)
        self.chosen_loss = torch.where(settled & self.chosen_loss.isinf(), losses[:1], self.chosen_loss)
        improved = settled & (losses[1:] < self.chosen_loss)
        self.chosen = self.best.where(improved[..., None], self.chosen)
        self.chosen_loss = losses[1:].where(improved, self.chosen_loss)
        self.chosen_norm = self.gradient_norm.where(improved, self.chosen_norm)
        self.chosen_level = self.level.where(improved, self.chosen_level)
        self.chosen_pass = self.chosen_pass.masked_fill(improved, int(self.passes))
        on = settled & (self.level - self.chosen_level < PATIENCE) & (self.level < len(PENALTIES) - 1)
        self.converged = self.converged | (settled & ~on)
        self.gradient_norm = self.chosen_norm.where(self.converged, self.gradient_norm)
        self._lower_penalty(on)

    def _lower_penalty(self, where: Tensor) -> None:
        """Goes on from the best points with the next penalty, `where` [L, K] says so: J and all gradients with it."""
        level = self.level + where
        more = self._penalty(level) - self._penalty(self.level)  # [L, K, E], 0 at the control's weights
        self.best_loss = self.best_loss + (more * self.best.square()).sum(-1) / 2
        self.best_gradient = self.best_gradient + more * self.best
        self.past[1] += more * self.past[0]
        self.level = level
        self.gradient_norm = self.best_gradient.norm(dim=-1).where(where, self.gradient_norm)

    @property
    def final(self) -> bool:
        """Whether no further pass would change a probe."""
        return bool(self.converged.all())

    @property
    def penalty(self) -> Tensor:
        """Of the layer's weights of each probe of `bank`, [S, K]: infinite where it is the control.

        NaN where it is so only because training ended before validation could be asked.
        """
        chosen = torch.tensor([*PENALTIES, math.inf], dtype=torch.float64)[self.chosen_level.cpu()]
        chosen[(self.chosen_loss.isinf()).cpu()] = math.nan
        return torch.cat([torch.full_like(chosen[:1], math.inf), chosen])

    @property
    def norm(self) -> Tensor:
        """Of the gradient of each probe [S, K], where one is not final of what it stood at."""
        return torch.cat([self.start.norm[None], self.gradient_norm]).cpu()

    def bank(self) -> NestedProbes:
        """The control and, of each layer, the probes that validation prefers so far, in raw activation space."""
        return self._bank(self.chosen)

    def _bank(self, point: Tensor) -> NestedProbes:
        """The control and the probes at point [L, K, E]."""
        n = self.n_control - 1
        control = torch.zeros_like(point[:1])
        control[..., : n + 1] = self.start.point
        both = torch.cat([control, point]) / torch.cat([self.start.scale[:1], self.start.scale])  # [S, K, E]
        weights, bias, of_layer = both[..., :n], both[..., n], both[..., n + 1 :]
        centres = self.start.centres
        shift = weights @ centres.control.double()
        shift[1:] += torch.einsum("lkd,ld->lk", of_layer[1:], centres.layers.double())
        return NestedProbes(self.sites, self.columns, weights.float(), of_layer.float(), (bias - shift).float())

    def state(self) -> dict[str, Tensor]:
        """What `bank` is made of, once all probes are final."""
        return {name: tensor.to("cpu", copy=True) for name, tensor in self._live().items()}

    def load(self, state: dict[str, Tensor]) -> None:
        """Takes up where the solver that gave `state` ended.  Raises InputError for the state of another solver."""
        restore(self._live(), state)
        self.gradient_norm = self.chosen_norm

    def _live(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in SAVED.split()}
