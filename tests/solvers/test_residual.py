"""Residuals trained together against plain modules that are trained alone."""

from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from streamprobe.solvers.residual import Batch, Parts, fit

L, K, N, D, BATCHES = 2, 3, 60, 4, 5
OPTIONS = {"learning_rate": 0.05, "l2": 0.01, "max_epochs": 6, "patience": 6}


def line(parts: Parts, x: Tensor) -> Tensor:
    """A second line, 0 at the start: x [L, K, n, D] or [L, S, T, D]."""
    if x.dim() == 4 and x.shape[1] == K:
        return torch.einsum("lknd,lkd->lkn", x, parts["weight"]) + parts["bias"][..., None]
    return torch.einsum("lstd,lkd->lkst", x, parts["weight"]) + parts["bias"][..., None, None]


def start() -> dict[str, Tensor]:
    return {"weight": torch.zeros(L, K, D).double(), "bias": torch.zeros(L, K).double()}


def batches(seed: int, slope: float = 2.0) -> list[Batch]:
    """Tokens of every column whose targets lie on a line of its own, of unlike weight, some of none."""
    random = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(BATCHES):
        x = torch.randn(L, K, N, D, generator=random).double()
        base = torch.randn(L, K, N, generator=random).double()
        targets = slope * x[..., 1] + torch.randn(L, K, N, generator=random) > 0.5
        weight = torch.rand(1, K, N, generator=random).double()
        found.append(Batch(x, base, targets, weight.masked_fill_(weight < 0.2, 0)))
    return found


def shuffled(given: list[Batch]) -> Callable[[int], Iterable[Batch]]:
    """The batches, in another order each epoch."""
    return lambda epoch: given[epoch % BATCHES :] + given[: epoch % BATCHES]


def loss_alone(model: nn.Module, batch: Batch, at: tuple[int, int]) -> Tensor:
    """The summed loss of one probe, by torch's own function."""
    l, k = at  # noqa: E741
    z = batch.base[l, k] + model(batch.x[l, k])[:, 0]
    own, y = batch.weight.expand(L, K, N)[l, k], batch.targets[l, k].double()
    return binary_cross_entropy_with_logits(z, y, weight=own, reduction="sum")


def trained_alone(train: Callable[[int], Iterable[Batch]], judged: list[Batch], at: tuple[int, int]) -> Tensor:
    """The weights and the bias [D + 1] of one probe trained alone by torch.optim.Adam."""
    model = nn.Linear(D, 1).double()
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    adam, best = torch.optim.Adam(model.parameters(), lr=OPTIONS["learning_rate"]), None
    total = sum(float(batch.weight[0, at[1]].sum()) for batch in train(1)) / BATCHES
    lowest = float(sum(loss_alone(model, batch, at).detach() for batch in judged))
    for epoch in range(1, int(OPTIONS["max_epochs"]) + 1):
        for batch in train(epoch):
            adam.zero_grad()
            (loss_alone(model, batch, at) / total + OPTIONS["l2"] * model.weight.square().sum()).backward()
            adam.step()
        reached = float(sum(loss_alone(model, batch, at).detach() for batch in judged))
        if reached < lowest:
            lowest, best = reached, torch.cat([model.weight[0], model.bias]).detach().clone()
    return torch.zeros(D + 1).double() if best is None else best


def test_each_probe_is_trained_as_if_it_were_alone() -> None:
    train, judged = shuffled(batches(0)), batches(1)
    found = fit(line, start(), train, lambda: judged, **OPTIONS)
    for l in range(L):  # noqa: E741
        for k in range(K):
            alone = trained_alone(train, judged, (l, k))
            both = torch.cat([found.parts["weight"][l, k], found.parts["bias"][l, k, None]])
            torch.testing.assert_close(both, alone, rtol=0, atol=1e-9)
    assert found.best_epoch.min() > 0


def test_a_probe_fails_to_be_as_alone_without_its_mean_batch_weight() -> None:
    train, judged = shuffled(batches(0)), batches(1)
    found = fit(line, start(), lambda epoch: list(train(epoch))[:3], lambda: judged, **OPTIONS)
    assert (found.parts["weight"][0, 0] - trained_alone(train, judged, (0, 0))[:-1]).abs().max() > 1e-4


def test_segments_that_all_columns_share_are_as_tokens_of_each() -> None:
    own = [
        batch._replace(x=batch.x[:, :1].expand(-1, K, -1, -1), weight=torch.ones(1, 1, N).double())
        for batch in batches(0)
    ]
    segments = [
        Batch(
            batch.x[:, 0].unflatten(1, (N // 10, 10)),
            batch.base.unflatten(2, (-1, 10)),
            batch.targets.unflatten(2, (-1, 10)),
            torch.ones(1, 1, N // 10, 10).double(),
        )
        for batch in own
    ]
    one = fit(line, start(), lambda _: own, lambda: own, **OPTIONS)
    other = fit(line, start(), lambda _: segments, lambda: segments, **OPTIONS)
    torch.testing.assert_close(one.parts, other.parts, rtol=0, atol=1e-12)


def weighted_loss(parts: Parts, given: list[Batch]) -> Tensor:
    """The weighted log-loss [L, K] of residuals on batches."""
    return sum(
        (
            binary_cross_entropy_with_logits(b.base + line(parts, b.x), b.targets.double(), reduction="none") * b.weight
        ).sum(-1)
        for b in given
    )  # type: ignore[return-value]  # the sum of a generator may be 0


@pytest.mark.parametrize("slope", [2.0, 0.0])
def test_no_loss_is_above_that_of_the_start(slope: float) -> None:
    train, judged = batches(0, slope), batches(1, slope)
    found = fit(line, start(), shuffled(train), lambda: judged, **OPTIONS)
    at_start = found.best_epoch == 0
    for given in (train, judged):
        before, after = weighted_loss(start(), given), weighted_loss(found.parts, given)
        assert (after <= before).all() and torch.equal(after < before, ~at_start)


def test_training_loss_rises_above_the_start_without_its_being_taken_back() -> None:
    """Where validation tokens say the opposite of training tokens, what they choose is worse on the latter."""
    train = batches(0)
    judged = [batch._replace(targets=~batch.targets) for batch in train]
    odd = [judged if epoch % 2 else train for epoch in range(7)]
    found = fit(line, start(), lambda epoch: odd[epoch], lambda: train, **OPTIONS)
    assert (weighted_loss(found.parts, judged) < weighted_loss(start(), judged)).sum() == found.best_epoch.sign().sum()
    unchecked = fit(line, start(), lambda _: train, lambda: train, **OPTIONS)
    assert (weighted_loss(unchecked.parts, judged) > weighted_loss(start(), judged)).all()


def test_the_losses_are_those_of_each_epoch_and_of_the_best_one_once_a_probe_is_final() -> None:
    train, judged, patience = batches(0), batches(1, slope=0.5), 1
    options = OPTIONS | {"learning_rate": 0.5, "max_epochs": 8, "patience": patience}
    found = fit(line, start(), shuffled(train), lambda: judged, **options)
    assert found.losses.shape == (L, K, 2, 9) and len(found.best_epoch.unique()) > 1
    for number, given in enumerate((train, judged)):
        weight = sum(batch.weight.sum(-1) for batch in given)
        torch.testing.assert_close(found.losses[:, :, number, 0], weighted_loss(start(), given) / weight)
        if given is judged:
            kept = weighted_loss(found.parts, given) / weight
            torch.testing.assert_close(found.losses[:, :, 1].amin(-1), kept)
            torch.testing.assert_close(found.losses[:, :, 1, -1], kept)
    for loss, best in zip(found.losses.flatten(0, 1), found.best_epoch.flatten().tolist(), strict=True):
        final = best + patience
        assert (loss[:, final + 1 :] == loss[:, best, None]).all() and (loss[:, : final + 1].diff() != 0).all()


def test_the_training_loss_of_an_epoch_is_taken_before_each_step() -> None:
    one = batches(0)[:1]
    found = fit(line, start(), lambda _: one, lambda: batches(1), **OPTIONS)
    before, after = found.losses[:, :, 0, 0], found.losses[:, :, 0, 1]
    torch.testing.assert_close(before, after)  # the only step of the first epoch comes behind
    assert (found.losses[:, :, 0, 2] < before).all() and (found.losses[:, :, 1, 1] != found.losses[:, :, 1, 0]).all()


def test_a_probe_is_final_after_as_many_epochs_without_patience_left() -> None:
    calls: list[int] = []
    train, judged = batches(0), [batch._replace(targets=~batch.targets) for batch in batches(0)]

    def counted(epoch: int) -> list[Batch]:
        calls.append(epoch)
        return train

    found = fit(line, start(), counted, lambda: judged, **OPTIONS | {"patience": 2})
    assert calls == [1, 1, 2] and not found.best_epoch.any()
    assert all(not part.any() for part in found.parts.values())


def test_a_column_that_no_token_trains_stays_at_its_start() -> None:
    train = [batch._replace(weight=batch.weight * torch.tensor([1.0, 0, 1])[None, :, None]) for batch in batches(0)]
    found = fit(line, start(), lambda _: train, lambda: train, **OPTIONS)
    assert not found.best_epoch[:, 1].any() and found.best_epoch[:, [0, 2]].all()
    assert all(part.isfinite().all() and not part[:, 1].any() for part in found.parts.values())
    assert found.losses[:, 1].isnan().all() and not found.losses[:, [0, 2]].isnan().any()
