"""The Adam solver against separate loops of `nn.Linear` and `torch.optim.Adam`."""

from collections.abc import Iterator, Sequence
from functools import cache
from itertools import product
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from streamprobe.errors import InputError
from streamprobe.lags import make_columns
from streamprobe.probes.sites import layer_sites
from streamprobe.solvers.adam import AdamSolver

SITES = layer_sites([8, 10, 12, 14, 16])
COLUMNS = make_columns(["backtracking"], ["token"], [-16, -12, -8, -4, 0, 4, 8, 12, 16, 20, 24, 32, 40, 48])
HIDDEN = 12
BATCH = 32
POSITIVE_WEIGHT = torch.linspace(0.5, 20, len(COLUMNS))
SIZES = (5 * BATCH, 5 * BATCH + 7, 4 * BATCH, 8 * BATCH + 1)  # 24 mini-batches
both = pytest.mark.parametrize("standardize", [False, True], ids=["raw", "standardised"])

Chunk = tuple[Tensor, Tensor, Tensor]  # acts [N, L, D], targets [N, K], valid [N, K]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tensors are tiny here: more threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@cache
def make_chunks(sizes: tuple[int, ...] = SIZES, seed: int = 0) -> list[Chunk]:
    """Features of unlike offset and scale, rare positives, and columns from never valid (0) to always valid (13)."""
    random = torch.Generator().manual_seed(seed)
    offset = 3 * torch.randn(len(SITES), HIDDEN, generator=random)
    scale = 0.1 + 2 * torch.rand(len(SITES), HIDDEN, generator=random)
    share = torch.linspace(0, 1, len(COLUMNS))
    chunks = []
    for n in sizes:
        noise = torch.randn(n, len(SITES), HIDDEN, generator=random)
        valid = torch.rand(n, len(COLUMNS), generator=random) < share
        targets = noise[:, 0, :1] + torch.randn(n, len(COLUMNS), generator=random) > 1.5
        chunks.append((offset + scale * noise, targets & valid, valid))
    return chunks


def make_solver(standardize: bool, seed: int = 0, batch_size: int = BATCH) -> AdamSolver:
    options = {"learning_rate": 1e-3, "l2": 0.01, "batch_size": batch_size, "standardize": standardize, "seed": seed}
    return AdamSolver(SITES, COLUMNS, HIDDEN, POSITIVE_WEIGHT, **options)


def trained(solver: AdamSolver, chunks: Sequence[Chunk]) -> AdamSolver:
    for chunk in chunks:
        solver.step(*chunk)
    return solver


class Fitted(NamedTuple):
    """Probes of the features that the solver trains on."""

    weight: Tensor  # [D]
    bias: Tensor  # []


@cache
def by_solver(standardize: bool) -> AdamSolver:
    return trained(make_solver(standardize), make_chunks())


def by_loop(standardize: bool, i: int, k: int, *, scale: float = 1.0, weigh: float = 1.0, l2: float = 0.01) -> Fitted:
    """Probe k of layer i: an `nn.Linear`, its own optimiser, autograd.

    `scale` is that of the data's part of the loss, `weigh` the weight of positives.
    """
    start = make_solver(standardize)
    chunks = make_chunks()
    mean, std = 0.0, 1.0
    if standardize:
        first = chunks[0][0][:, i].double().numpy()
        mean, std = torch.from_numpy(first.mean(0)).float(), torch.from_numpy(first.std(0)).float()
    probe = nn.Linear(HIDDEN, 1)
    with torch.no_grad():
        probe.weight.copy_(start.weight[i, k])
        probe.bias.copy_(start.bias[i, k])
    adam = torch.optim.Adam(probe.parameters(), lr=1e-3)
    criterion = nn.BCEWithLogitsLoss(pos_weight=weigh * POSITIVE_WEIGHT[k], reduction="sum")
    for acts, targets, valid in chunks:
        x, y = (acts[:, i] - mean) / std, targets[:, k].float()
        for rows in torch.arange(len(x)).split(BATCH):
            rows = rows[valid[rows, k]]
            loss = criterion(probe(x[rows])[:, 0], y[rows]) / max(1, len(rows))
            adam.zero_grad()
            (scale * loss + l2 * probe.weight.square().sum()).backward()
            adam.step()
    return Fitted(probe.weight.detach()[0], probe.bias.detach()[0])


def distance(solver: AdamSolver, i: int, k: int, probe: Fitted) -> float:
    """The largest difference of a weight or bias."""
    return max(float((solver.weight[i, k] - probe.weight).abs().max()), float((solver.bias[i, k] - probe.bias).abs()))


@both
def test_seventy_probes_equal_seventy_separate_loops(standardize: bool) -> None:
    solver = by_solver(standardize)
    off = {(i, k): distance(solver, i, k, by_loop(standardize, i, k)) for i, k in product(range(5), range(14))}
    assert {at: d for at, d in off.items() if not d <= 1e-6} == {}


WRONG = {
    "averaged over probes": {"scale": 1 / 70},
    "positive weight": {"weigh": 1.1},
    "half the penalty": {"l2": 0.005},
}


@both
@pytest.mark.parametrize("wrong", list(WRONG))
def test_equality_fails_without_the_right_loss(standardize: bool, wrong: str) -> None:
    """The check above sees each of these mistakes."""
    solver = by_solver(standardize)
    assert max(distance(solver, i, 8, by_loop(standardize, i, 8, **WRONG[wrong])) for i in (0, 4)) > 1e-5


def start_loss(solver: AdamSolver, chunk: Chunk) -> Tensor:
    """The data's part of the loss [N, L, K] under the solver's weights as they are; raw features."""
    acts, targets, valid = chunk
    z = torch.einsum("nld,lkd->nlk", acts, solver.weight) + solver.bias
    y = targets[:, None].expand_as(z).float()
    loss = nn.functional.binary_cross_entropy_with_logits(z, y, pos_weight=POSITIVE_WEIGHT, reduction="none")
    return loss * valid[:, None]


def losses_of(batch_size: int) -> tuple[Tensor, Tensor]:
    """The loss [L, K] of a solver, and the mean over the valid tokens of two chunks, each before it was trained on."""
    solver = make_solver(standardize=False, batch_size=batch_size)
    sums, counts = [], []
    for chunk in make_chunks()[:2]:
        sums.append(start_loss(solver, chunk).sum(0))
        counts.append(chunk[2].sum(0))
        solver.step(*chunk)
    loss = solver.loss()
    assert loss[:, 0].isnan().all() and loss[:, 1:].isfinite().all()  # column 0 is never valid
    assert solver.loss().isnan().all()
    return loss, sum(sums) / sum(counts)


def test_loss_is_the_mean_before_each_step_over_the_valid_tokens_since_the_last_call() -> None:
    loss, expected = losses_of(batch_size=max(SIZES))  # a chunk is one mini-batch
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0, equal_nan=True)


def test_loss_before_the_step_fails_without_one_mini_batch_a_chunk() -> None:
    loss, expected = losses_of(batch_size=BATCH)
    assert ((loss - expected).abs() / expected)[:, 1:].max() > 1e-3


@both
def test_training_lowers_the_loss(standardize: bool) -> None:
    solver, chunk = make_solver(standardize), make_chunks((512,))[0]
    losses = [trained(solver, [chunk] * 10).loss()[:, 1:] for _ in range(3)]
    assert (losses[2] < losses[1]).all() and (losses[1] < losses[0]).all()


@both
def test_the_bank_scores_raw_activations_as_the_solver_scores_its_features(standardize: bool) -> None:
    solver, acts = by_solver(standardize), make_chunks((200,), seed=1)[0][0]
    bank = solver.bank()
    features = (acts.double() - solver.mean) / solver.scale
    expected = torch.einsum("nld,lkd->nlk", features, solver.weight.double()) + solver.bias
    assert (bank.sites, bank.columns) == (SITES, COLUMNS)
    assert (bank.scores(acts) - expected).abs().max() < 1e-5 * expected.abs().max()


def test_scoring_raw_activations_fails_without_folding_the_standardisation_in() -> None:
    solver, acts = by_solver(True), make_chunks((200,), seed=1)[0][0]
    unfolded = torch.einsum("nld,lkd->nlk", acts, solver.weight) + solver.bias
    assert (solver.bank().scores(acts) - unfolded).abs().max() > 0.1 * unfolded.abs().max()


@both
def test_standardisation_is_that_of_the_first_chunk(standardize: bool) -> None:
    chunks = make_chunks()
    first = chunks[0][0].double().numpy()
    solver = trained(make_solver(standardize), chunks)
    np.testing.assert_allclose(solver.mean, first.mean(0) if standardize else 0 * first[0], rtol=1e-6)
    np.testing.assert_allclose(solver.scale, first.std(0) if standardize else 1 + 0 * first[0], rtol=1e-6)


def test_a_constant_feature_is_left_at_its_scale() -> None:
    solver = make_solver(standardize=True)
    acts, targets, valid = make_chunks((64,))[0]
    acts = acts.clone()
    acts[:, :, 3] = 0.1
    solver.step(acts, targets, valid)
    assert (solver.scale[:, 3] == 1).all() and solver.bank().weight.isfinite().all()


@both
def test_the_bank_and_the_state_share_no_memory_with_the_solver(standardize: bool) -> None:
    chunks = make_chunks()
    solver = trained(make_solver(standardize), chunks[:1])
    bank, state = solver.bank(), solver.state()
    before = [bank.weight.clone(), bank.bias.clone(), *(value.clone() for value in state.values())]
    trained(solver, chunks[1:])
    after = [bank.weight, bank.bias, *state.values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not torch.equal(solver.bank().weight, bank.weight)  # the solver did move


def equal(a: AdamSolver, b: AdamSolver) -> bool:
    """Bit for bit, optimiser and standardisation too."""
    one, other = a.state(), b.state()
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@both
def test_a_loaded_solver_goes_on_bit_for_bit(standardize: bool) -> None:
    chunks = make_chunks()
    halfway = trained(make_solver(standardize), chunks[:2])
    resumed = make_solver(standardize, seed=1)
    resumed.load(halfway.state())
    assert equal(resumed, halfway)
    halfway.loss()
    assert equal(trained(resumed, chunks[2:]), trained(halfway, chunks[2:]))
    assert equal(halfway, trained(make_solver(standardize), chunks))
    assert torch.equal(resumed.bank().weight, halfway.bank().weight)
    assert torch.equal(resumed.bank().bias, halfway.bank().bias)
    assert torch.equal(resumed.loss().nan_to_num(), halfway.loss().nan_to_num())


@pytest.mark.parametrize("name", ["weight.step", "weight.exp_avg", "bias.exp_avg_sq", "scale"])
def test_a_loaded_solver_fails_without_one_of_its_tensors(name: str) -> None:
    chunks = make_chunks()
    halfway = trained(make_solver(standardize=True), chunks[:2])
    resumed = make_solver(standardize=True, seed=1)
    resumed.load(halfway.state() | {name: torch.zeros_like(halfway.state()[name])})
    assert not equal(trained(resumed, chunks[2:]), trained(halfway, chunks[2:]))


def test_load_refuses_a_state_with_other_names() -> None:
    state = make_solver(True).state()
    del state["mean"]
    with pytest.raises(InputError, match="nothing as mean"):
        make_solver(True).load(state)


def test_chunks_of_whole_mini_batches_give_the_same_probes() -> None:
    [(acts, targets, valid)] = make_chunks((6 * BATCH + 5,))
    whole, cut = make_solver(standardize=False), make_solver(standardize=False)
    whole.step(acts, targets, valid)
    for start in range(0, len(acts), 2 * BATCH):
        rows = slice(start, start + 2 * BATCH)
        cut.step(acts[rows], targets[rows], valid[rows])
    assert equal(whole, cut)


@both
def test_a_mini_batch_without_a_valid_token_leaves_no_nan(standardize: bool) -> None:
    """Nothing but the penalty acts on such a column: its weights shrink and its bias, still at rest, stays."""
    acts, targets, valid = make_chunks((3 * BATCH,))[0]
    others = torch.arange(len(COLUMNS)) != 7
    targets, valid = targets & others, valid & others
    solver, start = make_solver(standardize), make_solver(standardize)
    solver.step(acts, targets, valid)
    assert all(value.isfinite().all() for value in solver.state().values())
    assert (solver.weight[:, 7].abs() < start.weight[:, 7].abs()).all()
    assert torch.equal(solver.bias[:, 7], start.bias[:, 7])
    assert solver.loss()[:, 7].isnan().all()


@both
def test_what_is_not_valid_does_not_count(standardize: bool) -> None:
    """Targets where `valid` is False may be anything."""
    chunks = make_chunks()
    flipped = [(acts, targets ^ ~valid, valid) for acts, targets, valid in chunks]
    assert equal(trained(make_solver(standardize), flipped), by_solver(standardize))


@both
def test_it_trains_on_bfloat16_made_in_inference_mode(standardize: bool) -> None:
    with torch.inference_mode():
        chunks = [(acts.bfloat16(), targets, valid) for acts, targets, valid in make_chunks()]
    widened = [(acts.float(), targets, valid) for acts, targets, valid in chunks]
    assert equal(trained(make_solver(standardize), chunks), trained(make_solver(standardize), widened))


def test_weights_start_as_those_of_nn_linear_and_follow_the_seed() -> None:
    solver = make_solver(True)
    bound = HIDDEN**-0.5
    for tensor in (solver.weight, solver.bias):
        assert tensor.abs().max() <= bound and tensor.max() > 0.8 * bound and tensor.min() < -0.8 * bound
    assert equal(solver, make_solver(True)) and not equal(solver, make_solver(True, seed=1))
