"""The usual way trains on the very tokens of the stream, and learns."""

import pytest
import torch

from streamprobe.bench import offline
from streamprobe.bench.shapes import SHAPES
from streamprobe.bench.synthetic import Workbench, make_model
from streamprobe.lags import Column

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def workbench() -> Workbench:
    return Workbench(SHAPES["tiny"], 5, 2048, CPU)


@pytest.mark.parametrize("lag", [-16, 0, 48])
def test_the_offline_way_trains_on_the_very_pairs_of_the_stream(workbench, tmp_path, lag):
    """A baseline that learned from other tokens would prove nothing."""
    grid = workbench.grids[1]
    k = grid.columns.index(Column("label0", "token", lag))
    model = make_model(workbench.shape, workbench.shape.blocks, CPU)
    model.load_state_dict(workbench.model.state_dict(), strict=False)
    offline.extract(model, grid.train, workbench.layers, tmp_path)
    assert len(list(tmp_path.iterdir())) == len(grid.train) * len(workbench.layers)
    stored = {"dtype": torch.float32, "folder": tmp_path, "device": CPU}
    for chain in grid.train:
        acts, targets = offline.load([chain], 2, grid.columns[k], labels=grid.labels, **stored)
        (batch,) = (batch for _, batches in workbench.trip(grid, [chain]).own() for batch in batches)
        valid = batch.valid[:, k]
        torch.testing.assert_close(acts, batch.acts[valid, 2])
        assert torch.equal(targets.bool(), batch.targets[valid, k])


def test_activations_in_bfloat16_survive_their_file(workbench, tmp_path):
    shape = workbench.shape._replace(dtype="bfloat16")
    model, chain = make_model(shape, shape.blocks, CPU), workbench.grids[1].train[0]
    offline.extract(model, [chain], [1], tmp_path)
    column = Column("label0", "token", 0)
    stored = {"dtype": torch.bfloat16, "folder": tmp_path, "device": CPU}
    acts, targets = offline.load([chain], 1, column, labels=["label0"], **stored)
    found = model(input_ids=chain.ids[None], output_hidden_states=True).hidden_states[2][0, 1:]
    assert acts.dtype == torch.float32 and torch.equal(acts, found.float()) and len(acts) == len(targets)


def test_the_offline_probe_learns():
    random = torch.Generator().manual_seed(0)
    acts = torch.randn(20_000, 8, generator=random)
    targets = (acts[:, 0] > 1).float()
    probe = offline.fit_epoch(acts, targets, 4.0, 0.0, learning_rate=0.01)
    said = probe(acts)[:, 0] > 0
    assert (said == targets.bool()).float().mean() > 0.9
