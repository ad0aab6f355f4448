"""A run that reads other places than the outputs of blocks, from its config to what is done with its probes."""

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
from transformers import AutoModelForCausalLM, AutoTokenizer

from streamprobe.cli import main, train
from streamprobe.probes.kept import load_kept
from streamprobe.probes.merged import widths_of
from streamprobe.probes.storage import load_probes
from streamprobe.tools.score import score
from streamprobe.tools.watch import watch

pytestmark = pytest.mark.usefixtures("undrawn")
KEYS: dict[str, Any] = {
    "dtype": "float32",
    "layers": [0, 2],
    "sites": ["resid_post", "attn_out", "mlp_out"],
    "hookpoints": ["*.layers.{0,2}.self_attn.k_proj"],  # half as wide: two heads of four
    "lags": [0, 4],
    "max_passes": 30,
    "bootstrap": 5,
    "max_batch_tokens": 512,
    "controls": ["embed", "joint+chain"],
}
PLACES = [(point, layer) for point in ("resid_post", "attn_out", "mlp_out", "self_attn.k_proj") for layer in (0, 2)]
TEXT = "okay so wait no actually therefore each box card"


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


def rows_of(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.open()))


def test_every_site_has_its_rows_with_gains(finished: Path) -> None:
    rows = [row for row in rows_of(finished / "straight" / "results.csv") if not row["control"]]
    assert [(row["site"], int(row["layer"])) for row in rows] == [place for place in PLACES for _ in KEYS["lags"]]
    ahead = [row for row in rows if row["lag"] == "4"]
    assert len(ahead) == 8 and all(row["gain_bits"] and row["penalty"] and row["lift"] for row in ahead)
    assert {row["gain_bits"] for row in rows if row["lag"] == "0"} == {"nan"}  # negative control
    of_controls = [row for row in rows_of(finished / "straight" / "results.csv") if row["control"]]
    assert {row["site"] for row in of_controls} == {""}


def test_results_fail_to_agree_without_the_same_site(finished: Path, model_dir: str) -> None:
    """A run of one site alone says of it what the run of all said; another site says something else."""
    argv = ["tiny.yaml", "--sites", "attn_out", "--hookpoints", "none", "--output_dir", "alone"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(finished)
        assert train(argv) == 0
    alone, every = (
        {(row["site"], row["layer"], row["lag"]): float(row["auroc"]) for row in rows if not row["control"]}
        for rows in (rows_of(finished / name / "results.csv") for name in ("alone", "straight"))
    )
    assert len(alone) == 4
    for (site, layer, lag), area in alone.items():
        assert area == pytest.approx(every[site, layer, lag], abs=2e-3)
    others = [abs(area - every["mlp_out", layer, lag]) for (_, layer, lag), area in alone.items()]
    assert max(others) > 0.02  # negative control
    shutil.rmtree(finished / "alone")


def test_each_width_is_trained_alone_without_zeros(model_dir: str, chains_file: Path) -> None:
    keys = [word for key in ("layers", "sites", "hookpoints", "lags") for word in (f"--{key}", *map(str, KEYS[key]))]
    setup = setup_of(["--model", model_dir, "--data", str(chains_file), "--dtype", "float32", *keys])
    feeds = {feed.name: feed for feed in setup.feeds}
    assert list(feeds)[:2] == ["layers", "layers/16"]
    batch = next(setup.reader.read("test"))
    assert batch.acts.shape[1:] == (8 + 3, 32) and not batch.acts[:, 6:8, 16:].any() and batch.acts[:, 6:8, :16].any()
    for name, shape in (("layers", (6, 32)), ("layers/16", (2, 16))):
        acts = feeds[name].features(batch)
        assert acts.shape[1:] == shape and feeds[name].n_features == shape[1] and acts.any(0).all()


def test_one_bank_holds_them_all(finished: Path) -> None:
    probes = load_probes(finished / "straight")
    assert [(site.point, site.layer) for site in probes.sites] == PLACES and probes.layers == [0, 2] * 4
    assert widths_of(probes) == [32] * 6 + [16] * 2 and probes.n_features == 32
    assert not probes.weight[6:, :, 16:].any() and probes.weight[6:, :, :16].any()
    assert [site.name for site in probes.sites[-3:]] == ["mlp_out02", *(f"layers.{i}.self_attn.k_proj" for i in (0, 2))]
    feeds = [each.feed for each in load_kept(finished / "straight").final]
    assert feeds == ["layers", "layers/16", "embeddings", "joint+chain", "nested", "nested/16"]


@pytest.mark.parametrize("store", [[], ["--memory_gb", "0.004"]], ids=["kept", "streamed"])
def test_a_killed_run_ends_the_same(store: list[str], run: Path) -> None:
    if store:
        assert train(["tiny.yaml", *store, "--output_dir", "run"]) == 0
        shutil.rmtree(run)
        Path("run").rename(run)
    [done] = forked(["tiny.yaml", *store, "--output_dir", "run"], prepare=killed_after(2, saved=2))
    assert done.status == -9 and not Path("run/results.csv").exists()
    assert train(["tiny.yaml", *store, "--output_dir", "run", "--resume"]) == 0
    assert results("run") == results(str(run))


def test_evaluated_on_its_own_chains_it_says_the_same(run: Path) -> None:
    assert main(["evaluate", str(run), "--split", "test", "--out", "again"]) == 0
    assert (Path("again") / "results.csv").read_bytes() == (run / "results.csv").read_bytes()


def read_by_hand(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Activations [T, L, D] of the run's sites, by hooks of this test's own."""
    seen: dict[tuple[str, int], torch.Tensor] = {}
    handles = []
    for layer in (0, 2):
        block = model.model.layers[layer]
        for point, module in {
            "resid_post": block,
            "attn_out": block.self_attn,
            "mlp_out": block.mlp,
            "self_attn.k_proj": block.self_attn.k_proj,
        }.items():

            def keep(_module: Any, _given: Any, output: Any, key: tuple[str, int] = (point, layer)) -> None:
                seen[key] = (output[0] if isinstance(output, tuple) else output)[0]

            handles.append(module.register_forward_hook(keep))
    with torch.no_grad():
        model(ids[None])
    for handle in handles:
        handle.remove()
    return torch.stack([torch.nn.functional.pad(seen[place], (0, 32 - seen[place].shape[1])) for place in PLACES], 1)


def test_scores_are_those_of_what_an_own_hook_reads(finished: Path, model_dir: str) -> None:
    probes, tokenizer = load_probes(finished / "straight"), AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    found = score(probes, model, tokenizer, TEXT)
    acts = read_by_hand(model, torch.cat([torch.tensor([tokenizer.bos_token_id]), found.ids]))[1:]
    torch.testing.assert_close(found.probabilities, probes.probabilities(acts), rtol=0, atol=1e-5)
    assert not torch.allclose(found.probabilities, probes.probabilities(acts.flip(1)), atol=1e-2)  # negative control


def test_watched_tokens_say_what_they_say_when_they_are_read(finished: Path, model_dir: str) -> None:
    probes = load_probes(finished / "straight")
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    ids = torch.arange(5, 12)
    written = list(watch(model, probes, ids, max_new_tokens=4, do_sample=False, eos_token_id=None))
    whole = torch.cat([ids, torch.tensor([token for token, _ in written])])
    expected = probes.probabilities(read_by_hand(model, whole))[len(ids) :]
    torch.testing.assert_close(torch.stack([said for _, said in written]), expected, rtol=0, atol=1e-5)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_the_commands_take_a_site(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--site", "self_attn.k_proj", "--layer", "2", "--lag", "4"]
    assert main(["watch", str(run), "--prompt", "so", "--max_new_tokens", "2", *where]) == 0
    assert "self_attn.k_proj of layer 2, backtracking/token/lag+04" in capsys.readouterr().out
    assert main(["watch", str(run), "--prompt", "so", "--max_new_tokens", "2", "--layer", "2", "--lag", "4"]) == 0
    assert "layer 2, backtracking" in capsys.readouterr().out  # negative control
    assert main(["score", str(run), "chains.json", "--out", "one.csv", *where]) == 0
    assert main(["score", str(run), "chains.json", "--out", "all.csv", "--probes", "all", "--lag", "4"]) == 0
    one, every = rows_of(Path("one.csv")), rows_of(Path("all.csv"))
    name = "backtracking/token/layers.2.self_attn.k_proj/lag+04"
    assert name in one[0] and len([key for key in every[0] if key.endswith("lag+04")]) == 8
    assert [float(row[name]) for row in one] == pytest.approx([float(row[name]) for row in every], abs=1e-5)


WRONG = {
    "another site": (["watch", "--prompt", "so", "--site", "q"], "site q; expected one of resid_post attn_out mlp_out"),
    "steered": (["steer", "--site", "mlp_out"], "a probe of mlp_out of layer 0; expected one of a block's output"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_probes_of_a_site_cannot_do_is_one_line(name: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (command, *options), said = WRONG[name]
    assert main([command, str(run), *options]) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1


BAD = {
    "no point": (["--sites", "atn_out"], "sites atn_out; expected attn_out, the nearest one"),
    "no module": (
        ["--hookpoints", "layers.*.mlp.dwn_proj"],
        "matches no module of the model; expected such as layers.*.",
    ),
    "outside": (["--hookpoints", "*embed_tokens"], "matches embed_tokens, in no decoder block"),
    "no block": (["--hookpoints", "blocks.7.hook_mlp_out"], "expected blocks from 0 to 3"),
    "nothing": (["--sites", "none", "--hookpoints", "none"], "sites none with hookpoints none"),
    "no layers": (["--sites", "mlp_out", "--layers", "9"], "layers 9; expected numbers from 0 to 3"),
    "shards": (["--sites", "mlp_out", "--tp_size", "2"], "tp_size 2 with mlp_out"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_read_is_one_line(name: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options, said = BAD[name]
    assert train(["tiny.yaml", "--output_dir", "new", *options]) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1 and not Path("new").exists()


def test_a_resumed_run_reads_the_same(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["tiny.yaml", "--output_dir", str(run), "--resume"]
    assert train([*argv, "--sites", "resid_post"]) == 2
    assert (
        "--resume with sites ['resid_post']; expected ['resid_post', 'attn_out', 'mlp_out']" in capsys.readouterr().err
    )


def test_modules_alone_need_no_layers(model_dir: str, chains_file: Path) -> None:
    argv = ["--model", model_dir, "--data", str(chains_file), "--dtype", "float32", "--lags", "4"]
    setup = setup_of([*argv, "--sites", "none", "--hookpoints", "blocks.1.hook_resid_mid", "layers.0.self_attn.k_proj"])
    assert [site.name for site in setup.backbone.sites] == ["resid_mid01", "layers.0.self_attn.k_proj"]
    assert len(setup.backbone.model.layers) == 2
