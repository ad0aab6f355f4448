"""What is trained in a run: a job for each solver and each group of sites with as many features.

Shapes: N tokens, L sites, K columns, D features, P features that chains alone give.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from streamprobe.activations.batch import TokenBatch
from streamprobe.activations.feed import Feed
from streamprobe.config.schema import TrainingConfig
from streamprobe.controls.table import CONTROLS
from streamprobe.probes.early_stopping import BestProbes
from streamprobe.probes.sites import control_sites, layer_sites
from streamprobe.run.checkpoint import Checkpoint
from streamprobe.run.inputs import Inputs
from streamprobe.run.memory_plan import Kept
from streamprobe.solvers.adam import AdamSolver
from streamprobe.solvers.newton import NewtonSolver
from streamprobe.solvers.table import SOLVERS
from streamprobe.system.console import say
from streamprobe.trainer import Done, Job

PROBED = "layers"  # the feed of the probes themselves


def make_feeds(inputs: Inputs, layers: Sequence[int], hidden_size: int) -> list[Feed]:
    """The probed layers first, then the controls with sites of their own.

    A control that changes the labels is one more column of the probed layers; others are asked for the columns to which
    they apply.
    """
    n_layers, controls = len(layers), inputs.controls
    every, real = torch.arange(len(inputs.columns)), torch.arange(inputs.n_real)
    feeds = [Feed(PROBED, layer_sites(layers), hidden_size, lambda batch: batch.acts[:, :n_layers], every)]
    if controls.embedded:
        sites = control_sites(controls.embedded)
        feeds.append(Feed("embeddings", sites, hidden_size, lambda batch: batch.acts[:, n_layers:], real))
    for name, place in controls.places.items():
        asked = [k for k in real.tolist() if CONTROLS[name].applies(inputs.columns[k])]
        if asked:
            width = place.stop - place.start
            feeds.append(Feed(name, control_sites([name]), width, _on_the_side(place), torch.tensor(asked)))
    return feeds


def _on_the_side(place: slice) -> Callable[[TokenBatch], Tensor]:
    """What a control's probes read of a batch, [N, 1, P]."""
    return lambda batch: batch.side[:, None, place]


def make_jobs(
    inputs: Inputs, feeds: Sequence[Feed], training: TrainingConfig, *, kept: Kept, device: torch.device
) -> list[Job]:
    """A new job for every solver and feed, in a run that keeps so much in memory."""
    make: dict[str, Callable[[Feed], Job]] = {
        "adam": lambda feed: _adam_job(inputs, feed, training, device),
        "newton": lambda feed: _newton_job(inputs, feed, training, device, kept=kept),
    }
    return [make[name](feed) for name in training.solvers for feed in feeds]


def _adam_job(inputs: Inputs, feed: Feed, training: TrainingConfig, device: torch.device) -> Job:
    """Every column as often as there are seeds, since each of Adam's probes starts elsewhere."""
    pairs = [(k, inputs.columns[k]) for k in feed.columns.tolist()]
    more = range(1, training.seeds)
    pairs += [(k, column._replace(seed=seed)) for seed in more for k, column in pairs if not column.control]
    index = torch.tensor([k for k, _ in pairs])
    solver = AdamSolver(
        feed.sites,
        [column for _, column in pairs],
        feed.n_features,
        inputs.positive_weight[index],
        learning_rate=training.learning_rate,
        l2=training.l2,
        batch_size=training.batch_size,
        standardize=training.standardize,
        seed=training.seed,
        device=device,
    )
    return Job(solver, BestProbes(solver.bank(), training.patience), feed._replace(columns=index.to(device)))


def _newton_job(inputs: Inputs, feed: Feed, training: TrainingConfig, device: torch.device, *, kept: Kept) -> Job:
    """Where the model runs in every pass, matrices are taken in every pass, too: they cost little beside it."""
    often = {} if kept.train else {"matrices_every": 1}
    solver = NewtonSolver(
        feed.sites,
        [inputs.columns[k] for k in feed.columns.tolist()],
        feed.n_features,
        inputs.positive_weight[feed.columns],
        n_tokens=inputs.census["train"].tokens,
        l2=training.l2,
        tolerance=training.tolerance,
        standardize=training.standardize,
        shared=kept.shared,
        seed=training.seed,
        device=device,
        **often,
    )
    return Job(solver, BestProbes(solver.bank(), None), feed._replace(columns=feed.columns.to(device)))


def take_up(jobs: Sequence[Job], checkpoint: Checkpoint | None) -> Done:
    """Puts every job where the checkpoint left it, if there is one; returns how far that was."""
    if not checkpoint:
        return Done()
    for job in jobs:
        job.solver.load(checkpoint.states.get(job.name, {}))
        job.best.load(checkpoint.states.get(f"{job.name}-best", {}))
    say(f"resumed   after pass {checkpoint.passes}")
    return Done(checkpoint.passes, checkpoint.tokens)


def states_of(jobs: Sequence[Job]) -> dict[str, dict[str, Tensor]]:
    """What a checkpoint holds of them."""
    states = {job.name: job.solver.state() for job in jobs}
    return states | {f"{job.name}-best": job.best.state() for job in jobs}


def describe_progress(jobs: Sequence[Job]) -> str:
    """Where every solver stands, for the line that ends a pass."""
    lines = []
    for name in dict.fromkeys(job.solver.name for job in jobs):
        own = [job for job in jobs if job.solver.name == name]
        final, total = sum(int(job.best.stopped.sum()) for job in own), sum(job.best.stopped.numel() for job in own)
        lines.append(f"{name}: {_how_good(own)}{final} of {total} {SOLVERS[name].final}")
    return "   ".join(lines)


def _how_good(jobs: Sequence[Job]) -> str:
    """The best F1 of the probes of a solver so far where it goes by that, else how large their gradients are."""
    probed, *_ = jobs
    real = [k for k, column in enumerate(probed.solver.columns) if not column.control]
    if probed.best.patience is not None:
        f1 = probed.best.score[:, real]
        return f"best validation F1 {f1.min():.3f} .. {f1.max():.3f}, "
    norms = torch.cat([job.solver.gradient_norm.flatten() for job in jobs])
    return "" if norms.isnan().any() else f"gradients at most {float(norms.max()):.1e}, "
