"""Synthetic chains are like annotated ones, and the workbench measures what a run does."""

import pytest
import torch

from streamprobe.bench.shapes import SHAPES
from streamprobe.bench.synthetic import BATCH, Workbench, make_chains

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def workbench() -> Workbench:
    return Workbench(SHAPES["tiny"], 5, 2048, CPU)


def test_the_bare_forward_sees_the_batches_of_a_pass_and_no_hook(workbench):
    """The limit is a limit only if the model is asked for the very same."""
    shapes, hooks = [], []

    def note(module, args, kwargs):
        shapes.append(tuple(kwargs["input_ids"].shape))
        hooks.append(sum(len(block._forward_hooks) for block in module.layers))

    handle = workbench.model.register_forward_pre_hook(note, with_kwargs=True)
    grid = workbench.grids[1]
    workbench.forward(grid.train)
    bare, bare_hooks = shapes.copy(), hooks.copy()
    shapes.clear(), hooks.clear()
    workbench.train_pass(grid, [workbench.solver("adam", grid)], workbench.memories(grid)[0])
    handle.remove()
    assert len(bare) > 1 and bare == shapes
    assert set(bare_hooks) == {0} and set(hooks) == {6}  # five taps, and the one that ends the pass behind the last


def test_a_replayed_pass_leaves_the_model_alone(workbench):
    grid = workbench.grids[1]
    memory = workbench.memories(grid)[0]
    solver = workbench.solver("newton", grid)
    workbench.train_pass(grid, [solver], memory)
    handle = workbench.model.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    workbench.train_pass(grid, [solver], memory)
    handle.remove()
    assert int(solver.passes) == 2 and solver.best_loss.isfinite().all()


def test_grids_have_the_probes_that_their_rows_name(workbench):
    assert {n: len(workbench.layers) * len(grid.columns) for n, grid in workbench.grids.items()} == {
        1: 70,
        10: 700,
        100: 7000,
    }
    assert [c.codes.shape[1] for grid in workbench.grids.values() for c in grid.train[:1]] == [1, 10, 100]
    assert (
        not workbench.solver("newton", workbench.grids[1]).shared
        and workbench.solver("newton", workbench.grids[10]).shared
    )
    assert workbench.solver("adam", workbench.grids[1]).batch_size == BATCH


def test_synthetic_chains_are_like_the_annotated_ones():
    chains = make_chains(300, 2, 400)
    lengths = [len(c.ids) for c in chains]
    assert 300 <= min(lengths) and max(lengths) <= 900 and abs(sum(lengths) / len(lengths) - 540) < 20
    codes = torch.cat([c.codes for c in chains])
    assert 0.02 < (codes >= 1).float().mean() < 0.028
    assert 14 < (codes >= 1).sum() / (codes == 2).sum() <= 18  # a chain may end inside a section
    assert not torch.equal(codes[:, 0], codes[:, 1])


def test_no_column_is_without_a_positive(workbench):
    assert all(grid.positive_weight.isfinite().all() for grid in workbench.grids.values())
