"""What Newton's method sums in a pass: objectives and their gradients over all tokens, curvature over some.

Shapes: N tokens, L layers, K columns, k those of a layer that are not converged, D hidden size, E = D + 1: a weight for
each feature, and the bias.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

from streamprobe.solvers.curvature import DrawnTokens, Features, Grams, Place, draw
from streamprobe.system.hardware import send

DRAWN = 8  # tokens that are drawn for a matrix, in units of its E rows
DRAWN_SHARED = 64  # the same for one that all columns of a layer share
WORK = 2**26  # products that a matrix may always take: where features are few, more tokens are drawn


class LiveColumns(NamedTuple):
    """The columns of a layer that a pass is for."""

    columns: Tensor  # [k] which
    places: list[Place]  # that a matrix is made for in this pass
    drawn: Tensor  # [places] for which of the k columns; nothing where all share one


class Points(NamedTuple):
    """Where a pass takes gradients, and what is known of the curvature there."""

    raw: Tensor  # [L, K, E] float32: the weights of features that are centred, but not divided by their scale
    centre: Tensor | None  # [L, D]; None in the first pass, where all weights are 0
    expected: Tensor  # [L, K] float64: the sum of the curvature of all tokens, about
    positive_weight: Tensor  # [K]


class NewtonSums:
    """The sums of one pass, each over the tokens that are valid for a column.

    J and gradient of a probe, without the penalty, are exact; the gradient is that of the weights `raw`.  Curvature is
    drawn (`DrawnTokens`); where all weights are 0 every token bends J by 1/4 of its weight, so that the Gram of all
    tokens serves all columns, and only what the rarer class of a column counts more is drawn.
    """

    def __init__(self, live: list[LiveColumns], points: Points, *, shared: bool, seed: int):
        """`live`: of each layer; `shared`: its columns share a matrix; `seed`: of the draws."""
        self.live, self.points, self.shared = live, points, shared
        self.chance = torch.Generator().manual_seed(seed)
        wide: dict[str, Any] = {"dtype": torch.float64, "device": points.raw.device}
        self.gradient_ = torch.zeros(points.raw.shape, **wide)  # [L, K, E]
        self.loss_, self.curvature_ = torch.zeros(2, *points.expected.shape, **wide)  # [L, K]
        self.n = torch.zeros(len(points.positive_weight), **wide)  # [K] valid tokens
        self.features = Features()
        self.centre = points.centre
        self.grams: Grams | None = None  # in the first pass
        self.drawn: DrawnTokens | None = None

    def _begin(self, acts: Tensor) -> DrawnTokens:
        """What begins with the first tokens."""
        if self.centre is None:
            self.centre = acts.float().mean(0)
            self.grams = Grams(self.centre)
        return DrawnTokens([place for own in self.live for place in own.places], self.centre)

    def add(self, acts: Tensor, targets: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Adds acts [N, L, D], targets [N, K] and valid [N, K].

        Returns their part of the losses [L, K], 0 where a column is not live, and of the valid tokens [K].
        """
        self.drawn = drawn = self.drawn or self._begin(acts)
        assert self.centre is not None
        valid, sign = valid.mT, torch.where(targets.mT, -1.0, 1.0).contiguous()  # [K, N], as all that follows
        weight = torch.where(sign < 0, self.points.positive_weight[:, None], 1.0) * valid
        chance = send(torch.rand(len(acts), generator=self.chance), acts.device)  # the same on every device
        losses, counts, n = torch.zeros_like(self.loss_), [], valid.sum(1)
        for i, (columns, places, _) in enumerate(self.live):
            if not len(columns):
                continue
            x = self.features.of(acts[:, i], self.centre[i])  # [N, E]
            if self.grams is not None:
                self.grams.add(i, x)
            own, side = weight[columns], sign[columns]  # [k, N]
            # With them softplus(z) - y z and sigmoid(z) - y are found without their cancellation.
            margin = (self.points.raw[i, columns] @ x.mT).mul_(side) if self.grams is None else torch.zeros_like(own)
            losses[i, columns] = softplus(margin).mul_(own).sum(1).double()
            wrong = margin.sigmoid_()  # the probability of the other class
            slope = own * wrong
            curvature = (1 - wrong).mul_(slope)
            self.gradient_[i, columns] += (slope.mul_(side) @ x).double()
            self.curvature_[i, columns] += curvature.sum(1)
            if places:
                counts.append(self._draw(i, own, curvature, chance))
        if counts:
            drawn.add(acts, torch.cat(counts))
        self.loss_, self.n = self.loss_ + losses, self.n + n
        return losses, n

    def _draw(self, i: int, weight: Tensor, curvature: Tensor, chance: Tensor) -> Tensor:
        """What each token counts at the places of a layer, [places, N]; weight and curvature [k, N], chance [N]."""
        columns, _, drawn = self.live[i]
        p = self.points.positive_weight[columns]
        total, part = self.points.expected[i, columns].float(), torch.ones_like(p)
        if self.grams is not None:
            curvature = (weight - weight.clamp(max=p.clamp(max=1)[:, None])) / 4
            part = (1 - p).abs() / (2 * p.clamp(min=1))
        size = self.gradient_.shape[-1]
        wanted = max((DRAWN_SHARED if self.shared else DRAWN) * size, WORK // size**2)
        if self.shared:
            return draw((curvature / total[:, None]).mean(0, keepdim=True), wanted / part.mean()[None], chance)
        return draw(curvature[drawn], (wanted / (total * part))[drawn], chance)

    def matrix(self, place: Place) -> Tensor:
        """The sum of curvature [E, E] at a place, once `drawn` is settled, which is then let go.

        Where columns share it, it is the mean of theirs, each in units of what was expected of it.
        """
        assert self.drawn is not None
        matrix, (i, k) = self.drawn.take(place), place
        if self.grams is None:
            return matrix
        base = self.points.positive_weight.clamp(max=1) * self.n / self.grams.n / 4  # [K]
        of_column = (base / self.points.expected[i])[self.live[i].columns].mean() if k is None else base[k]
        return matrix + self.grams.sum_[i] * of_column

    def of_expected(self) -> Tensor:
        """The sums of curvature [L, K] in units of what was expected, and of each layer their mean over its columns."""
        ratio = self.curvature_ / self.points.expected
        return torch.stack([own[live.columns].mean() for own, live in zip(ratio, self.live, strict=True)])
