"""Controls that read the probed layers for other labels; `permuted` shifts the labels within each chain.

Shapes: T tokens in a chain, C labels.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from streamprobe.data.dataset import Dataset
from streamprobe.lags import UNKNOWN, Column


def permute_labels(codes: Tensor, support: Tensor, random: np.random.Generator) -> Tensor:
    """Label codes [T, C] of a chain, shifted around the circle of its labelled samples by a random number of them.

    All C labels move together.  Base rate and lengths of runs stay (a run may part at the ends), and so does where
    labels are unknown.  Each shift is as likely as any other, so what a token's place or text says of its label is
    gone: only what the whole chain says is left.
    """
    labelled = ((codes != UNKNOWN).any(1) & support).nonzero()[:, 0]
    moved = codes.clone()
    if len(labelled):
        moved[labelled] = codes[labelled].roll(int(random.integers(len(labelled))), dims=0)
    return moved


def relabelled_columns(columns: Sequence[Column], controls: Sequence[str], seeds: int) -> list[Column]:
    """The columns and, for each control and seed, their twins that ask the same of its labels."""
    twins = (c._replace(control=control, seed=seed) for control in controls for seed in range(seeds) for c in columns)
    return [*columns, *twins]


def relabel(
    dataset: Dataset, controls: Mapping[str, Callable[[Tensor, Tensor, Any], Tensor]], seeds: int, seed: int
) -> Dataset:
    """The dataset with the labels of `controls`, each made with so many `seeds`, behind those of every chain.

    Each control draws from a generator of its own, so that it does not depend on which others there are: `permuted`
    from that of `seed`, any other from that of `seed` and its name.
    """
    own = {name: [seed] if name == "permuted" else [seed, *name.encode()] for name in controls}
    random = {name: np.random.default_rng(entropy) for name, entropy in own.items()}
    made = {}
    for chain in dataset.chains():
        given = (chain.codes, chain.support)
        others = [new(*given, random[name]) for name, new in controls.items() for _ in range(seeds)]
        made[chain.row] = replace(chain, codes=torch.cat([chain.codes, *others], dim=1))
    splits = {name: [made[chain.row] for chain in chains] for name, chains in dataset.splits.items()}
    names = [f"{label}/{name}{n}" for name in controls for n in range(seeds) for label in dataset.labels]
    return replace(dataset, splits=splits, labels=[*dataset.labels, *names])
