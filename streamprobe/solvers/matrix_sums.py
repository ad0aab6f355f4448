"""Sums of matrices over tokens, float64, so that they do not depend on the order in which the tokens came.

Shapes: n tokens, E features.
"""

from typing import Any

import torch
from torch import Tensor

from streamprobe.system.distributed import add, add_at, world
from streamprobe.system.hardware import coarse_float32

PANEL = 512  # rows of a panel, about, where a matrix has more than twice as many


def panels_of(size: int) -> list[slice]:
    """The rows of a symmetric matrix [size, size] in panels, each kept up to its last row's place on the diagonal."""
    n = 1 if size <= 2 * PANEL else -(-size // PANEL)
    edges = [size * i // n for i in range(n + 1)]
    return [slice(start, stop) for start, stop in zip(edges, edges[1:], strict=False)]


def kept_numbers(size: int) -> int:
    """How many numbers of a symmetric matrix [size, size] are kept: all of a small one, about half of a large one."""
    return sum((rows.stop - rows.start) * rows.stop for rows in panels_of(size))


class SquareSums:
    """Sums of x'x by what they are for, of which the lower half is kept."""

    def __init__(self, size: int, device: torch.device):
        """size: E."""
        self.size, self.device = size, device
        self.panels, self.length = panels_of(size), kept_numbers(size)
        self.kept: dict[Any, Tensor] = {}  # panel by panel

    def of(self, key: Any) -> Tensor:
        """What is kept of a sum, at first zeros."""
        if key not in self.kept:
            self.kept[key] = torch.zeros(self.length, dtype=torch.float64, device=self.device)
        return self.kept[key]

    def add(self, key: Any, x: Tensor) -> None:
        """Adds x'x of x [n, E], whose factors may be rounded as in `coarse_float32`."""
        kept, start = self.of(key), 0
        for rows in self.panels:
            with coarse_float32():
                added = x[:, rows].mT @ x[:, : rows.stop]
            kept[start : start + added.numel()].view_as(added).add_(added)
            start += added.numel()

    def add_matrix(self, key: Any, matrix: Tensor) -> None:
        """Adds a matrix [E, E] that is kept whole."""
        assert len(self.panels) == 1, "a matrix that is kept in panels"
        self.of(key).view_as(matrix).add_(matrix)

    def whole(self, kept: Tensor) -> Tensor:
        """The symmetric matrix [E, E] of what is kept."""
        matrix, start = torch.empty(self.size, self.size, dtype=torch.float64, device=self.device), 0
        for rows in self.panels:
            panel = kept[start : start + (rows.stop - rows.start) * rows.stop].view(-1, rows.stop)
            matrix[rows, : rows.stop] = panel
            matrix[: rows.start, rows] = panel[:, : rows.start].mT
            start += panel.numel()
        return matrix

    def take(self, key: Any, rank: int | None = None) -> Tensor | None:
        """The sum [E, E] of all ranks, which is then let go; None where it is only for another `rank`."""
        kept = self.of(key)
        del self.kept[key]
        return self.whole(kept) if is_here(kept, rank) else None


class MatrixSums:
    """Sums of matrices of any shape by what they are for."""

    def __init__(self, shape: tuple[int, int], device: torch.device):
        self.shape, self.device = shape, device
        self.kept: dict[Any, Tensor] = {}

    def add(self, key: Any, matrix: Tensor) -> None:
        """Adds a matrix."""
        self.kept[key] = self.kept[key].add_(matrix) if key in self.kept else matrix.double()

    def take(self, key: Any, rank: int) -> Tensor | None:
        """The sum of all ranks, which is then let go; None where it is for another `rank`."""
        found = self.kept.pop(key, None)
        if found is None:
            found = torch.zeros(self.shape, dtype=torch.float64, device=self.device)
        return found if is_here(found, rank) else None


def is_here(tensor: Tensor, rank: int | None) -> bool:
    """Adds the tensors of all ranks, on every rank or on one; whether the sum is on this one."""
    if rank is None:
        add(tensor)
    else:
        add_at(tensor, rank)
    return rank is None or rank == world().rank
