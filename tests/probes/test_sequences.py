"""Tokens in steps, states of chains, and means that run along them, beside plain Python."""

import numpy as np
import pytest
import torch

from streamprobe.probes.sequences import States, running_means, to_call, to_steps


@pytest.mark.parametrize("lengths", [[1], [5], [1, 1, 1], [2, 7, 3, 7], [4, 1]])
def test_steps_hold_every_token_once_and_a_chain_in_its_order(lengths: list[int]) -> None:
    chain = torch.repeat_interleave(torch.tensor([9, 4, 7, 2])[: len(lengths)], torch.tensor(lengths))
    steps = to_steps(chain)
    assert sorted(steps.order.tolist()) == list(range(len(chain))) and sum(steps.sizes) == len(chain)
    assert steps.sizes == sorted(steps.sizes, reverse=True) and len(steps.sizes) == max(lengths)
    by_step = chain[steps.order].split(steps.sizes)
    assert all(step.tolist() == steps.chains[: len(step)] for step in by_step)
    for number, last in zip(steps.chains, steps.last.tolist(), strict=True):
        own = steps.order[chain[steps.order] == number]
        assert own.equal(own.sort().values) and steps.order[last] == own[-1]


def test_steps_fail_without_a_chains_tokens_side_by_side() -> None:
    with pytest.raises(AssertionError, match="side by side"):
        to_steps(torch.tensor([1, 1, 2, 1]))


def test_states_are_kept_by_chain_however_many_there_are() -> None:
    states, kept = States(torch.tensor([1.0, 2.0]), torch.tensor(3.0)), dict[int, float]()
    random = np.random.default_rng(0)
    for _ in range(40):
        chains = random.choice(200, 7, replace=False).tolist()
        pair, single = states.of(chains)
        assert pair.tolist() == [[1 + kept.get(c, 0), 2 + kept.get(c, 0)] for c in chains]
        assert single.tolist() == [3 + kept.get(c, 0) for c in chains]
        for c in chains:
            kept[c] = kept.get(c, 0) + c
        added = torch.tensor(chains)
        states.keep(chains, pair + added[:, None], single + added)
    assert len(kept) > 100 and states.starts[0].tolist() == [1, 2]


def test_running_means_are_those_of_a_loop() -> None:
    random = torch.Generator().manual_seed(0)
    lengths = [3, 8, 1, 8]
    steps = to_steps(torch.repeat_interleave(torch.arange(4), torch.tensor(lengths)))
    values, shares = torch.rand(2, 2, sum(lengths), 5, generator=random, dtype=torch.float64)
    before = torch.rand(2, 4, 5, generator=random, dtype=torch.float64)
    found = running_means(values, shares, steps.sizes, before)
    expected = torch.zeros_like(values)
    for r, chain in enumerate(steps.chains):
        mean = before[:, r]
        for i in [sum(steps.sizes[:t]) + r for t in range(lengths[chain])]:
            mean = expected[:, i] = (1 - shares[:, i]) * mean + shares[:, i] * values[:, i]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    # negative control: the chains in another order are others
    assert not torch.allclose(running_means(values, shares, steps.sizes, before.flip(1)), expected)


def test_scores_come_back_in_the_order_of_the_call() -> None:
    scores = torch.rand(2, 6, 3)
    order = torch.tensor([4, 0, 5, 1, 2, 3])
    found = to_call(scores, order)
    assert found[order].equal(scores.transpose(0, 1)) and found.permute(1, 2, 0).is_contiguous()
