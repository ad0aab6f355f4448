"""The optimiser of the embedded model against a singular value decomposition."""

import torch

from streamprobe.demo.muon import Muon, orthogonalise


def test_muon_steps_along_orthogonal_matrices_and_lowers_a_loss():
    torch.manual_seed(0)
    matrices = torch.randn(3, 32, 16, dtype=torch.float64)
    got = orthogonalise(matrices)
    u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
    values = torch.linalg.svdvals(got)
    assert 0.6 < values.min() and values.max() < 1.3
    assert torch.nn.functional.cosine_similarity(got.flatten(1), (u @ vh).flatten(1)).min() > 0.95
    torch.testing.assert_close(orthogonalise(matrices.mT), got.mT)
    weight = torch.nn.Parameter(torch.zeros(8, 8))
    goal, optimizer = torch.randn(8, 8), Muon([weight], lr=0.1, decay=0.0)
    before = (weight - goal).square().sum().item()
    for _ in range(50):
        loss = (weight - goal).square().sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.3 * before
