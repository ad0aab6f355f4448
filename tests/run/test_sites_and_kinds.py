"""Probes of other kinds than linear at other places than the outputs of blocks, from a config to what is done with them."""

import csv
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import setup_of
from finished import finish, results
from forked import forked
from killed import killed_after
from transformers import AutoModelForCausalLM

from streamprobe.activations.stream import RunningMeans
from streamprobe.cli import main, train
from streamprobe.probes.kept import load_kept
from streamprobe.probes.storage import load_probes
from streamprobe.tools.watch import watch

pytestmark = pytest.mark.usefixtures("undrawn")
KINDS = ["linear", "mlp4", "attn2", "concat", "ema4"]
KEYS: dict[str, Any] = {
    "dtype": "float32",
    "layers": [0, 2],
    "sites": ["resid_post", "attn_out"],
    "kinds": KINDS,
    "lags": [0, 4],
    "max_passes": 6,
    "bootstrap": 5,
    "max_batch_tokens": 512,
    "controls": ["embed", "joint+chain"],
}
PLACES = [("resid_post", "0"), ("resid_post", "2"), ("attn_out", "0"), ("attn_out", "2")]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, model_dir: str, chains_file: Path) -> Path:
    """A folder with a config and its run, finished, in `straight`."""
    return finish(tmp_path_factory.mktemp("sites"), KEYS | {"model": model_dir}, chains_file)


@pytest.fixture
def run(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of all that, in the working directory; the folder of the run."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return Path("straight")


def rows_of(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "results.csv").open()))


def test_every_kind_stands_at_every_site(finished: Path) -> None:
    rows = [row for row in rows_of(finished / "straight") if not row["control"]]
    for kind in KINDS:
        own = [(row["site"], row["layer"]) for row in rows if row["kind"] == kind and row["lag"] == "4"]
        assert own == ([("resid_post", "")] if kind == "concat" else PLACES)
    ahead = [row for row in rows if row["lag"] == "4"]
    assert all("nan" not in (row["auroc"], row["gain_bits"], row["lift"]) for row in ahead)
    assert all((row["over_linear"] == "nan") == (row["kind"] == "linear") for row in ahead)


@pytest.mark.parametrize("kind", ["mlp4", "ema4"])
def test_a_kind_is_above_the_linear_probe_of_its_own_site(kind: str, finished: Path) -> None:
    rows = [row for row in rows_of(finished / "straight") if not row["control"] and row["lag"] == "4"]
    area = {(row["kind"], row["site"], row["layer"]): float(row["auroc"]) for row in rows}
    for row in rows:
        if row["kind"] == kind:
            linear = area["linear", row["site"], row["layer"]]
            assert float(row["over_linear"]) == pytest.approx(float(row["auroc"]) - linear, abs=1e-6)
    others = [abs(area["linear", "resid_post", layer] - area["linear", "attn_out", layer]) for layer in ("0", "2")]
    assert max(others) > 1e-3  # negative control


def test_both_files_hold_them_all(finished: Path) -> None:
    kept = load_kept(finished / "straight").final
    names = [each.feed for each in kept]
    others = KINDS[1:]
    assert names == ["layers", "embeddings", "joint+chain", "nested", *others, *(f"nested {kind}" for kind in others)]
    for kind in KINDS:
        probes = load_probes(finished / "straight", kind=kind)
        assert [(site.point, str(site.layer)) for site in probes.reads] == PLACES
        assert [site.title for site in probes.sites][-1] == (
            "all layers" if kind == "concat" else "attn_out of layer 2"
        )
        assert probes.n_features == 32


def test_evaluated_on_its_own_chains_it_says_the_same(run: Path) -> None:
    assert main(["evaluate", str(run), "--split", "test", "--out", "again"]) == 0
    for name in ("results.csv", "differences.csv"):
        assert (Path("again") / name).read_bytes() == (run / name).read_bytes()


def test_a_killed_run_ends_the_same(run: Path) -> None:
    [done] = forked(["tiny.yaml", "--output_dir", "run"], prepare=killed_after(2, saved=2))
    assert done.status == -9 and not Path("run/results.csv").exists()
    assert train(["tiny.yaml", "--output_dir", "run", "--resume"]) == 0
    assert results("run") == results(str(run))


def test_modules_narrower_than_the_embeddings_are_read_without_the_zeros(run: Path) -> None:
    """Of every kind: what is kept of a token is as wide as the embedding of a control."""
    where = ["--sites", "none", "--hookpoints", "*.layers.{0,2}.self_attn.k_proj", "--output_dir", "narrow"]
    assert train(["tiny.yaml", *where, "--kinds", *KINDS, "meandiff", "quad2", "top_k2", "stack"]) == 0
    narrow = Path("narrow")
    assert {each.bank.n_features for each in load_kept(narrow).final if each.shared} == {16}
    rows = [row for row in rows_of(narrow) if not row["control"] and row["kind"] != "linear"]
    assert {row["site"] for row in rows if row["layer"]} == {"self_attn.k_proj"}
    assert main(["evaluate", "narrow", "--split", "test", "--out", "again"]) == 0
    assert (Path("again") / "results.csv").read_bytes() == (narrow / "results.csv").read_bytes()


def test_means_and_all_places_side_by_side_are_fed_of_each_place(model_dir: str, chains_file: Path) -> None:
    keys = [word for key in ("layers", "sites", "kinds", "lags") for word in (f"--{key}", *map(str, KEYS[key]))]
    argv = ["--model", model_dir, "--data", str(chains_file), "--dtype", "float32", "--controls", "embed", *keys]
    setup = setup_of(argv)
    feeds, batch = {feed.name: feed for feed in setup.feeds}, next(setup.reader.read("test"))
    assert list(feeds) == ["layers", "embeddings", "ema4", "concat"] and batch.acts.shape[1] == 4 + 4 + 1
    assert [site.title for site in feeds["ema4"].sites] == [site.title for site in feeds["layers"].sites]
    torch.testing.assert_close(feeds["concat"].features(batch)[:, 0], batch.acts[:, :4].flatten(1), rtol=0, atol=0)
    torch.testing.assert_close(feeds["embeddings"].features(batch)[:, 0], batch.acts[:, 8], rtol=0, atol=0)
    chain = int(batch.chain[0])
    own, places = batch.chain == chain, feeds["layers"].features(batch)
    some = setup.inputs.dataset.splits["test"][chain]
    at = batch.token[own]
    whole = torch.zeros(len(some.ids), *places.shape[1:])
    whole[at] = places[own]
    assert bool(some.support[at].all()) and int(some.support.sum()) == len(at)
    means = RunningMeans([4], [some]).of([place[None] for place in whole.unbind(1)], slice(0, len(whole)))
    expected = torch.stack([each[0, at] for each in means], 1)
    torch.testing.assert_close(feeds["ema4"].features(batch)[own], expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(expected, places[own], atol=1e-2)  # negative control


@pytest.mark.parametrize("kind", KINDS[1:])
def test_watched_and_scored_tokens_are_marked_alike(kind: str, finished: Path, model_dir: str) -> None:
    """What is said while the model writes is what is said of the text when it is read: of every kind at every site."""
    probes = load_probes(finished / "straight", kind=kind)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    ids = torch.arange(5, 12)
    written = list(watch(model, probes, ids, max_new_tokens=6, do_sample=False, eos_token_id=None))
    whole = torch.cat([ids, torch.tensor([token for token, _ in written])])
    acts = read_by_hand(model, whole)[len(ids) :]  # where the response begins, as for probes that look back
    said = torch.stack([each for _, each in written])
    torch.testing.assert_close(said, probes.probabilities(acts), rtol=0, atol=1e-5)
    assert not torch.allclose(said, probes.probabilities(acts.flip(1)), atol=1e-3)  # negative control
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def read_by_hand(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Activations [T, L, D] of the run's sites, by hooks of this test's own."""
    seen: dict[tuple[str, str], torch.Tensor] = {}
    handles = []
    for layer in (0, 2):
        block = model.model.layers[layer]
        for point, module in {"resid_post": block, "attn_out": block.self_attn}.items():

            def keep(_module: Any, _given: Any, output: Any, key: tuple[str, str] = (point, str(layer))) -> None:
                seen[key] = (output[0] if isinstance(output, tuple) else output)[0]

            handles.append(module.register_forward_hook(keep))
    with torch.no_grad():
        model(ids[None])
    for handle in handles:
        handle.remove()
    return torch.stack([seen[place] for place in PLACES], 1)


def test_the_commands_take_a_kind_at_a_site(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--kind", "mlp4", "--site", "attn_out", "--layer", "2", "--lag", "4"]
    assert main(["watch", str(run), "--prompt", "so", "--max_new_tokens", "2", *where]) == 0
    assert "attn_out of layer 2, backtracking/token/lag+04, newton, mlp4" in capsys.readouterr().out
    best = ["--kind", "ema4", "--site", "attn_out", "--lag", "4"]
    assert main(["watch", str(run), "--prompt", "so", "--max_new_tokens", "2", *best]) == 0
    assert "attn_out of layer" in capsys.readouterr().out
    joined = ["--kind", "concat", "--site", "attn_out", "--lag", "4"]
    assert main(["watch", str(run), "--prompt", "so", "--max_new_tokens", "2", *joined]) == 0
    assert "all layers, backtracking" in capsys.readouterr().out
    assert main(["score", str(run), "chains.json", "--out", "one.csv", *where]) == 0
    every = ["--out", "all.csv", "--probes", "all", "--kind", "mlp4", "--lag", "4"]
    assert main(["score", str(run), "chains.json", *every]) == 0
    one, all_ = (list(csv.DictReader(Path(name).open())) for name in ("one.csv", "all.csv"))
    name = "backtracking/token/mlp4/attn_out02/lag+04"
    assert name in one[0] and len([key for key in all_[0] if key.endswith("lag+04")]) == 4
    assert [float(row[name]) for row in one] == pytest.approx([float(row[name]) for row in all_], abs=1e-5)
    steered = ["--problems", "1", "--max_new_tokens", "2", "--strengths", "1", "--kind", "mlp4", "--site", "resid_post"]
    assert main(["steer", str(run), *steered, "--lag", "4"]) == 0


WRONG = {
    "site of a kind": (
        ["watch", "--prompt", "so", "--kind", "mlp4", "--site", "mlp_out"],
        "site mlp_out; expected one",
    ),
    "site of all": (["watch", "--prompt", "so", "--kind", "concat", "--site", "mlp_out"], "site mlp_out; expected one"),
    "steered": (["steer", "--kind", "mlp4", "--site", "attn_out"], "a probe of attn_out of layer"),
    "all steered": (["steer", "--kind", "concat"], "a probe of attn_out of layer 0, too; expected one of a block's"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_done_is_one_line(name: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (command, *options), said = WRONG[name]
    assert main([command, str(run), *options]) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1


def test_several_widths_with_other_kinds_are_one_line(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["tiny.yaml", "--output_dir", "new", "--hookpoints", "layers.0.self_attn.k_proj"]
    assert train(argv) == 2
    err = capsys.readouterr().err
    assert "kinds mlp4 attn2 concat ema4 with places of several widths (32 of layer 0, 16 of self_attn.k_proj" in err
    assert err.count("\n") == 1 and not Path("new").exists()
