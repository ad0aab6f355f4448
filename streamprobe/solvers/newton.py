"""Converged probes from a few passes: Newton's method, with matrices from a few tokens and L-BFGS between them.

Shapes: N tokens, L layers, K columns, k those of a layer that are not converged, D hidden size, E = D + 1: a weight for
each feature, and the bias.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from streamprobe.errors import InputError
from streamprobe.lags import Column
from streamprobe.probes.linear import ProbeBank, fold
from streamprobe.probes.sites import Site
from streamprobe.probes.storage import restore
from streamprobe.solvers.curvature import DrawnTokens, Features, Grams, Place, draw, factorised
from streamprobe.solvers.lbfgs import PAIRS, newton_step, remember
from streamprobe.solvers.running_sums import mapped, mapped_vector

DRAWN = 8  # tokens that are drawn for a matrix, in units of its E rows
DRAWN_SHARED = 64  # the same for one that all columns of a layer share
LEAST_DRAWN = 4_096  # and at the least, for features that are few
STATE = (  # of a NewtonSolver, for a checkpoint
    "mean",
    "scale",
    "point",
    "best",
    "best_gradient",
    "past",
    "best_loss",
    "gradient_norm",
    "expected",
    "passes",
    "converged",
)


def curvature_bytes(n_layers: int, n_columns: int, hidden_size: int) -> int:
    """What the matrices of all columns take: 4 (D + 1)^2 bytes each, 67 MB at D = 4,096."""
    return n_layers * n_columns * (hidden_size + 1) ** 2 * 4


def vector_bytes(n_layers: int, n_columns: int, hidden_size: int) -> int:
    """What a NewtonSolver takes beside the matrices."""
    return n_layers * n_columns * (hidden_size + 1) * 8 * (4 + 2 * PAIRS)


class NewtonSolver:
    """Class-weighted logistic regression with an L2 penalty, solved to a gradient that is as good as zero.

    The problem is AdamSolver's: for every probe, with z the logit, p = negatives / positives and the mean over the
    training tokens that are valid for its column,

        J = mean(p y softplus(-z) + (1 - y) softplus(z)) + l2 |w|^2        (scikit-learn: C = 1 / (2 n l2))

    on features standardised by all training tokens.  Every pass sums J and its gradient over all tokens, exactly; a
    probe is converged when the norm of its gradient is at most `tolerance`, and then stays.  Where J has risen the next
    pass tries a shorter step from the best point, so J falls.

    The second derivative H only says where to step, so it need not be exact.  Where w = 0 every token counts 1/4 of its
    weight, and one sum over all tokens of a layer serves all columns, with the rarer class of each beside it: the first
    pass ends in the Newton step from zero, the class-balanced ridge, all that a ranking needs.  Every `matrices_every`
    passes H is taken anew at the points of that pass, from tokens drawn in proportion to their curvature
    (`DrawnTokens`); between, L-BFGS makes of it and of the last steps what it can.

    `shared`: one H per layer, for when K of them do not fit: the mean shape of its columns', in the size of each.
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
        shared: bool = False,
        matrices_every: int = 4,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ):
        """`positive_weight` is [K]; `n_tokens` how many a pass has, about; `tolerance` is of the gradient's norm."""
        self.sites, self.columns = list(sites), list(columns)
        self.positive_weight = positive_weight.to(device, torch.float32)
        self.l2, self.tolerance, self.standardize, self.shared = l2, tolerance, standardize, shared
        self.matrices_every, self.n_tokens = matrices_every, n_tokens
        self.chance, self.seed = torch.Generator(device), seed
        probes, size = (len(sites), len(columns)), hidden_size + 1
        wide: dict[str, Any] = {"dtype": torch.float64, "device": device}
        self.mean = torch.zeros(len(sites), hidden_size, device=device)
        self.scale = torch.ones_like(self.mean)
        self.penalty = torch.full((size,), 2 * l2, **wide)  # of d J / d w
        self.penalty[-1] = 0
        self.point, self.best, self.best_gradient = torch.zeros(3, *probes, size, **wide)
        self.past = torch.zeros(2, PAIRS, *probes, size, **wide)  # steps and changes of g, newest first
        self.best_loss, self.gradient_norm = torch.full((2, *probes), math.inf, **wide)
        self.expected = self._curvature_at_zero()  # what a pass will sum of the curvature of its tokens, [L, K]
        self.passes = torch.zeros((), dtype=torch.int64)
        self.converged = torch.zeros(probes, dtype=torch.bool, device=device)
        self.factors: dict[Place, Tensor] = {}  # Cholesky factors of H, [E, E] float32
        self.size = torch.ones(probes, **wide)  # by which a shared H is multiplied for each column
        self.features, self.grams = Features(), None
        self.recent_loss_, self.recent_n = torch.zeros(2, *probes, **wide)
        self._start_pass()

    features: Features
    grams: Grams | None  # of the first pass

    def _start_pass(self) -> None:
        """Sums of a pass that has seen no token, and what is to be summed in it."""
        number = int(self.passes) + 1
        self.gradient_, self.loss_ = torch.zeros_like(self.point), torch.zeros_like(self.best_loss)
        self.n = torch.zeros_like(self.loss_[0])
        self.curvature_ = torch.zeros_like(self.loss_)
        self.live = [(~own).nonzero()[:, 0] for own in self.converged]  # columns [k] of each layer
        if number == 1 or number % self.matrices_every == 0:
            self.factors.clear()
        self.asked = [self._without_matrix(i, live) for i, live in enumerate(self.live)]  # which of those
        self.centre, self.grams, self.drawn = self.mean, None, None
        self.chance.manual_seed(self.seed + number)

    drawn: DrawnTokens | None

    def _curvature_at_zero(self) -> Tensor:
        """What the first pass will sum, [L, K]: 1/4 of the weights of `n_tokens` tokens, were all of them valid."""
        p = self.positive_weight.double()
        return (self.n_tokens * p / (1 + p) / 2).repeat(len(self.sites), 1)

    def _without_matrix(self, i: int, live: Tensor) -> Tensor:
        """Which of the columns [k] of a layer need a matrix; where they share one, the first stands for all."""
        columns = live.tolist()
        if self.shared:
            return live.new_tensor([0] if columns and Place(i) not in self.factors else [], dtype=torch.int64)
        needy = [j for j, k in enumerate(columns) if Place(i, k) not in self.factors]
        return live.new_tensor(needy, dtype=torch.int64)

    def _first_step(self, acts: Tensor) -> DrawnTokens:
        """What a pass begins with once it has seen a token."""
        if not self.passes:
            self.centre = acts.float().mean(0)
            self.grams = Grams(self.centre)
        self.raw = torch.cat([self.point[..., :-1] / self.scale[:, None], self.point[..., -1:]], -1).float()
        places = [
            Place(i, None if self.shared else k)
            for i, (live, asked) in enumerate(zip(self.live, self.asked, strict=True))
            for k in live[asked].tolist()
        ]
        return DrawnTokens(places, self.centre)

    @torch.no_grad()
    def step(self, acts: Tensor, targets: Tensor, valid: Tensor) -> None:
        """Adds acts [N, L, D], targets [N, K] and valid [N, K] to the pass."""
        self.drawn = drawn = self.drawn or self._first_step(acts)
        valid, sign = valid.mT, torch.where(targets.mT, -1.0, 1.0).contiguous()  # [K, N], as all that follows
        weight = torch.where(sign < 0, self.positive_weight[:, None], 1.0) * valid
        chance = torch.rand(len(acts), generator=self.chance, device=acts.device)
        n, counts = valid.sum(1), []
        for i, live in enumerate(self.live):
            if not len(live):
                continue
            x = self.features.of(acts[:, i], self.centre[i])  # [N, E]
            if self.grams is not None:
                self.grams.add(i, x)
            own, side = weight[live], sign[live]  # [k, N]
            # With them softplus(z) - y z and sigmoid(z) - y are found without their cancellation.
            margin = (self.raw[i, live] @ x.mT).mul_(side)
            loss = softplus(margin).mul_(own).sum(1).double()
            wrong = margin.sigmoid_()  # the probability of the other class
            slope = own * wrong
            curvature = (1 - wrong).mul_(slope)
            self.gradient_[i, live] += (slope.mul_(side) @ x).double()
            self.curvature_[i, live] += curvature.sum(1)
            self.loss_[i, live] += loss
            self.recent_loss_[i, live] += loss
            self.recent_n[i, live] += n[live]
            if len(self.asked[i]):
                counts.append(self._draw(i, own, curvature, chance))
        self.n += n
        if counts:
            drawn.add(acts, torch.cat(counts))

    def _draw(self, i: int, weight: Tensor, curvature: Tensor, chance: Tensor) -> Tensor:
        """What each token counts at the places of a layer, [places, N]; weight and curvature [k, N], chance [N]."""
        total, part = self.expected[i, self.live[i]].float(), torch.ones_like(self.positive_weight[:1])
        if self.grams is not None:  # which counts all tokens alike: what the rarer class of a column has more is drawn
            p = self.positive_weight[self.live[i]]
            curvature = (weight - weight.clamp(max=p.clamp(max=1)[:, None])) / 4
            part = (1 - p).abs() / (2 * p.clamp(min=1))
        size = self.point.shape[-1]
        if self.shared:
            mean = (curvature / total[:, None]).mean(0, keepdim=True)
            return draw(mean, max(DRAWN_SHARED * size, LEAST_DRAWN) / part.mean()[None], chance)
        asked = self.asked[i]
        return draw(curvature[asked], (max(DRAWN * size, LEAST_DRAWN) / (total * part))[asked], chance)

    @torch.no_grad()
    def end_pass(self) -> None:
        """The step, from what the pass has summed."""
        assert self.drawn is not None, "a pass without tokens"
        if self.grams is not None and self.standardize:
            self.mean, self.scale = self.grams.scaling()
        d, c = 1 / self.scale.double(), (self.centre.double() - self.mean) / self.scale
        loss = self.loss_ / self.n + self.l2 * self.point[..., :-1].square().sum(-1)
        gradient = mapped_vector(self.gradient_, d[:, None], c[:, None]) / self.n[:, None] + self.penalty * self.point
        self._check_finite(loss)
        self._update(loss, gradient, d, c)
        self.passes += 1
        self.expected = self.curvature_
        self._start_pass()

    def _check_finite(self, loss: Tensor) -> None:
        """Raises InputError where J [L, K] of a probe that is not converged is no number."""
        for i in (~loss.isfinite() & ~self.converged).any(1).nonzero()[:1, 0].tolist():
            raise self._refusal(i)

    def _refusal(self, i: int) -> InputError:
        return InputError(
            f"activations of {self.sites[i].title} whose Gram matrix cannot be factorised",
            "finite activations, and a penalty that outweighs rounding",
            "use another --dtype, raise --l2, or leave --standardize on",
        )

    def _update(self, loss: Tensor, gradient: Tensor, d: Tensor, c: Tensor) -> None:
        """One step of every probe that is not converged, from the loss and gradient at `point`.

        d x + c, [L, D] each, are the standardised features of what x has summed.
        """
        better = ~self.converged & (loss <= self.best_loss + 1e-7 * self.best_loss.nan_to_num(posinf=0))
        shorter = self._step_back(loss)
        bends = better & (self.passes > 0)
        self.past = remember(self.past, self.point - self.best, gradient - self.best_gradient, where=bends)
        keep = better[..., None]
        self.best, self.best_gradient = self.point.where(keep, self.best), gradient.where(keep, self.best_gradient)
        self.best_loss = loss.where(better, self.best_loss)
        norm = self.best_gradient.norm(dim=-1)
        self.converged = self.converged | (better & (norm <= self.tolerance))
        self.gradient_norm = norm.where(self.converged | (self.passes > 0), math.nan)
        moving = better & ~self.converged
        self._take_matrices(moving, d, c)
        direction = newton_step(self.past, self.best_gradient, partial(self._solve, where=moving))
        self.point = torch.where(moving[..., None], self.best - direction, shorter)
        self.point = torch.where(self.converged[..., None], self.best, self.point)

    def _take_matrices(self, moving: Tensor, d: Tensor, c: Tensor) -> None:
        """H of the places that tokens were drawn for, where a probe [L, K] is moving: elsewhere it would be of a point
        that is left.
        """
        assert self.drawn is not None
        self.drawn.settle()
        if self.shared and self.drawn.places:
            of_expected = self.curvature_ / self.expected
            live = [own[columns].mean() for own, columns in zip(of_expected, self.live, strict=True)]
            self.size = self.curvature_ / self.n / torch.stack(live)[:, None]
        moves = moving.tolist()
        for place in self.drawn.places:
            i, k = place
            if k is None or moves[i][k]:
                self.factors[place] = self._factorise(place, d[i], c[i])

    def _factorise(self, place: Place, d: Tensor, c: Tensor) -> Tensor:
        """The factor of H [E, E] at a place, under the map d x + c, [D] each.

        Raises InputError where there is none.
        """
        assert self.drawn is not None
        i, k = place
        matrix = self.drawn.take(place)
        if self.grams is not None:
            base = self.positive_weight.clamp(max=1) * self.n / self.grams.n / 4  # [K]
            counted = (base / self.expected[i])[self.live[i]].mean() if k is None else base[k]
            matrix = matrix + self.grams.sum_[i] * counted
        if k is not None:
            matrix = matrix / self.n[k]
        ridge = self.penalty.clamp_min(1e-6 * (self.l2 == 0))  # a constant feature has no curvature of its own
        ridge = ridge if k is not None else ridge / self.size[i, self.live[i]].mean()
        factor = factorised(mapped(matrix, d.float(), c.float()).contiguous(), ridge.float())
        if factor is None:
            raise self._refusal(i)
        return factor

    def _step_back(self, loss: Tensor) -> Tensor:
        """Where J has risen: the minimum of the parabola through both losses and the slope at `best`, [L, K, E]."""
        step = self.point - self.best
        slope = (step * self.best_gradient).sum(-1)
        fraction = -slope / (2 * (loss - self.best_loss - slope))
        return self.best + fraction.nan_to_num(0.5).clamp(0.1, 0.5)[..., None] * step

    def _solve(self, gradient: Tensor, where: Tensor) -> Tensor:
        """H^-1 g for g [L, K, E] where a probe [L, K] asks for it, else 0."""
        solved, given = torch.zeros_like(gradient), gradient.float()
        wanted = where.tolist()
        for (i, k), factor in self.factors.items():
            if k is None:
                solved[i] = torch.cholesky_solve(given[i].mT, factor).mT.double() / self.size[i, :, None]
            elif wanted[i][k]:
                solved[i, k] = torch.cholesky_solve(given[i, k, :, None], factor)[:, 0].double()
        return solved

    @property
    def resumable(self) -> bool:
        """Whether `state` holds all that the next pass begins with: no matrix is to be used again."""
        return not self.factors or bool(self.converged.all())

    def bank(self) -> ProbeBank:
        """The best probes so far, in raw activation space: after one pass its Newton step, whose J no pass has seen."""
        probes = self.best if self.passes > 1 else self.point
        weight, bias = fold(probes[..., :-1], probes[..., -1], self.mean.double(), self.scale.double())
        return ProbeBank(self.sites, self.columns, weight.float(), bias.float())

    def loss(self) -> Tensor:
        """Mean class-weighted loss [L, K] since the last call, without the penalty; NaN where no token was valid.

        That of a converged probe, which sees no more tokens, is what it was.
        """
        last = self.best_loss - self.l2 * self.best[..., :-1].square().sum(-1)
        mean = (self.recent_loss_ / self.recent_n).where(~self.converged | (self.recent_n > 0), last)
        self.recent_loss_, self.recent_n = torch.zeros(2, *mean.shape, dtype=mean.dtype, device=mean.device)
        return mean

    def state(self) -> dict[str, Tensor]:
        """Where every probe stands, without matrices: all that `load` needs where the solver is `resumable`."""
        return {name: tensor.to("cpu", copy=True) for name, tensor in self._live().items()}

    def load(self, state: dict[str, Tensor]) -> None:
        """Takes up where the solver that gave `state` stood.  Raises InputError for the state of another solver."""
        restore(self._live(), state)
        self._start_pass()

    def _live(self) -> dict[str, Tensor]:
        """The tensors themselves, by name."""
        return {name: getattr(self, name) for name in STATE}
