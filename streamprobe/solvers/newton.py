"""Converged probes from a few passes: Newton's method, with matrices from a few tokens and L-BFGS between them.

Shapes: N tokens, L layers, K columns, k those of a layer that are not converged, F folds, D hidden size, E = D + 1: a
weight for each feature, and the bias.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from streamprobe.activations.batch import Extras
from streamprobe.lags import Column
from streamprobe.probes.linear import ProbeBank, to_raw
from streamprobe.probes.sites import Site
from streamprobe.probes.storage import restore
from streamprobe.solvers.curvature import Place, factorise
from streamprobe.solvers.lbfgs import PAIRS, newton_step, remember, step_back
from streamprobe.solvers.newton_matrices import columns_of_places, penalty_of_weights, refusal, share_places
from streamprobe.solvers.newton_sums import EXACT, LiveColumns, NewtonSums, Points
from streamprobe.solvers.scaling import mapped_vector, shifted
from streamprobe.system.distributed import add, owner, world

FLAT = 1e-12  # curvature of a token that is as good as none
AT_ONCE = 8  # matrices that are factorised before the host looks how that went: so many are there twice
# The tensors that a checkpoint holds:
SAVED = (
    "mean scale point best best_gradient best_loss gradient_norm expected effective size passes converged "
    "mean_difference"
)


class NewtonSolver:
    """Class-weighted logistic regression with an L2 penalty, solved to a gradient that is as good as zero.

    The problem is AdamSolver's: for every probe, with z the logit, p = negatives / positives and the mean over the
    training tokens that are valid for its column,

        J = mean(p y softplus(-z) + (1 - y) softplus(z)) + l2 |w|^2        (scikit-learn: C = 1 / (2 n l2))

    on features standardised by all training tokens: of a column, where there are several folds, by all that are not of
    its own.  Every pass sums J and its gradient over all tokens, exactly; a probe is converged when the norm of its
    gradient is at most `tolerance`, and then stays.  Where J has risen the next pass tries a shorter step from the best
    point, so J falls.

    The second derivative H only says where to step, so it need not be exact.  Where w = 0 every token counts 1/4 of its
    weight, and one sum over all tokens of a layer serves all columns, with the rarer class of each beside it: the first
    pass ends in the Newton step from zero, the class-balanced ridge, all that a ranking needs.  Every `matrices_every`
    passes H is taken anew at the points of that pass, from tokens drawn in proportion to their curvature
    (`DrawnTokens`); between, L-BFGS makes of it and of the steps since what it can.

    Of these, columns whose curvature is that of many tokens, and of like size, share one per layer: the mean shape of
    theirs, in the size of each.  `shared`: all do from the first pass on, for when K of them do not fit.
    """

    name = "newton"
    shuffles = False

    def __init__(
        self,
        sites: Sequence[Site],
        columns: Sequence[Column],
        hidden_size: int,
        positive_weight: Tensor,
        *,
        n_tokens: int,
        l2: float = 0.01,
        tolerance: float = 1e-3,
        standardize: bool = True,
        n_hand_made: int = 0,
        shared: bool = False,
        matrices_every: int = 4,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ):
        """`positive_weight` is [K]; `n_tokens` how many a pass has, about; `tolerance` is of the gradient's norm.

        The last `n_hand_made` features are not divided by their deviation, which is tiny where one is rare.
        """
        self.sites, self.columns = list(sites), list(columns)
        self.positive_weight = positive_weight.to(device, torch.float32)
        self.l2, self.tolerance, self.standardize, self.shared = l2, tolerance, standardize, shared
        self.matrices_every, self.n_tokens, self.n_scaled = matrices_every, n_tokens, hidden_size - n_hand_made
        self.seed, self.device = seed, torch.device(device)
        folds = [column.fold for column in columns]
        self.fold, self.n_folds = torch.tensor(folds, device=device), max(folds) + 1
        self._begin(hidden_size, n_hand_made)
        self.sums = self._start_pass()

    def _begin(self, hidden_size: int, n_hand_made: int) -> None:
        """Where all weights are zero and nothing is known."""
        probes, size, device = (len(self.sites), len(self.columns)), hidden_size + 1, self.device
        wide: dict[str, Any] = {"dtype": torch.float64, "device": device}
        self.mean = torch.zeros(len(self.sites), hidden_size, device=device)
        self.scale = torch.ones(len(self.sites), self.n_folds, hidden_size, device=device)
        self.penalty = penalty_of_weights(self.l2, size, n_hand_made).to(device)  # of d J / d w
        self.point, self.best, self.best_gradient = torch.zeros(3, *probes, size, **wide)
        # Of a line that is added to J, where `anchor` was called: slopes [L, K, E], and how much of them counts [L, K].
        self.at_zero, self.reliance = torch.zeros(1, 1, 1, **wide), torch.zeros(1, 1, **wide)
        self.past = torch.zeros(2, PAIRS, *probes, size, **wide)  # steps and changes of g, newest first
        self.best_loss, self.gradient_norm = torch.full((2, *probes), math.inf, **wide)
        # What a pass will sum of the curvature of its tokens [L, K]: at first 1/4 of the weights, if all are valid.
        p = self.positive_weight.double()
        self.expected = (self.n_tokens * p / (1 + p) / 2).repeat(len(self.sites), 1)
        self.effective = torch.zeros(probes, **wide)  # of how many tokens that is, when it is known
        self.mean_difference = torch.zeros(*probes, hidden_size, device=device)  # of positives less negatives, raw
        self.passes = torch.zeros((), dtype=torch.int64)
        self.converged = torch.zeros(probes, dtype=torch.bool, device=device)
        # [E, E] float32, of features that are not divided by their scale; None where it lies on another rank:
        self.factors: dict[Place, Tensor | None] = {}
        self.size = torch.ones(probes, **wide)  # by which H is multiplied for each column
        self.pass_loss = torch.full(probes, math.nan, **wide)  # of the tokens of the last pass

    def _start_pass(self) -> NewtonSums:
        """Sums of the next pass, which has seen no token."""
        number = int(self.passes) + 1
        if number == 1 or number % self.matrices_every == 0 or self.point.shape[-1] <= EXACT:
            self.factors.clear()
            self.past = torch.zeros_like(self.past)  # which would correct another matrix
        if not self.factors:
            self.places = self.find_places()
        centre = self.mean if number > 1 else None
        raw = torch.cat([self.point[..., :-1] / self.scale[:, self.fold], self.point[..., -1:]], -1).float()
        points = Points(raw, centre, self.expected, self.positive_weight, self.fold, self.n_folds)
        pairs = zip(self.converged.tolist(), self.places, strict=True)
        live = [LiveColumns.of(done, own, self.factors, self.device) for done, own in pairs]
        return NewtonSums(live, points, seed=self.seed + number)

    def find_places(self) -> list[list[Place]]:
        """What every column's matrix is made for, [L][K]: see `share_places`."""
        return share_places(self.expected, self.effective, self.point.shape[-1], every=self.shared)

    @torch.no_grad()
    def begin(self, acts: Tensor | None, source: int) -> None:
        """Begins a pass, whose first tokens acts [N, L, D] are on the rank `source`; None: this rank has no token."""
        self.sums.begin(acts, source)

    @torch.no_grad()
    def step(self, acts: Tensor, targets: Tensor, valid: Tensor, extras: Extras | None = None) -> None:
        """Adds acts [N, L, D], targets [N, K] and valid [N, K] to the pass; extras where there are several folds."""
        self.sums.add(acts, targets, valid, extras)

    @torch.no_grad()
    def end_part(self) -> None:
        """Adds the tokens that wait."""
        self.sums.end_part()

    @torch.no_grad()
    def end_pass(self) -> None:
        """The step, from what the pass has summed on all ranks."""
        self.sums.end_part()
        sums, fed = self.sums, ~self.converged
        assert sums.centre is not None, "a pass without tokens"
        sums.add_other_ranks()
        if sums.grams is not None:  # at zero a positive's slope is -p / 2, and a negative's 1 / 2
            n_negative = sums.n * self.positive_weight / (1 + self.positive_weight)
            self.mean_difference = (-2 * sums.gradient_[..., :-1] / n_negative[:, None]).float()
        if sums.grams is not None and self.standardize:
            self.mean, self.scale = sums.grams.scaling()
            self.scale[..., self.n_scaled :] = 1
        scale, shift = self.scale[:, self.fold].double(), sums.centre.double() - self.mean
        gradient_ = mapped_vector(sums.gradient_, 1 / scale, shift[:, None] / scale)
        self.pass_loss = (sums.loss_ / sums.n).where(fed, self.pass_loss)
        loss = sums.loss_ / sums.n + self._penalty_of(self.point)
        if sums.grams is not None:
            self._check_finite(loss)
        gradient = gradient_ / sums.n[:, None] + self.penalty * self.point + self.slope
        self._update(loss, gradient, shift.float())
        self.passes += 1
        self.expected = sums.curvature_.clamp(min=FLAT * self.n_tokens).where(fed, self.expected)
        self.effective = sums.effective().where(fed, self.effective)
        self.sums = self._start_pass()

    def _penalty_of(self, point: Tensor) -> Tensor:
        """What the weights [L, K, E] add to J, [L, K]: the penalty, and what they are anchored by."""
        return point.square() @ self.penalty / 2 + (self.slope * point).sum(-1)

    @property
    def slope(self) -> Tensor:
        """Of the line that is added to J [L, K, E], or [1, 1, 1] where there is none."""
        return self.at_zero * self.reliance[..., None]

    def anchor(self, difference: Tensor, reliance: Tensor) -> None:
        """Corrects J by what is known of many more tokens than those that are passed over: goes on from where it ended.

        difference [L, K, D]: the mean of positives less that of negatives over all tokens.  At zero that is the
        gradient of J but for a factor, there and over the tokens of a pass (`mean_difference`), so that a line with
        their difference for a slope, times `reliance` [L, K], makes J's gradient at zero that of all tokens: a control
        variate (Johnson & Zhang 2013; Jordan, Lee & Yang 2019).  See `solvers.reliance` for the factor.  Features that
        are not scaled are left out.
        """
        rarely = self.positive_weight / (1 + self.positive_weight) / 2  # half the share of negatives
        missing = (difference - self.mean_difference.double()) / self.scale[:, self.fold].double()
        self.at_zero, self.reliance = torch.zeros_like(self.point), reliance.double()
        self.at_zero[..., :-1] = (-rarely[:, None] * missing).nan_to_num()
        self.at_zero[..., self.n_scaled : -1] = 0  # whose penalty is too small to hold one that the sample hardly has
        self.mean_difference = difference.float()
        self.converged = torch.zeros_like(self.converged)
        self.best_loss.fill_(math.inf)  # of another objective
        self.point = self.best.clone()
        self.factors.clear()
        self.sums = self._start_pass()

    def _check_finite(self, loss: Tensor) -> None:
        """Raises InputError where J [L, K] of a probe is no number; later on such a point is only stepped back from."""
        for i in (~loss.isfinite()).any(1).nonzero()[:1, 0].tolist():
            raise refusal(self.sites[i])

    def _update(self, loss: Tensor, gradient: Tensor, shift: Tensor) -> None:
        """One step of every probe that is not converged, from the loss and gradient at `point`.

        shift [L, D]: from the mean to what the features were centred by.
        """
        better = ~self.converged & (loss <= self.best_loss + 1e-7 * self.best_loss.nan_to_num(posinf=0))
        step = self.point - self.best
        shorter = self.best + step_back(step, self.best_gradient, loss - self.best_loss)
        bends = better & (self.passes > 0)
        self.past = remember(self.past, self.point - self.best, gradient - self.best_gradient, where=bends)
        keep = better[..., None]
        self.best, self.best_gradient = self.point.where(keep, self.best), gradient.where(keep, self.best_gradient)
        self.best_loss = loss.where(better, self.best_loss)
        norm = self.best_gradient.norm(dim=-1)
        self.converged = self.converged | (bends & (norm <= self.tolerance))  # not where all weights are still 0
        self.gradient_norm = norm.where(self.passes > 0, math.nan)
        moving = better & ~self.converged
        size = self.sums.sizes()
        self.size = size.where(moving & (size > 0), self.size)
        columns = columns_of_places(self.places, moving)
        self._take_matrices(columns, shift)
        direction = newton_step(self.past, self.best_gradient, partial(self._solve, columns=columns))
        self.point = torch.where(moving[..., None], self.best - direction, shorter)
        self.point = torch.where(self.converged[..., None], self.best, self.point)

    def _take_matrices(self, columns: dict[Place, Tensor], shift: Tensor) -> None:
        """H where tokens were drawn for it and a probe moves on from there: elsewhere it is of a point that is left."""
        assert self.sums.drawn is not None
        wanted = [place for place in self.sums.drawn.places if place in columns]
        for start in range(0, len(wanted), AT_ONCE * world().size):
            some = wanted[start : start + AT_ONCE * world().size]
            matrices = [self._matrix(place, columns[place], shift, rank=owner(n)) for n, place in enumerate(some)]
            own = {place: matrix for place, matrix in zip(some, matrices, strict=True) if matrix is not None}
            factors, missing = factorise(list(own.values()))
            if missing is not None:
                raise refusal(self.sites[list(own)[missing].layer])
            self.factors |= dict.fromkeys(some) | dict(zip(own, factors, strict=True))

    def _matrix(self, place: Place, columns: Tensor, shift: Tensor, rank: int) -> Tensor | None:
        """H [E, E] at a place, float32, in units of the size of its columns, of raw features less their mean.

        The penalty is that of a weight times the scale of its feature.  None on other ranks than `rank`.
        """
        i = place.layer
        matrix = self.sums.matrix(place, rank)
        if matrix is None:
            return None
        if self.sums.grams:
            matrix = shifted(matrix, shift[i])
        ridge = self.penalty.clamp_min(1e-6 * (self.l2 == 0))  # a constant feature has no curvature of its own
        size = self.size[i, columns].mean()
        matrix.diagonal().add_((ridge * self._wide_scale(i, columns).square().mean(0) / size).float())
        return matrix

    def _wide_scale(self, i: int, columns: Tensor) -> Tensor:
        """The scale of a layer's features and of the one behind them, for each of these columns [k, E]."""
        scale = self.scale[i, self.fold[columns]]
        return torch.cat([scale, torch.ones_like(scale[:, :1])], 1)

    def _solve(self, gradient: Tensor, columns: dict[Place, Tensor]) -> Tensor:
        """H^-1 g for g [L, K, E] at the columns of places, else 0; each place is solved for by the rank that has it."""
        solved = torch.zeros_like(gradient)
        for place, own in columns.items():
            factor = self.factors[place]
            if factor is not None:
                i, scale = place.layer, self._wide_scale(place.layer, own)
                given = (gradient[i, own] * scale).float()
                solved[i, own] = torch.cholesky_solve(given.mT, factor).mT * scale / self.size[i, own, None]
        add(solved)
        return solved

    @property
    def resumable(self) -> bool:
        """Whether `state` holds all that the next pass begins with: no matrix or past step is to be used again."""
        return not self.factors or bool(self.converged.all())

    @property
    def ended(self) -> Tensor:
        """The best probes so far [L, K, E], of standardised features.

        Where none is better than zeros yet, as after one pass, it is the next step, whose J no pass has seen.
        """
        return self.point.where(~self.best.any(-1, keepdim=True), self.best)

    def bank(self) -> ProbeBank:
        """The best probes so far, in raw activation space."""
        probes, scale = self.ended, self.scale[:, self.fold].double()
        weight, bias = to_raw(probes[..., :-1], probes[..., -1], self.mean.double(), scale)
        return ProbeBank(self.sites, self.columns, weight.float(), bias.float(), solver=self.name)

    def loss(self) -> Tensor:
        """Mean class-weighted loss [L, K] of the tokens of the last pass, without the penalty.

        That of a converged probe, which sees no more tokens, is what it was.
        """
        last = self.best_loss - self._penalty_of(self.best)
        return self.pass_loss.where(~self.pass_loss.isnan() | ~self.converged, last)

    def state(self) -> dict[str, Tensor]:
        """Where every probe stands, without matrices and past steps: all that `load` needs where it is `resumable`."""
        return {name: tensor.to("cpu", copy=True) for name, tensor in self._live().items()}

    def load(self, state: dict[str, Tensor]) -> None:
        """Takes up where the solver that gave `state` stood.  Raises InputError for the state of another solver."""
        restore(self._live(), state)
        self.sums = self._start_pass()

    def _live(self) -> dict[str, Tensor]:
        """The tensors themselves, by name."""
        return {name: getattr(self, name) for name in SAVED.split()}
