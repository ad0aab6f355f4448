"""Attention over earlier tokens as it is trained: beside a torch module alone, on planted events, and on several ranks."""

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from on_ranks import on_ranks
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn.functional import softplus

from streamprobe.activations.segments import Segments
from streamprobe.lags import Column
from streamprobe.probes import attention
from streamprobe.probes.attention import AttentionScorer
from streamprobe.probes.linear import ProbeBank
from streamprobe.probes.sites import layer_sites
from streamprobe.solvers import look_back
from streamprobe.solvers.look_back import Scaling, SegmentBatches, fit_attention
from streamprobe.solvers.residual import Batch, fit

L, K, H, D, T = 2, 3, 2, 5, 40
COLUMNS = [Column("event", "token", lag) for lag in range(K)]


def segments(n: int, seed: int) -> Segments:
    """Segments whose halo is 10 tokens; the event is whether the value at the last token with a mark is above 0."""
    random = torch.Generator().manual_seed(seed)
    acts = torch.randn(n, T, L, D, generator=random)
    acts[..., 0] = torch.rand(n, T, 1, generator=random) < 0.15
    acts[:, 0, :, 0] = 1
    marked = torch.where(acts[:, :, 0, 0] > 0, torch.arange(T), 0).cummax(1).values  # [n, T]
    event = acts[..., 0, 1].gather(1, marked) > 0
    own = torch.arange(T).expand(n, T) >= 10
    weight = own[..., None] * torch.rand(n, T, K, generator=random).round(decimals=1)
    targets = torch.stack([event, acts[..., 0, 2] > 0, event], -1) & own[..., None]
    place = torch.arange(n)
    return Segments(3 * acts + 1, ~own, own, targets, weight, place, place)


def linear(size: float = 0.1) -> ProbeBank:
    random = torch.Generator().manual_seed(5)
    weight, bias = torch.randn(L, K, D, generator=random), torch.randn(L, K, generator=random)
    return ProbeBank(layer_sites(list(range(L))), COLUMNS, size * weight, size * bias)


def scaling() -> Scaling:
    return Scaling(torch.ones(L, D), 3 + torch.arange(D).expand(L, D) / 10)


OPTIONS: dict[str, Any] = {"n_heads": H, "learning_rate": 0.05, "l2": 1e-4, "max_epochs": 12, "patience": 5}


class Alone(nn.Module):
    """One probe as an ordinary module, which reads a segment token by token."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.value = (nn.Parameter(torch.zeros(H, D, dtype=torch.float64)) for _ in range(2))
        self.pace = nn.Parameter(torch.zeros(H, dtype=torch.float64))
        self.register_buffer("slowest", math.log(2) / torch.tensor([4.0, 8.0], dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        """The residuals [S, T] of segments x [S, T, D]."""
        decay = (-self.slowest * self.pace.exp()).exp()
        weight = said = torch.zeros(len(x), H, dtype=x.dtype)
        found = []
        for token in x.unbind(1):
            e = (token @ self.query.T).exp()
            weight, said = decay * weight + e, decay * said + e * (token @ self.value.T)
            found.append((said / weight).sum(1))
        return torch.stack(found, 1)


def doubled(batch: Batch) -> Batch:
    return Batch(batch.x.double(), batch.base.double(), batch.targets, batch.weight.double())


def epoch_of(own: SegmentBatches, epoch: int) -> list[Batch]:
    return [doubled(batch) for batch in own.epoch(epoch, seed=3, n_tokens=20 * T)]


def test_each_probe_is_what_a_module_trained_alone_is() -> None:
    data, group, l2, epochs = segments(40, 1), look_back._Group(1, 0, K), 1e-3, 3
    own = SegmentBatches(data, linear(), scaling(), group)
    start = {name: part.double() for name, part in attention.start(1, K, n_heads=H, n_features=D).items()}

    def validation() -> list[Batch]:
        return [doubled(batch) for batch in own.all()]

    found = fit(
        attention.residual,
        start,
        partial(epoch_of, own),
        validation,
        learning_rate=0.01,
        l2=l2,
        max_epochs=epochs,
        patience=epochs,
    )
    assert found.best_epoch.tolist() == [[epochs] * K]
    batches = epoch_of(own, 1)
    mean_weight = [sum(float(batch.weight[0, k].sum()) for batch in batches) / len(batches) for k in range(K)]
    for k in range(K):
        alone = Alone()
        adam = torch.optim.Adam(alone.parameters(), lr=0.01)
        for epoch in range(1, epochs + 1):
            for batch in epoch_of(own, epoch):
                z = batch.base[0, k] + alone(batch.x[0])
                losses = torch.where(batch.targets[0, k], softplus(-z), softplus(z)) * batch.weight[0, k]
                penalty = sum(part.square().sum() for part in alone.parameters())
                adam.zero_grad()
                (losses.sum() / mean_weight[k] + l2 * penalty).backward()
                adam.step()
        for name, part in alone.named_parameters():
            torch.testing.assert_close(found.parts[name][0, k], part.detach(), rtol=0, atol=1e-9)
        assert alone.value.abs().max() > 0.01


def test_batches_hold_the_standardised_features_and_logits_of_their_segments() -> None:
    data, bank = segments(20, 1), linear()
    own = SegmentBatches(data, bank, scaling(), look_back._Group(1, 1, 3))
    batches = list(own.all())
    x, *rest = zip(*batches, strict=True)
    x, (base, targets, weight) = torch.cat(x, 1), (torch.cat(each, 2) for each in rest)
    torch.testing.assert_close(x[0], (data.acts[:, :, 1] - 1) / scaling().scale[1])
    expected = bank.scores(data.acts.flatten(0, 1))[:, 1, 1:].unflatten(0, (20, T))
    torch.testing.assert_close(base[0].permute(1, 2, 0), expected)
    assert targets[0].permute(1, 2, 0).equal(data.targets[..., 1:])
    assert weight[0].permute(1, 2, 0).equal(data.weight[..., 1:])


def test_epochs_have_other_segments_and_a_bounded_number_of_tokens() -> None:
    own = SegmentBatches(segments(50, 1), linear(), scaling(), look_back._Group(0, 0, K))
    every = [
        torch.cat([b.x[0] for b in own.epoch(e, seed=s, n_tokens=21 * T - 1)])
        for e, s in ((1, 0), (1, 0), (2, 0), (1, 1))
    ]
    assert [x.shape for x in every] == [(20, T, D)] * 4
    assert every[0].equal(every[1]) and not every[0].equal(every[2]) and not every[0].equal(every[3])
    assert sum(b.x.shape[1] for b in own.epoch(1, seed=0)) == 50


@pytest.fixture(scope="module")
def trained() -> look_back.Fitted:
    return fit_attention(segments(160, 1), segments(40, 2), linear(), scaling(), **OPTIONS)


def test_what_a_marked_token_said_is_found_and_fails_without_looking_back(trained: look_back.Fitted) -> None:
    data, bank = segments(100, 3), linear()
    scorer = AttentionScorer(attention.to_raw(trained.parts, scaling().mean, scaling().scale[:, None]))
    acts, chain = data.acts.flatten(0, 1), data.chain.repeat_interleave(T)
    added, here = scorer(acts, chain), scorer(acts, torch.arange(len(acts)))
    asked, events = data.own.flatten(), data.targets.flatten(0, 1)
    for i, k in ((0, 0), (0, 2)):  # the other site has another value
        auroc, alone, at_once = (
            roc_auc_score(events[asked, k], scores[asked, i, k])
            for scores in (bank.scores(acts) + added, bank.scores(acts), bank.scores(acts) + here)
        )
        assert auroc > 0.9 and alone < 0.6 and at_once < 0.7, (auroc, alone, at_once)


def test_no_probe_is_worse_than_the_linear_one(trained: look_back.Fitted) -> None:
    for data in (segments(160, 1), segments(40, 2)):
        own = SegmentBatches(data, linear(), scaling(), look_back._Group(0, 0, K))
        losses = torch.zeros(2, K)
        for batch in own.epoch(1, seed=0):
            added = attention.residual({name: part[:1] for name, part in trained.parts.items()}, batch.x)
            for j, z in enumerate((batch.base, batch.base + added)):
                losses[j] += (softplus(torch.where(batch.targets, -z, z)) * batch.weight).sum((0, 2, 3))
        assert (losses[1] <= losses[0]).all() and losses[1, 0] < 0.7 * losses[0, 0]


def small() -> look_back.Fitted:
    return fit_attention(segments(30, 1), segments(10, 2), linear(), scaling(), **OPTIONS | {"max_epochs": 3})


@pytest.mark.parametrize("size", [2, 3])
def test_every_number_of_processes_trains_the_same(size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(look_back, "COLUMNS", 2)
    alone = small()
    for found in on_ranks(small, size, tmp_path / "ranks"):
        assert all(part.equal(alone.parts[name]) for name, part in found.parts.items())
        assert found.best_epoch.equal(alone.best_epoch) and found.best_epoch.all()
        assert found.losses.equal(alone.losses) and found.losses.all()


def test_processes_train_apart_without_sharing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(look_back, "share", lambda part, source: part)
    one, other = on_ranks(small, 2, tmp_path / "ranks")
    assert not one.best_epoch.equal(other.best_epoch)
