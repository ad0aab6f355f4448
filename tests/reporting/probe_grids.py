"""Probes and controls of one solver, with random values, as a run logs them for TensorBoard."""

import math
from typing import Any, NamedTuple

import torch
from builders import sites_of
from torch import Tensor

from streamprobe.evaluation.scores import Scored
from streamprobe.lags import Column

LABEL = "back+track (a|b)"  # what a regular expression would take for more than text


class Grid(NamedTuple):
    name: str
    sites: list[Any]
    columns: list[Column]


REAL = [Column(LABEL, "token", lag) for lag in (-4, 4, 40)]
LAYERS = Grid(
    "newton", sites_of([3, 12]), [*REAL, *(c._replace(control="permuted") for c in REAL), REAL[0]._replace(seed=1)]
)
TEXTS = Grid("newton", sites_of(["embed", "text"]), REAL)
PERSISTENCE = Grid("newton", sites_of(["persistence"]), REAL[1:])
GRIDS = [LAYERS, TEXTS, PERSISTENCE]


def values_of(grid: Grid, seed: int) -> Tensor:
    """A random value [L, K] for each probe."""
    shape = (len(grid.sites), len(grid.columns))
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _scored() -> Scored:
    random = torch.Generator().manual_seed(0)
    scores = torch.randn(500, 2, 7, generator=random)
    targets, valid = torch.rand(500, 7, generator=random) < 0.2, torch.rand(500, 7, generator=random) < 0.9
    return Scored(scores, targets & valid, valid, torch.zeros(500), torch.zeros(500))


SCORED = _scored()  # of the probes of LAYERS
AREAS = torch.tensor([[0.6, 0.7, 0.8, 0.9, 0.9, 0.9, 0.9], [0.7, 0.6, math.nan, 0.9, 0.9, 0.9, 0.9]])
