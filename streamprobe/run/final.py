"""From trained jobs to the probes that a run ends with: calibrated, with thresholds, and as its files keep them.

Shapes: L sites, K columns.
"""

from collections.abc import Iterable, Sequence

from torch import Tensor

from streamprobe.activations.batch import TokenBatch
from streamprobe.evaluation.metrics import measure
from streamprobe.evaluation.scores import evaluate
from streamprobe.probes.base import Probes
from streamprobe.probes.kept import FinalProbes, KeptProbes, mean_of_folds
from streamprobe.reporting.tracking.tracker import Tracker
from streamprobe.run.inputs import Inputs
from streamprobe.run.setup import Setup
from streamprobe.trainer import Done, Job, log_metrics


def calibrated(job: Job, inputs: Inputs) -> Probes:
    """The best probes with their class weighting undone, so that the sigmoid of a logit is the probability they mean.

    Training counts each positive `positive_weight` times, which adds the logarithm of that to the logits.  The prior is
    that of all folds.
    """
    bank = job.best.bank
    return bank.add_to_logits(inputs.prior_of(job.feed).to(bank.bias))


def choose_thresholds(
    jobs: Sequence[Job], inputs: Inputs, validation: Iterable[TokenBatch], *, tracker: Tracker, done: Done
) -> list[Tensor]:
    """The logits [L, K] from which on the best probes of each job say yes: those with the highest validation F1."""
    scored = evaluate([(calibrated(job, inputs), job.feed) for job in jobs], validation)
    thresholds = []
    for job, own in zip(jobs, scored, strict=True):
        metrics = measure(own.scores, own.targets, own.valid, half=inputs.prior_of(job.feed))
        if job.best.patience is None and job.best.looked_at < done.passes:
            log_metrics(tracker, job, metrics, done.tokens)
        tracker.curves(job.solver, own, metrics["auroc"], done.tokens)
        thresholds.append(metrics["threshold"])
    tracker.compare(done.tokens)
    return thresholds


def final_probes(
    setup: Setup, jobs: Sequence[Job], thresholds: Sequence[Tensor], nested: Sequence[FinalProbes]
) -> list[FinalProbes]:
    """The best probes of every job, and nested ones: those of all folds."""
    final = []
    for job, threshold in zip(jobs, thresholds, strict=True):
        bank, best = calibrated(job, setup.inputs), job.best
        half = setup.inputs.prior_of(job.feed)  # where the class-weighted probability is one half
        whole = bank.choose(list(range(len(bank.columns))), threshold)
        whole.solver = job.solver.name  # by which other probes find their logits
        final.append(FinalProbes(job.solver.name, job.feed.name, whole, half, best.best_pass, job.solver.gradient_norm))
    return final + list(nested)


def probes_to_keep(setup: Setup, final: Sequence[FinalProbes]) -> KeptProbes:
    """The probes, where there are folds their means, and what else it takes to judge them on other data."""
    embedded, dataset = setup.reader.embedded, setup.inputs.dataset
    words = embedded.words._asdict() if embedded else {}
    means = [mean_of_folds(each, dataset.folds) for each in final]
    return KeptProbes(means, setup.seen, words, dataset.section_labels)
