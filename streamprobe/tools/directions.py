"""Along which direction of which layer a model is pushed to move what a probe says: a probe's own, or its gradient.

A linear probe has one, its weight.  The logit of any other is moved most by its gradient, here at the mean activation:
g_d = (z(m + h_d e_d) - z(m - h_d e_d)) / 2 h_d for the logit z, the mean m, and for each feature d a step h_d of a
quarter of its standard deviation.  Differences, since probes that read a stream keep no derivatives.  Of probes that
read all layers each layer has its own part of the gradient.  Those that look back read the token as the first of its
chain.  That is what moves the logit where all tokens so far are at the mean and are pushed together, as they are by
`steer`: what such a probe says of tokens that are all alike is what it says of one.

Shapes: N tokens, L layers that are read, D hidden size.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from streamprobe.activations.batch import TokenBatch
from streamprobe.errors import InputError
from streamprobe.probes.base import Probes
from streamprobe.probes.linear import ProbeBank
from streamprobe.probes.merged import widths_of
from streamprobe.tools.choice import narrow

Read = Callable[[Sequence[int]], Iterable[TokenBatch]]  # one trip over the training tokens: their activations [N, L, D]
STEP = 0.25  # of a standard deviation
AT_ONCE = 256  # features whose differences are taken together
ROUNDING = 1e-6  # of a logit, about: differences below this say nothing


class Direction(NamedTuple):
    """Where and along what a model is pushed."""

    layer: int
    unit: Tensor  # [D] float32, of length 1


class Spread(NamedTuple):
    """Where the activations of L layers lie."""

    mean: Tensor  # [L, D] float32
    std: Tensor  # [L, D] float32


def direction_of(probes: Probes, place: tuple[int, int], layer: int | None, read: Read) -> Direction:
    """The direction of the probe at `place`, on the device of what is read.

    Of a probe that reads all layers `layer` is the one that is pushed; none: that whose part moves the logit most, for
    each feature by its standard deviation.  Raises InputError where nothing moves the logit, or no number says how far.
    """
    i, k = place
    if isinstance(probes, ProbeBank):
        return Direction(probes.layers[i], normalize(probes.weight[place][: widths_of(probes)[i]], dim=0))
    one = narrow(probes, [i], [k])
    spread = measure_spread(read(one.layers))
    found = gradient(one.to(spread.mean.device), spread)
    moves = (found * spread.std).norm(dim=1)
    number = int(moves.nan_to_num(0).argmax()) if layer is None or len(one.layers) == 1 else one.layers.index(layer)
    own = found[number]
    if not own.isfinite().all() or not own.any():
        raise InputError(
            f"a probe of kind {probes.kind} whose logit has no gradient at the mean of layer {one.layers[number]}",
            "one that is finite and not 0, along which to push",
            "choose another --layer, --lag or --kind",
        )
    return Direction(one.layers[number], normalize(own, dim=0))


def measure_spread(batches: Iterable[TokenBatch]) -> Spread:
    """The mean and standard deviation of every feature over all tokens; sums are float64."""
    n, sums, squares = 0, torch.zeros(()), torch.zeros(())
    for batch in batches:
        x = batch.acts.double()
        n, sums, squares = n + len(x), sums.to(x.device) + x.sum(0), squares.to(x.device) + x.square().sum(0)
    mean = sums / n
    return Spread(mean.float(), (squares / n - mean.square()).clamp_min(0).sqrt().float())


def gradient(probe: Probes, spread: Spread) -> Tensor:
    """The gradient [L, D] float32 of the logit of a single probe at the mean; 0 where it is lost in rounding."""
    mean, std = spread
    found = torch.zeros_like(mean)
    steps = STEP * std
    for number in range(len(mean)):
        for features in torch.arange(mean.shape[1], device=mean.device).split(AT_ONCE):
            moved = torch.zeros(len(features), *mean.shape, device=mean.device)
            moved[torch.arange(len(features)), number, features] = steps[number, features]
            up, down = _alone(probe, mean + moved), _alone(probe, mean - moved)
            difference = (up - down) / 2 / steps[number, features]
            known = ~((up - down).abs() <= ROUNDING * (1 + up.abs()))
            found[number, features] = difference.where(known & (steps[number, features] > 0), 0)
    return found


def _alone(probe: Probes, acts: Tensor) -> Tensor:
    """The logits [N] of a single probe at tokens [N, L, D], each the first of a chain of its own."""
    return probe.scorer()(acts, torch.arange(len(acts), device=acts.device))[:, 0, 0]
