"""What Newton's method sums in a pass: objectives and their gradients over all tokens, curvature over some.

Shapes: N tokens, L layers, K columns, k those of a layer that are not converged, P places of a layer, F folds,
D hidden size, E = D + 1: a weight for each feature, and the bias.
"""

import math
from collections import Counter
from collections.abc import Container, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

from streamprobe.activations.batch import Extras
from streamprobe.solvers.curvature import AllTokens, Chance, DrawnTokens, Features, Grams, Place, draw
from streamprobe.system.distributed import add, share
from streamprobe.system.hardware import send

DRAWN = 8  # tokens that are drawn for a matrix and each column that shares it, in units of its E rows
DRAWN_MOST = 64  # for one matrix
EXACT = 201  # E up to which every token is taken, and not some of them drawn: a step is Newton's own


class LiveColumns(NamedTuple):
    """The columns of a layer that a pass is for."""

    columns: Tensor  # [k] which
    places: list[Place]  # that a matrix is made for in this pass
    shares: Tensor  # [P, k] float32: what of a place's matrix is that of a column, adding up to 1 for each place

    @classmethod
    def of(
        cls, done: Sequence[bool], own: Sequence[Place], known: Container[Place], device: torch.device
    ) -> "LiveColumns":
        """The columns of a layer that are not `done`; `own` [K] are their places, `known` those with a matrix."""
        columns = [k for k, over in enumerate(done) if not over]
        sizes = Counter(of_live := [own[k] for k in columns])
        places = [place for place in sizes if place not in known]
        shares = torch.zeros(len(places), len(columns))
        for number, place in enumerate(places):
            shares[number, [j for j, each in enumerate(of_live) if each == place]] = 1 / sizes[place]
        return cls(send(torch.tensor(columns, dtype=torch.int64), device), places, send(shares, device))


class Points(NamedTuple):
    """Where a pass takes gradients, and what is known of the curvature there."""

    raw: Tensor  # [L, K, E] float32: the weights of features that are centred, but not divided by their scale
    centre: Tensor | None  # [L, D]; None in the first pass, where all weights are 0
    expected: Tensor  # [L, K] float64: the sum of the curvature of all tokens, about
    positive_weight: Tensor  # [K]
    fold: Tensor  # [K] int64: of each column, whose tokens are not valid for it where there are several
    n_folds: int  # F


class Slopes(NamedTuple):
    """What a chunk of tokens adds to the sums of a layer's k columns, but for the features."""

    loss: Tensor  # [k] float64
    gradient: Tensor  # [k, N] d loss / d logit
    curvature: Tensor  # [k, N] its second derivative

    @classmethod
    def at(cls, logits: Tensor, weight: Tensor, sign: Tensor) -> "Slopes":
        """Where probes give these logits, which are changed; weight and sign (-1 for a positive), all [k, N]."""
        # With signs softplus(z) - y z and sigmoid(z) - y are found without their cancellation.
        margin = logits.mul_(sign)
        loss = softplus(margin).mul_(weight).sum(1).double()
        wrong = margin.sigmoid_()  # the probability of the other class
        slope = weight * wrong
        curvature = (1 - wrong).mul_(slope)
        return cls(loss, slope.mul_(sign), curvature)

    @classmethod
    def at_zero(cls, weight: Tensor, sign: Tensor) -> "Slopes":
        """Where all logits are 0."""
        return cls(weight.sum(1).double() * math.log(2), weight * sign / 2, weight / 4)


class NewtonSums:
    """The sums of one pass, each over the tokens that are valid for a column.

    J and gradient of a probe, without the penalty, are exact; the gradient is that of the weights `raw`.  Curvature is
    drawn (`DrawnTokens`), and every column's is in units of what was expected of it, so that those that share a matrix
    have an equal part in it.  Where all weights are 0 every token bends J by 1/4 of its weight, so that the Gram of all
    tokens serves all columns, and only what the rarer class of a column counts more is drawn.
    """

    def __init__(self, live: list[LiveColumns], points: Points, *, seed: int):
        """`live`: of each layer; `seed`: of the draws."""
        self.live, self.points = live, points
        self.chance = Chance(seed)
        wide: dict[str, Any] = {"dtype": torch.float64, "device": points.raw.device}
        self.gradient_ = torch.zeros(points.raw.shape, **wide)  # [L, K, E]
        self.loss_, self.curvature_, self.squares_ = torch.zeros(3, *points.expected.shape, **wide)  # [L, K]
        self.n = torch.zeros(len(points.positive_weight), **wide)  # [K] valid tokens
        self.features = Features()
        self.centre = points.centre
        self.grams: Grams | None = None  # in the first pass
        self.drawn: DrawnTokens | AllTokens | None = None

    def begin(self, acts: Tensor | None, source: int = 0) -> None:
        """Begins with the first tokens, acts [N, L, D] on the rank `source`; in the first pass they give the centre."""
        if self.centre is None:
            n_layers, _, size = self.gradient_.shape
            own = acts.float().mean(0) if acts is not None else self.gradient_.new_zeros(n_layers, size - 1).float()
            self.centre = share(own, source)
            self.grams = Grams(self.centre, self.points.n_folds)
        kind = DrawnTokens if self.gradient_.shape[-1] > EXACT else AllTokens
        self.drawn = kind([place for own in self.live for place in own.places], self.centre)

    def add(self, acts: Tensor, targets: Tensor, valid: Tensor, extras: Extras | None = None) -> None:
        """Adds acts [N, L, D], targets [N, K] and valid [N, K] of tokens; extras where there are several folds."""
        if self.drawn is None:
            self.begin(acts)
        drawn = self.drawn
        assert self.centre is not None and drawn is not None
        valid, positive = valid.mT, targets.mT.float()  # [K, N], as all that follows
        sign = 1 - 2 * positive
        weight = (positive * self.points.positive_weight[:, None] + (1 - positive)) * valid
        chance = self.chance.of(acts, extras.chance if extras else None)
        counts: list[Tensor] = []
        self.n += valid.sum(1)
        at_zero = Slopes.at_zero(weight, sign) if self.grams else None  # of every layer
        rows = self.grams.rows(extras.fold) if self.grams and extras else None
        for i, live in enumerate(self.live):
            if not len(live.columns):
                continue
            x = self.features.of(acts[:, i], self.centre[i])  # [N, E]
            if self.grams:
                self.grams.add(i, x, rows)
            own = weight[live.columns]
            slopes = at_zero or Slopes.at(self.points.raw[i, live.columns] @ x.mT, own, sign[live.columns])
            self.loss_[i, live.columns] += slopes.loss
            self.gradient_[i, live.columns] += (slopes.gradient @ x).double()
            self.curvature_[i, live.columns] += slopes.curvature.sum(1)
            self.squares_[i, live.columns] += torch.linalg.vector_norm(slopes.curvature, dim=1).double().square()
            if live.places:
                counts.append(counts[0] if at_zero and counts else self._draw(i, own, slopes.curvature, chance))
        if counts:
            drawn.add(acts, torch.cat(counts))

    def end_part(self) -> None:
        """Adds the drawn tokens that wait, so that no sum depends on those of another part."""
        if self.drawn is not None:
            self.drawn.settle()

    def add_other_ranks(self) -> None:
        """Adds what other ranks have summed, but for the matrices."""
        add(self.gradient_, self.loss_, self.curvature_, self.squares_, self.n)
        if self.grams is not None:
            self.grams.add_other_ranks()

    def _draw(self, i: int, weight: Tensor, curvature: Tensor, chance: Tensor) -> Tensor:
        """What each token counts at the places of a layer, [P, N]; weight and curvature [k, N], chance [N]."""
        columns, _, shares = self.live[i]
        p, part = self.points.positive_weight[columns], torch.ones(len(columns), device=curvature.device)
        if self.grams:
            curvature = (weight - weight.clamp(max=p.clamp(max=1)[:, None])) / 4
            part = (1 - p).abs() / (2 * p.clamp(min=1))
        relative = (curvature / self.points.expected[i, columns, None].float()).nan_to_num(0, 0)
        size = self.gradient_.shape[-1]
        wanted = ((shares > 0).sum(1) * DRAWN).clamp(max=DRAWN_MOST) * size
        if size <= EXACT:
            return shares @ relative
        return draw(shares @ relative, wanted / (shares @ part), chance)

    def matrix(self, place: Place, rank: int) -> Tensor | None:
        """The sum of curvature [E, E] at a place in units of what was expected, float32, on one rank; it is let go.

        Where columns share it, it is the mean of theirs.  None on the other ranks.
        """
        assert self.drawn is not None
        matrix = self.drawn.sums.take(place, rank)
        if matrix is None:
            return None
        if self.grams:
            i, columns, shares = place.layer, self.live[place.layer].columns, self._shares_of(place)
            fold = self.points.fold
            base = self.points.positive_weight.clamp(max=1) * self.n / self.grams.n[fold] / 4  # [K]
            of_expected = (base / self.points.expected[i])[columns] * shares  # [k]
            of_folds = torch.zeros_like(self.grams.n).index_add_(0, fold[columns], of_expected)
            matrix += self.grams.weighted(i, of_folds)
        return matrix.float()

    def _shares_of(self, place: Place) -> Tensor:
        """What of its matrix is that of each live column of the layer, [k]."""
        live = self.live[place.layer]
        return live.shares[live.places.index(place)]

    def effective(self) -> Tensor:
        """Of how many tokens each column's curvature is in effect, [L, K]: (sum of c)^2 / sum of c^2 (Kish 1965)."""
        return (self.curvature_.square() / self.squares_).nan_to_num()

    def sizes(self) -> Tensor:
        """What the matrix of its place is to be multiplied by for each column, [L, K]; 0 where it has none here."""
        found = torch.zeros_like(self.curvature_)
        for i, (columns, _, shares) in enumerate(self.live):
            shares = shares.double()
            ratio = (self.curvature_[i, columns] / self.points.expected[i, columns]).nan_to_num(0)
            of_place = (shares > 0).double().mT @ (shares @ ratio)  # [k]
            mean = self.curvature_[i, columns] / self.n[columns]
            found[i, columns] = torch.where(of_place > 0, mean / of_place, 0.0)
        return found
