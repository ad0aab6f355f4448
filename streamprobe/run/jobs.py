"""What each solver of a run is fed: the probed layers, and the controls that they must beat.

Shapes: N tokens, L layers, K columns, D hidden size, P features on the side.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from streamprobe.activations.batch import TokenBatch
from streamprobe.evaluation.scores import Share
from streamprobe.probes.early_stopping import BestProbes
from streamprobe.run.checkpoint import Checkpoint
from streamprobe.run.lab import Lab
from streamprobe.solvers.adam import AdamSolver
from streamprobe.solvers.newton import NewtonSolver
from streamprobe.system.console import say
from streamprobe.trainer import Fit


def make_shares(lab: Lab) -> list[tuple[Share, list[int | str], int]]:
    """Shares of the batches, each with its layers and their features: `layers` first, then those of the controls.

    A permuted label is one more column of the probed layers; other controls have layers of their own, and
    `persistence` only columns that look ahead: at others it knows the answer.
    """
    n_layers = len(lab.config.probes.layers)
    real = torch.arange(lab.n_real)
    ahead = torch.tensor([k for k, column in enumerate(lab.columns[: lab.n_real]) if column.lag > 0], dtype=torch.int64)
    shares: list[tuple[Share, list[int | str], int]] = [
        (
            Share("layers", lambda batch: batch.acts[:, :n_layers], torch.arange(len(lab.columns))),
            list(lab.config.probes.layers),
            lab.hidden_size,
        )
    ]
    if lab.surface_layers:
        surface = Share("surface", lambda batch: batch.acts[:, n_layers:], real)
        shares.append((surface, list(lab.surface_layers), lab.hidden_size))
    for name, part in lab.side.items():
        share = Share(name, _on_the_side(part), ahead if name == "persistence" else real)
        if len(share.columns):
            shares.append((share, [name], part.stop - part.start))
    return shares


def _on_the_side(part: slice) -> Callable[[TokenBatch], Tensor]:
    def features(batch: TokenBatch) -> Tensor:
        return batch.side[:, None, part]

    return features


def make_fits(lab: Lab, checkpoint: Checkpoint | None) -> tuple[list[Fit], tuple[int, int]]:
    """The solvers with their best probes so far, and the passes and tokens behind them: new, or from the checkpoint."""
    fits = [
        make_fit(lab, name, share, layers, n_features)
        for name in lab.config.training.solvers
        for share, layers, n_features in make_shares(lab)
    ]
    if not checkpoint:
        return fits, (0, 0)
    for fit in fits:
        fit.solver.load(checkpoint.parts.get(fit.name, {}))
        fit.best.load(checkpoint.parts.get(f"{fit.name}-best", {}))
    say(f"resumed   after pass {checkpoint.passes}")
    return fits, (checkpoint.passes, checkpoint.tokens)


def make_fit(lab: Lab, name: str, share: Share, layers: list[int | str], n_features: int) -> Fit:
    """A new solver for a share; Adam has every column as often as there are seeds, since each starts elsewhere."""
    training = lab.config.training
    pairs = [(k, lab.columns[k]) for k in share.columns.tolist()]
    if name == "adam":
        more = range(1, training.seeds)
        pairs += [(k, column._replace(seed=seed)) for seed in more for k, column in pairs if not column.control]
    index = torch.tensor([k for k, _ in pairs])
    about = (layers, [column for _, column in pairs], n_features, lab.positive_weight[index])
    share = share._replace(columns=index.to(lab.device))
    if name == "adam":
        adam = AdamSolver(
            *about, training.learning_rate, training.l2, training.batch_size, training.standardize, training.seed,
            lab.device,
        )  # fmt: skip
        return Fit(adam, BestProbes(adam.bank(), training.patience), share)
    newton = NewtonSolver(*about, training.l2, training.tolerance, training.standardize, lab.shared, lab.device)
    return Fit(newton, BestProbes(newton.bank(), None), share)


def standing(fits: Sequence[Fit]) -> str:
    """The solvers' places on the line that ends a pass."""
    places = []
    for name in dict.fromkeys(fit.solver.name for fit in fits):
        own = [fit for fit in fits if fit.solver.name == name]
        final, total = sum(int(fit.best.stopped.sum()) for fit in own), sum(fit.best.stopped.numel() for fit in own)
        real = [k for k, column in enumerate(own[0].solver.columns) if not column.control]
        f1 = own[0].best.score[:, real]
        best, end = ("best ", "stopped") if name == "adam" else ("", "converged")
        scores = f"{best}validation F1 {f1.min():.3f} .. {f1.max():.3f}"
        places.append(f"{name}: {scores}, {final} of {total} probes and controls {end}")
    return "   ".join(places)
