"""Made-up chains with a control and nested probes, for tests of what a layer adds."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from streamprobe.evaluation.scored_probes import ScoredProbes
from streamprobe.evaluation.scores import Scored
from streamprobe.lags import Column
from streamprobe.probes.kept import NESTED
from streamprobe.probes.sites import control_sites, layer_sites


def group(
    scores: Tensor,
    targets: Tensor,
    chain: Tensor,
    *,
    columns: Sequence[Column],
    layers: Sequence[int],
    penalty: Tensor | None = None,
    valid: Tensor | None = None,
    norm: float = 0.0,
) -> ScoredProbes:
    """The nested probes of `layers`, the control first: scores [N, L + 1, K], targets and valid [N, K], chain [N]."""
    sites = [*control_sites(["joint+chain"]), *layer_sites(layers)]
    n, shape = len(columns), scores.shape[1:]
    valid = torch.ones_like(targets) if valid is None else valid
    scored = Scored(scores.float(), targets & valid, valid, chain, torch.arange(len(chain)))
    grid = torch.zeros(shape)
    return ScoredProbes(
        "newton",
        sites,
        list(columns),
        scored,
        grid,
        torch.zeros(n),
        grid,
        grid + norm,
        feed=NESTED,
        penalty=torch.ones(shape) if penalty is None else penalty,
    )


def rows_of(nested: ScoredProbes, norm: float = 0.0) -> list[ScoredProbes]:
    """Groups that have the rows which nested probes fill: the layers', and the joint control's."""
    scored, n = nested.scored, len(nested.columns)
    return [
        nested._replace(
            sites=nested.sites[own],
            scored=scored._replace(scores=scored.scores[:, own]),
            threshold=torch.zeros(len(nested.sites[own]), n),
            best_pass=torch.zeros(len(nested.sites[own]), n),
            gradient_norm=torch.full((len(nested.sites[own]), n), norm),
            feed=feed,
            penalty=None,
        )
        for own, feed in ((slice(1, None), "layers"), (slice(1), "joint"))
    ]


def draw(random: np.random.Generator, n: int, length: int = 30, foresees: float = 0.8) -> tuple[np.ndarray, np.ndarray]:
    """Logits [n, length, 2] of a control and of a nested probe, and targets [n, length], of n chains.

    A chain has a rate, which both know with an error of its own, and a weight of its own for what the nested probe
    alone sees, which that takes for `foresees` in all chains.
    """
    rate = -1.0 + random.standard_normal((n, 1))
    sees = random.standard_normal((n, length))
    weight = foresees * (1 + random.standard_normal((n, 1)))
    targets = random.random((n, length)) < 1 / (1 + np.exp(-rate - weight * sees))
    control = rate + 0.7 * random.standard_normal((n, 1)) + 0.3 * random.standard_normal((n, length))
    nested = control + foresees * sees + 0.5 * random.standard_normal((n, 1))
    return np.stack([control, nested], 2), targets


def as_group(logits: np.ndarray, targets: np.ndarray, layers: Sequence[int] = (3,)) -> ScoredProbes:
    """Such chains as scored probes of one column."""
    n, length, _ = logits.shape
    return group(
        torch.from_numpy(logits.reshape(n * length, -1))[..., None],
        torch.from_numpy(targets.reshape(n * length, 1)),
        torch.arange(n).repeat_interleave(length),
        columns=[Column("back", "onset", 4)],
        layers=layers,
    )
