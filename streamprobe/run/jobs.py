"""What is trained in a run: a job for each solver and each group of sites with as many features.

Shapes: N tokens, L sites, K columns, D features, E width of an embedding.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby

import torch
from torch import Tensor

from streamprobe.activations.batch import TokenBatch
from streamprobe.activations.feed import PROBED, Feed
from streamprobe.config.schema import TrainingConfig
from streamprobe.controls.table import CONTROLS
from streamprobe.evaluation.rows import BASELINE_EXACTNESS, JOINT_CHAIN
from streamprobe.lags import Column
from streamprobe.probes.early_stopping import BestProbes
from streamprobe.probes.kinds import half_lives_of, is_kind
from streamprobe.probes.sites import ALL_LAYERS, control_sites, mean_sites
from streamprobe.run.checkpoint import Checkpoint
from streamprobe.run.inputs import Inputs
from streamprobe.run.memory_plan import Kept
from streamprobe.run.reader import Backbone
from streamprobe.run.reads import make_reads
from streamprobe.solvers.adam import AdamSolver
from streamprobe.solvers.newton import NewtonSolver
from streamprobe.solvers.table import SOLVERS
from streamprobe.system.console import say
from streamprobe.trainer import Done, Job


def make_feeds(
    inputs: Inputs, backbone: Backbone, embedding_size: int | None, *, kinds: Sequence[str] = ()
) -> list[Feed]:
    """The probed layers first, those of each width, then the controls with sites of their own, and what else of these
    `kinds` Newton trains.

    A control that changes the labels is one more column of the probed layers; others are asked for the columns to which
    they apply.  `embedding_size` is E where there are layers made of embeddings, else None.
    """
    n_layers, controls = len(backbone.widths), inputs.controls
    every, real = torch.arange(len(inputs.columns)), torch.arange(inputs.n_real)
    feeds = _probed(backbone, every)
    n_read = n_layers * (1 + len(half_lives_of(kinds)))  # with their running means
    if controls.with_layers:
        sites = control_sites(controls.with_layers)
        width = embedding_size or 0
        feeds.append(Feed("embeddings", sites, width, _part(n_read, len(sites), width), real))
    reads = make_reads(controls, n_read, embedding_size or 0)
    for name, hand_made in controls.widths.items():
        asked = [k for k in real.tolist() if CONTROLS[name].applies(inputs.columns[k])]
        if asked:
            width = len(CONTROLS[name].layers) * (embedding_size or 0) + hand_made
            feeds.append(Feed(name, control_sites([name]), width, reads[name], torch.tensor(asked), hand_made))
    feeds += _newton_kinds(kinds, feeds[0], real)
    n_folds = inputs.dataset.folds
    return feeds if n_folds == 1 else [_in_folds(feed, n_folds) for feed in feeds]


def _newton_kinds(kinds: Sequence[str], probed: Feed, columns: Tensor) -> list[Feed]:
    """The feeds of the kinds that are linear on features of their own: running means, and all layers side by side.

    `probed` is that of the layers, or other places, which all have one width.
    """
    n, width, found = len(probed.sites), probed.n_features, []
    for number, half_life in enumerate(half_lives_of(kinds), 1):
        means = _part(number * n, n, width)
        found.append(Feed(f"ema{half_life}", mean_sites(probed.sites, half_life), width, means, columns))
    if "concat" in kinds:
        found.append(Feed("concat", [ALL_LAYERS], n * width, partial(_side_by_side, n=n, width=width), columns))
    return found


def _side_by_side(batch: TokenBatch, *, n: int, width: int) -> Tensor:
    """The first n layers of a batch as one, [N, 1, n D]."""
    return batch.acts[:, None, :n, :width].flatten(2)


def _probed(backbone: Backbone, columns: Tensor) -> list[Feed]:
    """The places of each width, which stand side by side."""
    feeds, sites = list[Feed](), backbone.sites
    for width, own in groupby(range(len(sites)), key=lambda i: backbone.widths[i]):
        first, *rest = own
        some = sites[first : first + 1 + len(rest)]
        name = f"{PROBED}/{width}" if feeds else PROBED
        feeds.append(Feed(name, some, width, _part(first, len(some), width), columns))
    return feeds


def _part(first: int, n: int, width: int) -> Callable[[TokenBatch], Tensor]:
    """What gives the activations of n sites of a batch, without the zeros behind their width."""
    return lambda batch: batch.acts[:, first : first + n, :width]


def _in_folds(feed: Feed, n: int) -> Feed:
    """Asked for the same columns for each of n folds, fold by fold."""
    columns = feed.columns
    return feed._replace(columns=columns.repeat(n), folds=torch.arange(n).repeat_interleave(len(columns)))


def make_jobs(
    inputs: Inputs,
    feeds: Sequence[Feed],
    training: TrainingConfig,
    *,
    kept: Kept,
    device: torch.device,
    solvers: Sequence[str] | None = None,
) -> list[Job]:
    """A new job for every feed and each of these solvers (None: of the run's), which keeps so much in memory."""
    make: dict[str, Callable[[Feed], Job]] = {
        "adam": lambda feed: make_adam_job(inputs, feed, training, device),
        "newton": lambda feed: _newton_job(inputs, feed, training, device, kept=kept),
    }
    pairs = [(name, feed) for name in (training.solvers if solvers is None else solvers) for feed in feeds]
    return [make[name](feed) for name, feed in pairs if name == NewtonSolver.name or not is_kind(feed.name)]


def make_adam_job(
    inputs: Inputs,
    feed: Feed,
    training: TrainingConfig,
    device: torch.device,
    *,
    positive_weight: Tensor | None = None,
) -> Job:
    """Every column as often as there are seeds, since each of Adam's probes starts elsewhere.

    `positive_weight` is that of the run's K columns (None: as its training tokens have it).
    """
    feed, columns = _with_seeds(feed, columns_of(inputs, feed), training.seeds)
    solver = AdamSolver(
        feed.sites,
        columns,
        feed.n_features,
        inputs.positive_weight_of(feed) if positive_weight is None else positive_weight[feed.columns],
        learning_rate=training.learning_rate,
        l2=training.l2,
        batch_size=training.batch_size,
        standardize=training.standardize,
        seed=training.seed,
        device=device,
    )
    return Job(solver, BestProbes(solver.bank(), training.patience), feed.to(device))


def columns_of(inputs: Inputs, feed: Feed) -> list[Column]:
    """The columns that a feed asks for."""
    folds = [0] * len(feed.columns) if feed.folds is None else feed.folds.tolist()
    return [inputs.columns[k]._replace(fold=fold) for k, fold in zip(feed.columns.tolist(), folds, strict=True)]


def _with_seeds(feed: Feed, columns: Sequence[Column], seeds: int) -> tuple[Feed, list[Column]]:
    """A feed that asks once more for its columns that are no controls, for each seed after 0; and all its columns."""
    own = list(enumerate(columns))
    own += [(j, c._replace(seed=seed)) for seed in range(1, seeds) for j, c in own if not c.control]
    own.sort(key=lambda pair: pair[1].fold)  # fold by fold; else as they are
    index = torch.tensor([j for j, _ in own])
    folds = None if feed.folds is None else feed.folds[index]
    return feed._replace(columns=feed.columns[index], folds=folds), [column for _, column in own]


def _newton_job(inputs: Inputs, feed: Feed, training: TrainingConfig, device: torch.device, *, kept: Kept) -> Job:
    """Where the model runs in every pass, matrices are taken in every pass, too: they cost little beside it.

    What other probes begin with and are compared to is solved more exactly than they are, so that no gain is training.
    """
    often = {} if kept.train else {"matrices_every": 1}
    exactness = BASELINE_EXACTNESS if feed.name == JOINT_CHAIN else 1
    solver = NewtonSolver(
        feed.sites,
        columns_of(inputs, feed),
        feed.n_features,
        inputs.positive_weight_of(feed),
        n_tokens=inputs.fold_censuses[0]["train"].tokens,
        l2=training.l2,
        tolerance=training.tolerance / exactness,
        standardize=training.standardize,
        n_hand_made=feed.n_hand_made,
        shared=kept.shared,
        seed=training.seed,
        device=device,
        **often,
    )
    return Job(solver, BestProbes(solver.bank(), None), feed.to(device))


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
