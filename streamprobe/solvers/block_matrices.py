"""Where nested probes begin, and the second derivatives there: of a control's weights and a layer's, block by block.

Shapes: L layers, K columns, G groups of columns, P features of the control, D hidden size, E = P + 1 + D: the weights
of the control's features, the bias, and those of a layer.
"""

from collections.abc import Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor

from streamprobe.errors import InputError
from streamprobe.probes.sites import Site
from streamprobe.solvers.curvature import factorise
from streamprobe.solvers.nested_sums import Centres, NestedCurvature
from streamprobe.solvers.newton import NewtonSolver
from streamprobe.system.distributed import add, owner

PENALTIES = (10.0, 1.0, 0.1, 0.01)  # of a layer's weights, as `l2` is: tried in this order, after weights of 0


class Start(NamedTuple):
    """What nested probes begin with: a control that is final, and how features are scaled."""

    site: Site
    point: Tensor  # [K, P + 1] float64, weights of scaled features with the bias behind them
    penalty: Tensor  # [P + 1] of d J / d u
    norm: Tensor  # [K] of the control's gradient
    centres: Centres
    scale: Tensor  # [L, K, E] float64, 1 at the bias
    positive_weight: Tensor  # [K]
    expected: Tensor  # [K] float64: the sum of the curvature of all tokens
    groups: list[list[int]]  # the columns of each group that shares a matrix
    slope: Tensor  # [L, K, E] of a line that is added to J, or [1, 1, 1] where there is none: see `NewtonSolver.anchor`

    @classmethod
    def of(cls, control: NewtonSolver, layers: NewtonSolver) -> "Start":
        """Where the control of one site and the probes of the layers have ended."""
        of_control, of_layers = control.scale[:, control.fold], layers.scale[:, control.fold]  # [1, K, P], [L, K, D]
        n_layers, ones = len(layers.sites), torch.ones_like(of_layers[..., :1])
        scale = torch.cat([of_control.expand(n_layers, -1, -1), ones, of_layers], 2).double()
        groups: dict[Any, list[int]] = {}
        for k, place in enumerate(control.find_places()[0]):  # by what a checkpoint holds
            groups.setdefault(place, []).append(k)
        return cls(
            site=control.sites[0],
            point=control.ended[0],
            penalty=control.penalty,
            norm=control.gradient_norm[0],
            centres=Centres(control.mean[0], layers.mean),
            scale=scale,
            positive_weight=control.positive_weight,
            expected=control.expected[0],
            groups=list(groups.values()),
            slope=_slope(control, layers),
        )


def _slope(control: NewtonSolver, layers: NewtonSolver) -> Tensor:
    """What anchors the control and, as much, the weights of a layer beside it: [L, K, E], or [1, 1, 1] of none."""
    if control.at_zero.numel() == 1:
        return control.at_zero
    own = [layers.columns.index(column) for column in control.columns]
    of_control = control.at_zero.expand(len(layers.sites), -1, -1)
    return torch.cat([of_control, layers.at_zero[:, own, :-1]], 2) * control.reliance[..., None]


class BlockMatrices:
    """The second derivatives [A, B; B', C + 2 lambda] of J at the control, ready to be solved for.

    Of every group of columns, in units of what the curvature of its columns sums to, and of features that are centred
    but not scaled: the penalty is.  Every rank has A, and of B and C those of some layers and groups.
    """

    def __init__(self, curvature: NestedCurvature, start: Start, n: Tensor):
        """Of the sums of a pass on all ranks; n [K] valid tokens of each column."""
        self.groups, self.scale, self.n_control = start.groups, start.scale, start.point.shape[1]
        self.size = start.expected / n  # [K] by which a matrix is multiplied for each column
        self.of_control: list[Tensor] = []  # [G] factors of A [P + 1, P + 1]
        self.shifts: dict[tuple[int, int], Tensor] = {}  # A^-1 B [P + 1, D] by layer and group
        self.rest: dict[tuple[int, int], Tensor] = {}  # C - B' A^-1 B [D, D]
        self.factors: dict[tuple[int, int, int], Tensor] = {}  # of that with the penalty of a level, as last asked for
        ridge = (start.penalty + 1e-9) * start.scale[0, :, : self.n_control].square()  # [K, P + 1]
        for group, columns in enumerate(self.groups):
            of_control = curvature.of_control.take(group)
            assert of_control is not None
            matrix = of_control.float()
            matrix.diagonal().add_((ridge[columns].mean(0) / self.size[columns].mean()).float())
            self.of_control.append(_factor(matrix, start.site))
            for layer in range(len(start.scale)):
                rank = owner(group * len(start.scale) + layer)
                both = curvature.of_both.take((layer, group), rank)
                of_layer = curvature.of_layer.take((layer, group), rank)
                if both is not None and of_layer is not None:
                    shift = torch.cholesky_solve(both.float(), self.of_control[group])
                    self.shifts[layer, group] = shift
                    self.rest[layer, group] = of_layer.float().sub_(both.float().mT @ shift)
        self.site = start.site

    def _factor_of(self, layer: int, group: int, level: int) -> Tensor:
        """The factor of a layer's block with the penalty of a level."""
        at = layer, group, level
        if at not in self.factors:
            matrix = self.rest[layer, group].clone()
            columns = self.groups[group]
            ridge = 2 * PENALTIES[level] * self.scale[layer, columns, self.n_control :].square().mean(0)
            matrix.diagonal().add_((ridge / self.size[columns].mean()).float())
            self.factors[at] = _factor(matrix, self.site)
        return self.factors[at]

    def _let_go(self, layer: int, group: int, levels: Collection[int]) -> None:
        """Drops a layer's factors of other levels than these, if there are any: probes that go on ask for no other."""
        for number in range(len(PENALTIES)) if levels else ():
            if number not in levels:
                self.factors.pop((layer, group, number), None)

    def solve(self, gradient: Tensor, level: Tensor, where: Tensor) -> Tensor:
        """H^-1 g for g [L, K, E] at the probes `where` [L, K] is True, of these levels [L, K]; else 0.

        Each layer and group is solved for by the rank that has it.
        """
        solved, n = torch.zeros_like(gradient), self.n_control
        levels, moving = level.tolist(), where.tolist()
        for group, columns in enumerate(self.groups):
            for i, own in enumerate(moving):
                if (i, group) not in self.rest:
                    continue
                by_level: dict[int, list[int]] = {}
                for k in columns:
                    if own[k]:
                        by_level.setdefault(levels[i][k], []).append(k)
                self._let_go(i, group, by_level)
                for number, chosen in by_level.items():
                    scale = self.scale[i, chosen]
                    given = (gradient[i, chosen] * scale).float()
                    u, w = given[:, :n], given[:, n:]
                    shift = self.shifts[i, group]
                    w = torch.cholesky_solve((w - u @ shift).mT, self._factor_of(i, group, number)).mT
                    u = torch.cholesky_solve(u.mT, self.of_control[group]).mT - w @ shift.mT
                    solved[i, chosen] = torch.cat([u, w], 1) * scale / self.size[chosen, None]
        add(solved)
        return solved


def _factor(matrix: Tensor, site: Site) -> Tensor:
    """The Cholesky factor of a matrix, which may be changed.  Raises InputError where it has none."""
    (factor,), missing = factorise([matrix])
    if missing is not None:
        raise InputError(
            f"features of {site.title} and a layer whose Gram matrix cannot be factorised",
            "finite activations, and a penalty that outweighs rounding",
            "use another --dtype, or raise --l2",
        )
    return factor
