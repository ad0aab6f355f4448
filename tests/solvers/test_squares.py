"""Directions along which squares help most, against plain eigenvectors, in whitened space and without."""

import pytest
import torch
from torch import Tensor

from streamprobe.activations.drawn import ColumnSample, SampledTokens
from streamprobe.solvers import squares
from streamprobe.solvers.pointwise import PointwiseTokens
from streamprobe.solvers.squares import leading_directions, whitener

L, N, D = 2, 6000, 40
SPREAD = torch.logspace(0.7, -0.7, D)  # of features: the planted ones are among the smallest


def tokens() -> PointwiseTokens:
    """Tokens whose targets go by the square of one small feature, and against that of another."""
    random = torch.Generator().manual_seed(0)
    white = torch.randn(N, D, generator=random)
    acts = (white * SPREAD)[:, None].expand(-1, L, -1).double()
    targets = white[:, 30] ** 2 - white[:, 35] ** 2 + torch.randn(N, generator=random) > 0
    column = ColumnSample(torch.arange(N), targets, torch.ones(N))
    return PointwiseTokens(
        SampledTokens(acts, [column]), torch.zeros(L, 1, N).double(), torch.zeros(L, D), torch.ones(L, 1, D)
    )


def directions(given: PointwiseTokens, rank: int) -> Tensor:
    return leading_directions(given, [0], rank, whiteners=[whitener(given, site) for site in range(L)])


def gradient(given: PointwiseTokens) -> tuple[Tensor, Tensor]:
    """The gradient by the matrix of a form of whitened features, and what whitens them, [D, D] each."""
    x = given.sample.acts[:, 0]
    covariance = x.T @ x / N
    covariance.diagonal().mul_(1 + squares.RIDGE).add_(1e-6)
    inverse = torch.linalg.cholesky(covariance).inverse()
    z, slope = x @ inverse.T, 0.5 - given.sample.columns[0].targets.double()
    return z.T @ ((slope - slope.mean())[:, None] * z), inverse


def test_directions_are_the_leading_eigenvectors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(squares, "COVARIANCE_TOKENS", N)
    given = tokens()
    found = directions(given, 2)
    matrix, inverse = gradient(given)
    values, vectors = torch.linalg.eigh(matrix)
    leading = vectors[:, values.abs().argsort(descending=True)[:2]].T @ inverse
    for site in range(L):
        for ours, expected in zip(found[site, 0], leading, strict=True):
            same = torch.cosine_similarity(ours * SPREAD, expected * SPREAD, dim=0)
            assert same.abs() > 0.99 and abs(float((given.sample.acts[:, 0] @ ours).std()) - 1) < 0.1


def test_planted_squares_lead_and_are_lost_without_whitening() -> None:
    def led(found: Tensor) -> set[int]:
        return {int((own * SPREAD).abs().argmax()) for own in found[0, 0]}

    assert led(directions(tokens(), 2)) == {30, 35}
    assert led(leading_directions(tokens(), [0], 2, whiteners=[torch.eye(D).double()] * L)) != {30, 35}


def test_more_squares_than_features_are_filled_up_with_zeros() -> None:
    given = tokens()
    found = directions(given, D + 3)
    assert found.shape == (L, 1, D + 3, D) and found[:, :, :D].any(-1).all() and not found[:, :, D:].any()
