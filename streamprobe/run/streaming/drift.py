"""Whether a stream changes: how often each class comes, and whether probes still mean the probabilities they give.

Shapes: N tokens, L layers, K columns, k of the data's own that are watched.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import softplus

from streamprobe.activations.batch import Extras
from streamprobe.activations.feed import Feed
from streamprobe.data.census import Census
from streamprobe.probes.linear import ProbeBank, linear_logits
from streamprobe.reporting.tracking.tags import lag_name
from streamprobe.reporting.tracking.tracker import Tracker
from streamprobe.run.inputs import Inputs
from streamprobe.system.distributed import add, share


class Drift:
    """Scores every round's tokens by the best layers of the last report, before anything is trained on them.

    It is fed like a solver, and learns nothing.
    """

    name = "drift"
    shuffles = False

    def __init__(self, feed: Feed, inputs: Inputs):
        """`feed` is that of the probed layers."""
        columns = [inputs.columns[k] for k in feed.columns.tolist()]
        own = [k for k, column in enumerate(columns) if not column.control]
        self.feed = feed._replace(columns=feed.columns[own])
        self.sites, self.columns = feed.sites, [columns[k] for k in own]
        device = feed.columns.device
        # The probes of the last report, calibrated, and which layer of each column was the best one:
        self.weight = torch.zeros(len(feed.sites), len(own), feed.n_features, device=device)
        self.bias = torch.full(self.weight.shape[:2], torch.nan, device=device)  # before the first one
        self.layer = torch.zeros(len(own), dtype=torch.int64, device=device)
        self.watches = False  # in this round
        self.sums_ = torch.zeros(4, len(own), dtype=torch.float64, device=device)

    def watch(self, bank: ProbeBank, layer: Sequence[int]) -> None:
        """Watches calibrated probes [L, k] from now on, of the layer of this number for each column."""
        self.load({"weight": bank.weight, "bias": bank.bias, "layer": torch.tensor(layer)})

    def share(self) -> None:
        """Lets all ranks watch what the first one does: all of them call it."""
        for tensor in self.state().values():
            share(tensor)

    def state(self) -> dict[str, Tensor]:
        """What is watched: the tensors themselves."""
        return {"weight": self.weight, "bias": self.bias, "layer": self.layer}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Watches what the one that gave `state` did."""
        for name, tensor in self.state().items():
            tensor.copy_(state[name])

    def begin(self, acts: Tensor | None, source: int) -> None:
        """Begins a round."""
        self.watches = not bool(self.bias.isnan().any())
        self.sums_.zero_()

    @torch.no_grad()
    def step(self, acts: Tensor, targets: Tensor, valid: Tensor, extras: Extras | None = None) -> None:
        """Adds acts [N, L, D] with targets [N, k] and valid [N, k]."""
        if not self.watches:
            return
        scores = linear_logits(self.weight, self.bias, acts)
        logits = scores[:, self.layer, torch.arange(len(self.layer), device=scores.device)]  # [N, k]
        losses = softplus(torch.where(targets, -logits, logits)) / math.log(2)
        counted = (valid, targets & valid, logits.sigmoid() * valid, losses * valid)
        self.sums_ += torch.stack([each.sum(0) for each in counted])

    def end_part(self) -> None:
        """Nothing: no token waits."""

    def end_pass(self) -> None:
        """Nothing: `log` ends a round."""

    def loss(self) -> Tensor:
        """Nothing is fitted: NaN, [L, k]."""
        return torch.full((len(self.sites), len(self.columns)), torch.nan)

    def log(self, tracker: Tracker, census: Census, step: int) -> None:
        """A point on the curves of the stream, which say what this round was like."""
        add(self.sums_)
        n, positive, probability, loss = self.sums_.tolist()
        for k, column in enumerate(self.columns):
            name = f"{column.label}/{column.target} {lag_name(column.lag)}"
            own = self.feed.columns[k]
            if census.valid[own]:
                tracker.number(f"stream/rate/{name}", float(census.positive[own] / census.valid[own]), step)
            if n[k]:
                tracker.number(f"stream/calibration/{name}", (probability[k] - positive[k]) / n[k], step)
                tracker.number(f"stream/bits/{name}", loss[k] / n[k], step)
        self.sums_.zero_()
