"""Tokens of the embedded model, for solvers: activations as they are, and columns of both targets."""

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from builders import setup_of
from torch import Tensor

from streamprobe.lags import Column
from streamprobe.probes.sites import Site

ROOT = Path(__file__).parents[1]


class Tokens(NamedTuple):
    """What a solver is given."""

    acts: Tensor  # [N, L, D]
    targets: Tensor  # [N, K]
    valid: Tensor  # [N, K]


class Problem(NamedTuple):
    """What is solved, and what is known of it: all training tokens in a random order."""

    sites: list[Site]
    columns: list[Column]
    tokens: Tokens


@cache
def demo_problem() -> Problem:
    """100 chains of the embedded model, two layers and columns of both targets."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        grid = ["--layers", "1", "3", "--lags", "-4", "0", "8", "--max_chains", "100", "--controls", "none"]
        setup = setup_of(["configs/demo.yaml", *grid])
        batches = [(b.acts, b.targets, b.valid) for b in setup.reader.read("train")]
    acts, targets, valid = (torch.cat(column) for column in zip(*batches, strict=True))
    order = torch.randperm(len(acts), generator=torch.Generator().manual_seed(0))
    [feed] = setup.feeds
    return Problem(feed.sites, setup.inputs.columns, Tokens(acts[order], targets[order], valid[order]))


def weights(tokens: Tokens) -> Tensor:
    """Negatives / positives of each column [K]."""
    n, hits = tokens.valid.sum(0), tokens.targets.sum(0)
    return (n - hits) / hits


def chunks(tokens: Tokens, size: int = 2000, seed: int | None = None) -> Iterator[Tokens]:
    """The tokens, `size` at a time: as they lie, or in the order of a seed."""
    n = len(tokens.acts)
    order = torch.arange(n) if seed is None else torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    for rows in order.split(size):
        yield Tokens(*(part[rows] for part in tokens))
