"""Networks and squares trained on drawn tokens: planted truths, plain modules trained alone, and any number of ranks."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from on_ranks import on_ranks
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from streamprobe.activations.drawn import ColumnSample, SampledTokens
from streamprobe.lags import make_columns
from streamprobe.probes.linear import ProbeBank
from streamprobe.probes.sites import layer_sites
from streamprobe.solvers import pointwise
from streamprobe.solvers.pointwise import PointwiseKind, PointwiseTokens, column_groups, fit_pointwise, linear_logits
from streamprobe.solvers.pointwise_kinds import network_kind, quadratic_kind
from streamprobe.solvers.residual import Fitted

L, K, D = 2, 3, 8
SQUARE, LINE = 0, 1  # what the columns' targets go by; those of the third by a square, too, and by chance
OPTIONS: dict[str, Any] = {"learning_rate": 0.01, "l2": 1e-5, "max_epochs": 20, "patience": 4}


def tokens(n: int, seed: int, dtype: torch.dtype = torch.float32) -> PointwiseTokens:
    """Tokens of correlated features; the base of the column that a line decides is that line."""
    random = torch.Generator().manual_seed(seed)
    mix = torch.randn(D, D, generator=torch.Generator().manual_seed(9)) * torch.linspace(0.2, 2, D)
    white = torch.randn(L, n, D, generator=random)
    acts, noise = (white @ mix + 3).to(dtype).transpose(0, 1), torch.randn(K, n, generator=random)
    s, t = white[..., 1].mean(0) * 2**0.5, white[..., 2].mean(0) * 2**0.5
    says = [s**2 + 0.2 * noise[0] > 1, 2 * t + noise[1] > 0, s**2 + 3 * noise[2] > 1]
    base = torch.zeros(L, K, n, dtype=dtype)
    base[:, LINE] = 3.4 * t
    columns = []
    for k, targets in enumerate(says):
        rows = torch.arange(n - 100 * k)
        weight = torch.where(targets, float((~targets).sum() / targets.sum()), 1.0)
        columns.append(ColumnSample(rows, targets[rows], weight[rows]))
    mean, scale = torch.full((L, D), 3.0), (mix.square().sum(0).sqrt()).expand(L, 1, D)
    return PointwiseTokens(SampledTokens(acts, columns), base, mean.to(dtype), scale.to(dtype))


TRAINING, VALIDATION = tokens(3000, 0), tokens(1200, 1)
MAKERS = {"network": lambda training: network_kind(D, 16), "quadratic": lambda training: quadratic_kind(training, 4)}
KINDS = {name: make(TRAINING) for name, make in MAKERS.items()}
each_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def fitted(kind: PointwiseKind, training: PointwiseTokens = TRAINING, judged: PointwiseTokens = VALIDATION) -> Fitted:
    return fit_pointwise(kind, training, judged, **OPTIONS)


def logits(kind: PointwiseKind, found: Fitted, given: PointwiseTokens) -> list[Tensor]:
    """What the probes of each column say of its tokens, [L, n]."""
    x = (given.sample.acts.transpose(0, 1) - given.mean[:, None]) / given.scale
    said = given.base + kind.residual(found.parts, x)
    return [said[:, k, column.rows] for k, column in enumerate(given.sample.columns)]


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_a_planted_square_is_found_and_fails_to_be_without_squares(
    make: Callable[[PointwiseTokens], PointwiseKind],
) -> None:
    whole = tokens(3000, 0)
    both = tuple(given._replace(sample=given.sample._replace(acts=joined(given))) for given in (whole, VALIDATION))
    kind = make(both[0])
    found = fitted(kind, *both)
    targets = both[1].sample.columns[SQUARE].targets
    for said in logits(kind, found, both[1])[SQUARE]:
        assert roc_auc_score(targets, said) > 0.9
    x = (both[1].sample.acts[:, 0] - 3) / both[1].scale[0]
    line = torch.linalg.lstsq(x, targets.float()[:, None] - targets.float().mean()).solution[:, 0]
    assert roc_auc_score(targets, x @ line) < 0.6


def joined(given: PointwiseTokens) -> Tensor:
    """Activations by which each site alone knows the square: both sites hold what the sum of them is made of."""
    mean = given.sample.acts.mean(1, keepdim=True)
    return ((mean - 3) * 2**0.5 + 3).expand(-1, L, -1)


@each_kind
def test_no_training_loss_is_above_the_linear_ones(kind: PointwiseKind) -> None:
    found = fitted(kind)
    for k, said in enumerate(logits(kind, found, TRAINING)):
        column = TRAINING.sample.columns[k]
        loss = partial(binary_cross_entropy_with_logits, target=column.targets.float().expand(L, -1), reduction="none")
        before, after = ((loss(z) * column.weight).sum(1) for z in (TRAINING.base[:, k, column.rows], said))
        assert (after <= before).all() and (after < before)[found.best_epoch[:, k] > 0].all()


@each_kind
def test_where_the_truth_is_a_line_probes_stay_near_their_start(kind: PointwiseKind) -> None:
    found = fitted(kind)
    moved = (
        logits(kind, found, VALIDATION)[LINE] - VALIDATION.base[:, LINE, : len(VALIDATION.sample.columns[LINE].rows)]
    )
    assert (found.best_epoch[:, LINE] <= 3).all() and moved.std() < 0.3 * VALIDATION.base[:, LINE].std()
    assert (found.best_epoch[:, SQUARE] > 3).all()  # negative control: where it is none they do not


class Network(nn.Module):
    """A probe of one kind on its own."""

    def __init__(self, parts: dict[str, Tensor]):
        super().__init__()
        self.is_network = "bias" not in parts
        self.inner, self.outer = nn.Linear(D, len(parts["outer"])), nn.Linear(len(parts["outer"]), 1)
        self.double()
        with torch.no_grad():
            self.inner.weight.copy_(parts["inner"])
            self.inner.bias.copy_(parts["inner_bias"])
            self.outer.weight.copy_(parts["outer"])
            self.outer.bias.zero_()
        self.outer.bias.requires_grad_(not self.is_network)

    def forward(self, x: Tensor) -> Tensor:
        said = self.inner(x)
        return self.outer(said.relu() if self.is_network else said**2 - 1)[:, 0]


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_each_probe_is_that_of_a_module_trained_alone(make: Callable[[PointwiseTokens], PointwiseKind]) -> None:
    training, judged = tokens(1100, 0, torch.float64), tokens(600, 1, torch.float64)
    kind = make(training)
    options = OPTIONS | {"max_epochs": 3, "patience": 9}
    found = fit_pointwise(kind, training, judged, seed=3, **options)
    at, k = 1, 2
    own = column_groups(training)[0]
    module = Network({name: part[at, k] for name, part in kind.start(training, own).items()})
    groups = [
        {"params": [module.inner.weight, module.outer.weight], "weight_decay": 2 * OPTIONS["l2"]},
        {"params": [module.inner.bias, module.outer.bias]},
    ]
    adam, states = torch.optim.Adam(groups, lr=OPTIONS["learning_rate"]), []
    total = float(training.sample.columns[k].weight.double().sum()) / training.n_batches
    for epoch in (1, 2, 3):
        for batch in training.batches([k], [3, epoch]):
            adam.zero_grad()
            z = batch.base[at, 0] + module(batch.x[at, 0])
            loss = binary_cross_entropy_with_logits(
                z, batch.targets[0, 0].double(), batch.weight[0, 0], reduction="sum"
            )
            (loss / total).backward()
            adam.step()
        states.append(torch.cat([p.detach().flatten().clone() for p in module.parameters()]))
    best = int(found.best_epoch[at, k])
    parts = {name: part[at, k] for name, part in found.parts.items()}
    bias = parts.get("bias", torch.zeros(()).double())
    ours = torch.cat([parts["inner"].flatten(), parts["inner_bias"], parts["outer"], bias[None]])
    assert best > 0
    torch.testing.assert_close(ours, states[best - 1], rtol=0, atol=1e-9)


def test_batches_hold_each_token_once_in_an_order_that_no_other_column_changes() -> None:
    training = tokens(1100, 0)
    seen: list[Tensor] = []
    for batch, alone in zip(training.batches(range(K), [0, 1]), training.batches([2], [0, 1]), strict=True):
        n = int((batch.weight[0, 2] > 0).sum())
        assert n <= pointwise.BATCH_TOKENS and torch.equal(batch.x[:, 2, :n], alone.x[:, 0, :n])
        assert torch.equal(batch.weight[0, 2, :n], alone.weight[0, 0, :n]) and not batch.weight[0, 2, n:].any()
        seen.append(batch.x[0, 2, :n].clone())
    rows = training.sample.columns[2].rows
    x = (training.sample.acts[rows, 0] - training.mean[0]) / training.scale[0, 0]
    ours = torch.cat(seen)
    assert len(seen) == 3 and not torch.equal(ours, x)
    torch.testing.assert_close(ours[ours[:, 0].argsort()], x[x[:, 0].argsort()])
    again, other = (next(iter(training.batches([2], [0, epoch]))).x for epoch in (1, 2))
    assert torch.equal(again[0, 0], seen[0]) and not torch.equal(other[0, 0], seen[0])


@each_kind
def test_every_number_of_ranks_finds_the_same(
    kind: PointwiseKind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pointwise, "GROUP_BYTES", 1)  # a group for every column
    monkeypatch.setitem(OPTIONS, "max_epochs", 3)
    alone = fitted(kind)
    assert len(column_groups(TRAINING)) == K
    for found in on_ranks(lambda: fitted(kind), 2, tmp_path / "ranks"):
        assert all(torch.equal(part, alone.parts[name]) for name, part in found.parts.items())
        assert torch.equal(found.best_epoch, alone.best_epoch)
        assert torch.equal(found.losses, alone.losses) and found.losses.all()


def test_ranks_find_half_without_a_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pointwise, "GROUP_BYTES", 1)
    monkeypatch.setitem(OPTIONS, "max_epochs", 2)
    monkeypatch.setattr(pointwise, "share", lambda tensor, source: tensor)
    alone, kind = fitted(KINDS["network"]), KINDS["network"]
    for found in on_ranks(lambda: fitted(kind), 2, tmp_path / "ranks"):
        assert not torch.equal(found.parts["inner"], alone.parts["inner"])


@pytest.mark.parametrize("most", [0, 2**31])
def test_batches_are_the_same_where_features_are_laid_out(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pointwise, "LAID_OUT_BYTES", most)
    given = TRAINING._replace(scale=torch.rand(L, K, D) + 0.5)
    there = given.laid_out()
    assert (there.centred is None) == (most == 0)
    for ours, theirs in zip(there.batches(range(K), [0, 1]), given.batches(range(K), [0, 1]), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_linear_logits_are_those_of_the_bank() -> None:
    columns = make_columns(["a"], ["token"], [0, 4, 8])
    bank = ProbeBank(layer_sites(range(L)), columns, torch.randn(L, K, D), torch.randn(L, K))
    acts = torch.randn(50, L, D).bfloat16()
    expected = torch.einsum("nld,lkd->lkn", acts.float(), bank.weight) + bank.bias[..., None]
    torch.testing.assert_close(linear_logits(bank, acts, chunk=7), expected)
