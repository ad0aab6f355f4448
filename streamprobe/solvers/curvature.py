"""The matrices of Newton's method, from a few tokens of each pass.

Shapes: N tokens, n drawn ones, L layers, K columns, D hidden size, E = D + 1: a weight for each feature, and the bias.
P places that a matrix is made for.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from streamprobe.solvers.matrix_sums import SquareSums, kept_numbers
from streamprobe.system.distributed import add
from streamprobe.system.hardware import Arriving, send

HELD = 2**14  # drawn tokens that wait before they are added: an addition costs as much as some E of them
HELD_BYTES = 2**29  # that they take at most
WIDTH = 8  # rows of features are padded to a multiple of it, which keeps products of matrices aligned


def curvature_bytes(n_layers: int, n_columns: int, hidden_size: int) -> int:
    """What the sums behind the matrices of all columns take: 8 (D + 1)^2 bytes each, or about half of that where D is
    large, 75 MB at D = 4,096; a factor takes 4 (D + 1)^2.
    """
    return n_layers * n_columns * max(8 * kept_numbers(hidden_size + 1), 4 * (hidden_size + 1) ** 2)


class Place(NamedTuple):
    """What a matrix is made for: a column of a layer, by their numbers, or several, by the first of them."""

    layer: int
    column: int


class Features:
    """Room for the features of one layer's tokens, centred, with a one behind them: used again for every chunk."""

    def __init__(self) -> None:
        self.room = torch.empty(0, 0)

    def of(self, acts: Tensor, mean: Tensor) -> Tensor:
        """acts [N, D] of any float dtype and mean [D] float32 -> [acts - mean, 1], float32 [N, E], until the next call.

        Nothing is divided by a scale: weights are.
        """
        n, d = acts.shape
        width = -(-(d + 1) // WIDTH) * WIDTH
        if len(self.room) < n or self.room.shape[1] != width or self.room.device != acts.device:
            self.room = torch.empty(n, width, device=acts.device)
        rows = self.room[:n]
        rows[:, d] = 1
        rows[:, :d].copy_(acts)
        rows[:, :d].sub_(mean)
        return rows[:, : d + 1]


class Grams:
    """The sums over all tokens of a pass of x x' for each layer, x being its features, and their mean and deviation.

    Where a run has several folds F these are summed apart: what trains the probes of one is the total less its own.
    """

    def __init__(self, centre: Tensor, n_folds: int = 1):
        """centre [L, D] is what features are centred by, near their mean: it keeps the sums precise."""
        self.centre, (n_layers, d) = centre, centre.shape
        self.sums = SquareSums(d + 1, centre.device)  # by layer and fold
        wide: dict[str, Any] = {"dtype": torch.float64, "device": centre.device}
        self.moments_ = torch.zeros(n_layers, n_folds, 2, d + 1, **wide)  # of x and x^2

    def rows(self, fold: Tensor) -> list[Tensor] | None:
        """Which tokens are of each fold, by the fold [N] of each; None where there is one.  The host waits for it."""
        n_folds = self.moments_.shape[1]
        return None if n_folds == 1 else [(fold == n).nonzero()[:, 0] for n in range(n_folds)]

    def add(self, layer: int, x: Tensor, rows: Sequence[Tensor] | None = None) -> None:
        """Adds x [N, E] = Features.of(acts, centre[layer]), of which `rows` are those of each fold."""
        for number, own in enumerate([x] if rows is None else [x[each] for each in rows]):
            self.sums.add((layer, number), own)
            self.moments_[layer, number, 0] += own.sum(0)
            self.moments_[layer, number, 1] += own.square().sum(0)

    def add_other_ranks(self) -> None:
        """Adds what other ranks have summed."""
        n_layers, n_folds = self.moments_.shape[:2]
        add(self.moments_, *(self.sums.of((i, number)) for i in range(n_layers) for number in range(n_folds)))

    @property
    def n(self) -> Tensor:
        """How many tokens train the probes of each fold [F], float64."""
        return _without_each(self.moments_[0, :, 0, -1])

    def weighted(self, layer: int, of_folds: Tensor) -> Tensor:
        """What the tokens that train the probes of each fold sum to, times of_folds [F], summed over folds: [E, E]."""
        parts = enumerate(_without_each(of_folds).unbind())  # each part counts for the others
        return self.sums.whole(sum((self.sums.of((layer, number)) * n for number, n in parts), start=torch.zeros(())))

    def scaling(self) -> tuple[Tensor, Tensor]:
        """Mean [L, D] of all tokens' raw features, and standard deviation [L, F, D] of those that train each fold's
        probes, float32; 1 where a feature is constant.
        """
        centre = self.centre[:, None]
        offset, squares = (_without_each(self.moments_[..., :-1], dim=1) / self.n[:, None, None]).unbind(2)
        mean, variance = centre + offset, squares - offset.square()
        varies = variance > 1e-12 * mean.square() + 1e-30  # rounding leaves as much of a constant
        total = self.moments_[:, :, 0].sum(1)
        return (self.centre + total[:, :-1] / total[:, -1:]).float(), torch.where(varies, variance, 1.0).sqrt().float()


def _without_each(parts: Tensor, dim: int = 0) -> Tensor:
    """The sum over `dim` less each of its parts in turn; of a single part, it."""
    return parts if parts.shape[dim] == 1 else parts.sum(dim, keepdim=True) - parts


class Newest(NamedTuple):
    """Tokens that were handed over last."""

    parts: tuple[Tensor, ...]  # [N, ...] each
    counts: Tensor  # [P, N]
    drawn: Tensor  # [N] bool
    n: Arriving  # how many were drawn, and how many for each place: P + 1 numbers


class Drawn(NamedTuple):
    """Drawn tokens."""

    parts: tuple[Tensor, ...]  # [n, ...] each
    counts: Tensor  # [P, n], 0 where a token was drawn for others
    each: list[int]  # how many were drawn for each place

    @property
    def nbytes(self) -> int:
        """What they take."""
        return sum(part.nbytes for part in self.parts) + self.counts.nbytes

    def rows(self) -> tuple[Tensor, ...]:
        """Which of them were drawn for each place, [P] of [m]."""
        return torch.nonzero_static(self.counts, size=sum(self.each))[:, 1].split(self.each)


class DrawnQueue:
    """Drawn tokens that wait until there are many, since an addition of few costs as much.

    The host learns how many were drawn when the next ones are handed over, and so waits for no device.
    """

    def __init__(self) -> None:
        self.waiting: list[Drawn] = []
        self.newest: Newest | None = None

    def put(self, parts: tuple[Tensor, ...], counts: Tensor) -> None:
        """Takes those of tokens with these parts that were drawn; counts [P, N] are 0 where one was not."""
        self._pick()
        each = counts != 0
        drawn = each.any(0)
        self.newest = Newest(parts, counts, drawn, Arriving(torch.cat([drawn.sum()[None], each.sum(1)])))

    def _pick(self) -> None:
        """Keeps of the newest tokens those that were drawn."""
        if self.newest is not None:
            parts, counts, drawn, numbers = self.newest
            n, *each = numbers.get()
            rows = torch.nonzero_static(drawn, size=n)[:, 0]
            self.waiting.append(Drawn(tuple(part[rows] for part in parts), counts[:, rows], each))
            self.newest = None

    @property
    def is_full(self) -> bool:
        """Whether so many wait that it is time to add them."""
        n = sum(own.counts.shape[1] for own in self.waiting)
        return n >= HELD or sum(own.nbytes for own in self.waiting) >= HELD_BYTES

    def take(self, settle: bool = False) -> Drawn | None:
        """All that wait, with the newest ones to `settle`; None where there are none."""
        if settle:
            self._pick()
        if not self.waiting:
            return None
        parts = tuple(torch.cat(part) for part in zip(*(own.parts for own in self.waiting), strict=True))
        counts = torch.cat([own.counts for own in self.waiting], 1)
        each = [sum(own) for own in zip(*(own.each for own in self.waiting), strict=True)]
        self.waiting.clear()
        return Drawn(parts, counts, each)


class DrawnTokens:
    """Sums over some of a pass's tokens, drawn in proportion to how much each bends the objective of a place.

    The second derivative of an objective is a sum over all tokens, h_t x_t x_t' with h_t the curvature of token t.  Of
    M tokens drawn with probabilities q_t = min(1, M h_t / sum of all h), each counted h_t / q_t, the sum has the same
    expectation, and 8 E of them will do for a step (Xu, Yang, Roosta-Khorasani, Re & Mahoney 2016).
    """

    def __init__(self, places: Sequence[Place], mean: Tensor):
        """For these P places; features are centred by mean [L, D]."""
        self.places, self.mean = list(places), mean
        self.sums = SquareSums(mean.shape[1] + 1, mean.device)
        self.queue = DrawnQueue()

    def add(self, acts: Tensor, counts: Tensor) -> None:
        """Adds those of acts [N, L, D] that were drawn; counts [P, N] are 0 where one was not."""
        self.queue.put((acts,), counts)
        if self.queue.is_full:
            self._add_all(self.queue.take())

    def settle(self) -> None:
        """Adds the tokens that wait."""
        self._add_all(self.queue.take(settle=True))

    def _add_all(self, drawn: Drawn | None) -> None:
        if drawn is None:
            return
        (acts,), rows, features = drawn.parts, drawn.rows(), Features()
        for layer in dict.fromkeys(place.layer for place in self.places):
            x = features.of(acts[:, layer], self.mean[layer])
            for number, (place, own) in enumerate(zip(self.places, rows, strict=True)):
                if place.layer == layer:
                    self._add(place, x.index_select(0, own), drawn.counts[number, own])

    def _add(self, place: Place, x: Tensor, counts: Tensor) -> None:
        """Adds tokens x [n, E], which are changed, that count so much [n], to the sum of a place."""
        self.sums.add(place, x.mul_(counts[:, None].sqrt()))  # both factors alike: rounded, too, it is definite


class AllTokens:
    """The same sums over all tokens, for places with so few features that each may count."""

    def __init__(self, places: Sequence[Place], mean: Tensor):
        """As DrawnTokens."""
        self.places, self.mean, self.features = list(places), mean, Features()
        self.sums = SquareSums(mean.shape[1] + 1, mean.device)

    def add(self, acts: Tensor, counts: Tensor) -> None:
        """Adds acts [N, L, D] that count so much [P, N]."""
        for layer in dict.fromkeys(place.layer for place in self.places):
            own = [number for number, place in enumerate(self.places) if place.layer == layer]
            x = self.features.of(acts[:, layer], self.mean[layer])  # [N, E]
            added = (x.mT * counts[own[0] : own[-1] + 1, None]) @ x
            for number, each in zip(own, added, strict=True):
                self.sums.add_matrix(self.places[number], each)

    def settle(self) -> None:
        """Nothing: no token waits."""


class Chance:
    """By what chance tokens are drawn in a pass: the own one of each, moved on by as much for all."""

    def __init__(self, seed: int):
        """`seed` of the pass."""
        self.random = torch.Generator().manual_seed(seed)
        self.shift = float(torch.rand((), generator=self.random))

    def of(self, acts: Tensor, chance: Tensor | None) -> Tensor:
        """Of tokens with acts [N, ...] and these chances [N], uniform in 0 .. 1; None: they are as good as any."""
        if chance is None:
            chance = send(torch.rand(len(acts), generator=self.random), acts.device)
        return (chance + self.shift).frac()


def draw(curvature: Tensor, rate: Tensor, chance: Tensor) -> Tensor:
    """What each token counts at each place [P, N], 0 where it is not drawn.

    curvature [P, N] is what it counts in the sum over all; it is drawn with the probability min(1, curvature rate),
    rate [P], where its chance [N], uniform in 0 .. 1, is below that.
    """
    drawn = chance < curvature * rate[:, None]
    return torch.maximum(curvature, 1 / rate[:, None]).masked_fill_(~drawn, 0)


def factorise(matrices: Sequence[Tensor]) -> tuple[list[Tensor], int | None]:
    """The Cholesky factors of matrices [E, E] float32, and the first one that has none, if there is one.

    Where features say the same, what rounding has left of their difference is outweighed: such a matrix is changed.
    The scale of a feature makes no difference (Higham 2002, chapter 10).
    """
    tried = [torch.linalg.cholesky_ex(matrix) for matrix in matrices]
    factors = [factor for factor, _ in tried]
    for number in _failed([info for _, info in tried]):
        matrix = matrices[number]
        matrix.diagonal().mul_(1 + len(matrix) * torch.finfo(torch.float32).eps)
        factors[number], info = torch.linalg.cholesky_ex(matrix)
        if _failed([info]) or not factors[number].isfinite().all():
            return factors, number
    return factors, None


def _failed(infos: Sequence[Tensor]) -> list[int]:
    """Where a factorisation broke off; the host waits once for all of them."""
    return torch.stack(list(infos)).nonzero()[:, 0].tolist() if infos else []
