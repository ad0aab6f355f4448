"""What nested probes sum in a pass: objectives and gradients over all tokens, and once curvature over some.

Shapes: N tokens, n drawn ones, L layers, K columns, Q = K L' probes that are not final, G groups of columns that share
matrices, P features of the control, D hidden size, E = P + 1 + D: the control's weights, the bias, a layer's weights.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from streamprobe.probes.nested import Blocks
from streamprobe.solvers.curvature import Chance, Drawn, DrawnQueue, Features, draw
from streamprobe.solvers.matrix_sums import MatrixSums, SquareSums
from streamprobe.solvers.newton_sums import DRAWN, DRAWN_MOST, Slopes
from streamprobe.system.distributed import add
from streamprobe.system.hardware import coarse_float32, send


class Centres(NamedTuple):
    """What features are centred by: means over the training tokens."""

    control: Tensor  # [P]
    layers: Tensor  # [L, D]


class Live(NamedTuple):
    """The probes that a pass is for: of each layer the columns [k] that are not final, and where they lie in a row."""

    columns: list[Tensor]  # [L] of [k] int64
    rows: list[slice]  # [L] of the Q probes

    @classmethod
    def of(cls, final: Tensor) -> "Live":
        """Those of the probes [L, K] that are not final."""
        numbers = [[k for k, over in enumerate(own) if not over] for own in final.tolist()]
        ends = [sum(map(len, numbers[: i + 1])) for i in range(len(numbers))]
        rows = [slice(end - len(own), end) for end, own in zip(ends, numbers, strict=True)]
        return cls([send(torch.tensor(own, dtype=torch.int64), final.device) for own in numbers], rows)

    @property
    def every(self) -> Tensor:
        """The columns of all of them, [Q]."""
        return torch.cat(self.columns)


class NestedSums:
    """The sums of one pass, each over the tokens that are valid for a column, at `raw` weights of centred features."""

    def __init__(self, live: Live, raw: Tensor, centres: Centres, positive_weight: Tensor):
        """raw [L, K, E] float32, positive_weight [K]."""
        self.live, self.centres, self.positive_weight = live, centres, positive_weight
        self.n_control = len(centres.control) + 1
        wide: dict[str, Any] = {"dtype": torch.float64, "device": raw.device}
        self.raw = torch.cat([raw[i, own] for i, own in enumerate(live.columns)])  # [Q, E]
        self.gradient_ = torch.zeros(raw.shape, **wide)
        self.loss_ = torch.zeros(raw.shape[:2], **wide)  # [L, K]
        self.n = torch.zeros(len(positive_weight), **wide)
        self.control, self.layers = Features(), [Features() for _ in live.columns]

    def add(self, blocks: Blocks, targets: Tensor, valid: Tensor) -> None:
        """Adds a chunk of tokens; targets and valid [N, K]."""
        valid, positive = valid.mT, targets.mT.float()
        sign = 1 - 2 * positive  # [K, N]
        weight = (positive * self.positive_weight[:, None] + (1 - positive)) * valid
        x, layers = self.features(blocks)
        logits = self.raw[:, : self.n_control] @ x.mT  # [Q, N]
        for rows, layer in zip(self.live.rows, layers, strict=True):
            logits[rows].addmm_(self.raw[rows, self.n_control :], layer.mT)
        every = self.live.every
        slopes = Slopes.at(logits, weight[every], sign[every])
        from_control = (slopes.gradient @ x).double()
        for i, (columns, rows) in enumerate(zip(self.live.columns, self.live.rows, strict=True)):
            own = torch.cat([from_control[rows], (slopes.gradient[rows] @ layers[i]).double()], 1)
            self.gradient_[i, columns] += own
            self.loss_[i, columns] += slopes.loss[rows]
        self.n += valid.sum(1)

    def add_other_ranks(self) -> None:
        """Adds what other ranks have summed."""
        add(self.gradient_, self.loss_, self.n)

    def features(self, blocks: Blocks) -> tuple[Tensor, list[Tensor]]:
        """Centred features: the control's [N, P + 1] with a one behind them, and each layer's [N, D]."""
        x = self.control.of(blocks.control, self.centres.control)
        pairs = zip(self.layers, blocks.layers.unbind(1), self.centres.layers, strict=True)
        return x, [room.of(acts, centre)[:, :-1] for room, acts, centre in pairs]


class NestedCurvature:
    """The second derivatives at the control, where every layer's weights are 0, from tokens drawn by their curvature.

    Of each group of columns: [A, B; B', C], A of the control's weights, C of a layer's, B of both, in units of what the
    curvature of its columns sums to.  All layers share A, and the tokens that are drawn.
    """

    def __init__(self, shares: Tensor, expected: Tensor, raw: Tensor, *, n_features: int, seed: int):
        """shares [G, K] of each group's matrix that is a column's, expected [K] sums of curvature, raw [K, P + 1].

        `n_features` D.
        """
        self.shares, self.expected, self.raw = shares, expected, raw
        self.chance = Chance(seed)
        size, device = raw.shape[1], raw.device
        self.of_control = SquareSums(size, device)  # A [P + 1, P + 1] by group
        self.of_both = MatrixSums((size, n_features), device)  # B [P + 1, D] by layer and group
        self.of_layer = SquareSums(n_features, device)  # C [D, D]
        self.queue = DrawnQueue()

    def add(
        self, sums: NestedSums, blocks: Blocks, targets: Tensor, valid: Tensor, *, chance: Tensor | None = None
    ) -> None:
        """Draws some of a chunk of tokens, as `NestedSums.add` takes them, by their chance [N]."""
        valid, positive = valid.mT, targets.mT.float()
        weight = (positive * sums.positive_weight[:, None] + (1 - positive)) * valid
        x, _ = sums.features(blocks)
        curvature = Slopes.at(self.raw @ x.mT, weight, 1 - 2 * positive).curvature  # [K, N]
        relative = self.shares @ (curvature / self.expected[:, None].float()).nan_to_num(0, 0, 0)
        size = self.raw.shape[1] + blocks.layers.shape[2]
        wanted = ((self.shares > 0).sum(1) * DRAWN).clamp(max=DRAWN_MOST) * size
        counts = draw(relative, wanted.float(), self.chance.of(blocks.control, chance))
        self.queue.put(tuple(blocks), counts)
        if self.queue.is_full:
            self._add_all(self.queue.take(), sums)

    def settle(self, sums: NestedSums) -> None:
        """Adds the tokens that wait."""
        self._add_all(self.queue.take(settle=True), sums)

    def _add_all(self, drawn: Drawn | None, sums: NestedSums) -> None:
        if drawn is None:
            return
        x, layers = sums.features(Blocks(*drawn.parts))
        for group, rows in enumerate(drawn.rows()):
            root = drawn.counts[group, rows, None].sqrt()
            control = x[rows] * root
            self.of_control.add(group, control)
            for i, layer in enumerate(layers):
                scaled = layer[rows] * root
                with coarse_float32():
                    both = control.mT @ scaled
                self.of_both.add((i, group), both)
                self.of_layer.add((i, group), scaled)
