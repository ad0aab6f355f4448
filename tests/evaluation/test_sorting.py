"""Sorted scores, and what they carry."""

import math

import numpy as np
import pytest
import torch

from streamprobe.evaluation.sorting import MOST_CARRIED, sort_carrying, sort_rising

HARD = [0.0, -0.0, 1e-45, -1e-45, 1.0, 1.0000001, -1.0, -1.0000001, 3.4e38, -3.4e38, 0.1, 0.1, -0.1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_rise_and_nan_comes_last(dtype: torch.dtype) -> None:
    values = torch.randn(3, 200, dtype=dtype, generator=torch.Generator().manual_seed(0))
    values[1, ::7] = math.nan
    assert sort_rising(values).numpy().tolist()[0] == sorted(values[0].tolist())
    np.testing.assert_array_equal(sort_rising(values), values.sort(dim=1).values)
    assert sort_rising(values[:, :0]).shape == (3, 0)


def test_each_score_keeps_what_it_carries() -> None:
    random = torch.Generator().manual_seed(1)
    scores = torch.cat([torch.tensor(HARD), torch.randn(500, generator=random).bfloat16().float()])
    scores = torch.stack([scores, -scores.flip(0)])
    carried = torch.randint(MOST_CARRIED, scores.shape[1:], generator=random)
    rising, theirs = sort_carrying(scores, carried)
    for row, own, found in zip(scores, rising, theirs, strict=True):
        assert own.tolist() == sorted(row.tolist())
        pairs = zip(row.tolist(), carried.tolist(), strict=True)
        assert sorted(zip(own.tolist(), found.tolist(), strict=True)) == sorted(pairs)


def test_a_score_fails_without_room_for_what_it_carries() -> None:
    rising, _ = sort_carrying(torch.tensor([[1.0]]), torch.tensor([MOST_CARRIED]))
    assert rising.item() != 1.0
