"""The benchmark runs through, measures what it says, and refuses what it cannot run.  No time is asserted."""

import json
import math

import pytest
import torch

from streamprobe.bench import offline as baseline
from streamprobe.bench.measurements import main
from streamprobe.bench.synthetic import BATCH, SHAPES, Workbench, make_chains, make_model
from streamprobe.bench.timings import FORWARD, JOB, MANY, OFFLINE, PASSES, REPLAYS
from streamprobe.lags import Column

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def lab() -> Workbench:
    return Workbench(SHAPES["tiny"], 5, 2048, CPU)


def test_a_tiny_run_writes_every_row(tmp_path, capsys):
    file = tmp_path / "bench.json"
    tiny = "--shape tiny --chains 4 --repeats 1 --offline_chains 2 --offline_epochs 3 --peer probelab"
    assert main([*tiny.split(), "--json", str(file)]) == 0
    printed = capsys.readouterr().out
    result = json.loads(file.read_text())
    rows = {row["what"]: row for row in result["rows"]}
    for name in (FORWARD, *PASSES, JOB, *MANY, *(f"replayed pass, 70 probes: {kind}" for kind in REPLAYS)):
        assert len(rows[name]["readings"]) == 1 and rows[name]["kind"] == "measured"
    assert all(row["seconds"] > 0 and row["ratio"] > 0 and row["what"] in printed for row in rows.values())
    assert all(value > 0 for value in result["headlines"].values())
    assert len([row for row in rows.values() if row["what"].startswith("offline, 2 chains")]) == 3
    assert "metrics of 70 probes on 100,000 tokens" in rows
    assert rows[FORWARD]["ratio"] == 1
    assert result["threads"] == 1 and result["versions"]["torch"] == torch.__version__
    assert result["model"]["hidden"] == 32 and result["tokens"]["train"] > result["tokens"]["validation"] > 0
    assert ("not installed" in printed) != any("probelab" in name for name in rows)
    extrapolated = [row["seconds"] for row in rows.values() if row["kind"] == "extrapolated"]
    assert len(extrapolated) == 4 and math.isclose(extrapolated[-1], sum(extrapolated[:-1]))
    assert rows[OFFLINE]["seconds"] == extrapolated[-1]


def test_the_bare_forward_sees_the_batches_of_a_pass_and_no_hook(lab):
    """The limit is a limit only if the model is asked for the very same."""
    shapes, hooks = [], []

    def note(module, args, kwargs):
        shapes.append(tuple(kwargs["input_ids"].shape))
        hooks.append(sum(len(block._forward_hooks) for block in module.layers))

    handle = lab.model.register_forward_pre_hook(note, with_kwargs=True)
    grid = lab.grids[1]
    lab.forward(grid.train)
    bare, bare_hooks = shapes.copy(), hooks.copy()
    shapes.clear(), hooks.clear()
    lab.train_pass(grid, [lab.solver("adam", grid)], lab.memories(grid)[0])
    handle.remove()
    assert len(bare) > 1 and bare == shapes
    assert set(bare_hooks) == {0} and set(hooks) == {6}  # five taps, and the one that ends the pass behind the last


def test_a_replayed_pass_leaves_the_model_alone(lab):
    grid = lab.grids[1]
    memory = lab.memories(grid)[0]
    solver = lab.solver("newton", grid)
    lab.train_pass(grid, [solver], memory)
    handle = lab.model.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    lab.train_pass(grid, [solver], memory)
    handle.remove()
    assert int(solver.passes) == 2 and solver.best_loss.isfinite().all()


def test_grids_have_the_probes_that_their_rows_name(lab):
    assert {n: len(lab.layers) * len(grid.columns) for n, grid in lab.grids.items()} == {1: 70, 10: 700, 100: 7000}
    assert [c.codes.shape[1] for grid in lab.grids.values() for c in grid.train[:1]] == [1, 10, 100]
    assert not lab.solver("newton", lab.grids[1]).shared and lab.solver("newton", lab.grids[10]).shared
    assert lab.solver("adam", lab.grids[1]).batch_size == BATCH


def test_made_up_chains_are_like_the_annotated_ones():
    chains = make_chains(300, 2, 400)
    lengths = [len(c.ids) for c in chains]
    assert 300 <= min(lengths) and max(lengths) <= 900 and abs(sum(lengths) / len(lengths) - 540) < 20
    codes = torch.cat([c.codes for c in chains])
    assert 0.02 < (codes >= 1).float().mean() < 0.028
    assert 14 < (codes >= 1).sum() / (codes == 2).sum() <= 18  # a chain may end inside a section
    assert not torch.equal(codes[:, 0], codes[:, 1])


def test_no_column_is_without_a_positive(lab):
    assert all(grid.positive_weight.isfinite().all() for grid in lab.grids.values())


@pytest.mark.parametrize("lag", [-16, 0, 48])
def test_the_offline_way_trains_on_the_very_pairs_of_the_stream(lab, tmp_path, lag):
    """A baseline that learned from other tokens would prove nothing."""
    grid = lab.grids[1]
    k = grid.columns.index(Column("label0", "token", lag))
    model = make_model(lab.shape, lab.shape.blocks, CPU)
    model.load_state_dict(lab.model.state_dict(), strict=False)
    baseline.extract(model, grid.train, lab.layers, tmp_path)
    assert len(list(tmp_path.iterdir())) == len(grid.train) * len(lab.layers)
    for chain in grid.train:
        acts, targets = baseline.load([chain], 2, grid.columns[k], grid.labels, torch.float32, tmp_path, CPU)
        (batch,) = lab.read(grid, [chain])
        valid = batch.valid[:, k]
        torch.testing.assert_close(acts, batch.acts[valid, 2])
        assert torch.equal(targets.bool(), batch.targets[valid, k])


def test_activations_in_bfloat16_survive_their_file(lab, tmp_path):
    shape = lab.shape._replace(dtype="bfloat16")
    model, chain = make_model(shape, shape.blocks, CPU), lab.grids[1].train[0]
    baseline.extract(model, [chain], [1], tmp_path)
    column = Column("label0", "token", 0)
    acts, targets = baseline.load([chain], 1, column, ["label0"], torch.bfloat16, tmp_path, CPU)
    found = model(input_ids=chain.ids[None], output_hidden_states=True).hidden_states[2][0, 1:]
    assert acts.dtype == torch.float32 and torch.equal(acts, found.float()) and len(acts) == len(targets)


def test_the_offline_probe_learns():
    random = torch.Generator().manual_seed(0)
    acts = torch.randn(20_000, 8, generator=random)
    targets = (acts[:, 0] > 1).float()
    probe = baseline.fit_epoch(acts, targets, 4.0, 0.0, learning_rate=0.01)
    said = probe(acts)[:, 0] > 0
    assert (said == targets.bool()).float().mean() > 0.9


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("--chains 1", "at least 2"),
        ("--chains many", "invalid int value: 'many'"),
        ("--repeats 0", "repeats 0"),
        ("--shape huge", "invalid choice: 'huge'"),
        ("--peer sklearn", "invalid choice: 'sklearn'"),
        ("--json no/such/folder/bench.json", "a file in a folder that exists"),
        ("--nosuch 1", "unrecognized arguments: --nosuch 1"),
    ],
)
def test_wrong_input_ends_in_one_line(arguments, told, capsys):
    assert main(arguments.split()) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("streamprobe: ") and printed.err.count("\n") == 1 and told in printed.err


def test_chains_that_do_not_fit_are_refused(monkeypatch, capsys):
    monkeypatch.setattr("streamprobe.run.memory_plan.free_bytes", lambda device: 0)
    assert main("--shape tiny --chains 6 --repeats 1".split()) == 2
    assert "fix: lower --chains" in capsys.readouterr().err.splitlines()[-1]
