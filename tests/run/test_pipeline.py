"""Whole runs on a tiny random model: what they write, what they find, and that a crash costs nothing."""

import csv
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from builders import inputs_of, setup_of
from forked import forked
from killed import killed_after
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import LlamaConfig, LlamaModel

from streamprobe import trainer
from streamprobe.activations.feed import Feed
from streamprobe.activations.shards import Trip, deal
from streamprobe.activations.store import ActivationMemory, Sizes
from streamprobe.activations.stream import stream
from streamprobe.cli import train as main
from streamprobe.controls.table import CONTROLS
from streamprobe.data.census import count_tokens
from streamprobe.data.tokenize import Chain
from streamprobe.evaluation.metrics import measure
from streamprobe.evaluation.rows import FIELDS
from streamprobe.evaluation.scores import evaluate
from streamprobe.lags import INSIDE, OUTSIDE, Column
from streamprobe.probes.early_stopping import BestProbes
from streamprobe.probes.sites import layer_sites
from streamprobe.probes.storage import load_probes
from streamprobe.reporting.tracking.tracker import Tracker
from streamprobe.run.resume import check_same_run
from streamprobe.solvers.adam import AdamSolver
from streamprobe.solvers.newton import PAIRS, NewtonSolver
from streamprobe.trainer import Job

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("undrawn")
SINGLE = ("--controls", *(name for name, control in CONTROLS.items() if control.under_lift))  # without the wide ones


@pytest.fixture
def config(tmp_path, model_dir, chains_file, monkeypatch):
    """A config file of a run that takes seconds, in the working directory."""
    monkeypatch.chdir(tmp_path)
    keys = {
        "model": str(model_dir),
        "data": str(chains_file),
        "dtype": "float32",
        "layers": [0, 2],
        "lags": [-2, 0, 4],
        "labels": ["backtracking", "deduction"],
        "targets": ["token", "onset", "within"],
        "max_passes": 3,
        "max_batch_tokens": 512,
        "bootstrap": 20,
        "solvers": ["adam", "newton"],
    }
    Path("tiny.yaml").write_text(yaml.safe_dump(keys))
    return "tiny.yaml"


def outputs(folder):
    return {name: (Path(folder) / name).read_bytes() for name in ("results.csv", "probes.safetensors")}


def test_a_run_writes_what_it_promises(drawn, config, capsys):
    assert main([config]) == 0
    printed = capsys.readouterr().out
    folder = Path("runs/tiny")
    events = [p.name for p in folder.glob("events.out.tfevents.*")]
    files = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} - set(events)
    assert files == {
        "config.yaml",
        "results.csv",
        "categories.csv",
        "differences.csv",
        "reliability.csv",
        "curves.json",
        "summary.json",
        "probes.safetensors",
        "controls.safetensors",
        "transcripts.json",
        "report.html",
        "checkpoint/state.safetensors",
    }
    assert len(events) == 1 and [p.name for p in Path().iterdir()].count("runs") == 1

    rows = list(csv.DictReader((folder / "results.csv").open()))
    columns = 2 * (3 + 3 + 1)  # labels x (token, onset, within: positive lags only)
    assert list(rows[0]) == FIELDS
    by_control = {"": 2 * columns, "permuted": 2 * columns, "embed": columns, "text": columns, "position": columns}
    by_control |= dict.fromkeys(("persistence", "joint", "joint+chain"), 2 * 3)  # where the label lies ahead
    assert Counter((r["solver"], r["control"]) for r in rows) == {
        (solver, control): n for solver in ("adam", "newton") for control, n in by_control.items()
    }
    assert all(0 <= float(r["auroc_low"]) <= float(r["auroc"]) <= float(r["auroc_high"]) <= 1 for r in rows)
    assert all(r["split"] == "test" and int(r["n_chains"]) <= 12 for r in rows)

    summary = json.loads((folder / "summary.json").read_text())
    assert summary["run"]["passes"] == 3 and summary["run"]["counts"]["read"] == 60
    assert set(summary["run"]["versions"]) >= {"python", "torch", "transformers"}
    nested = summary["results"]["newton"]["deduction"]["onset"]["lag+04"]["layer02"]
    place = ("newton", "2", "deduction", "onset", "4", "")
    row = next(r for r in rows if (r["solver"], r["layer"], r["label"], r["target"], r["lag"], r["control"]) == place)
    assert {r["gradient_norm"] for r in rows if r["solver"] == "adam"} == {"nan"}
    assert all(0 < float(r["gradient_norm"]) < 1 for r in rows if r["solver"] == "newton")
    assert nested["auroc"] == pytest.approx(float(row["auroc"]), rel=1e-5)

    for told in (
        "chains    60 read",
        "1<",
        "memory",
        "pass 3",
        "test AUROC   backtracking, target within",
        "no verdict on",
        "wrote",
    ):
        assert told in printed


def files():
    return {p: p.stat().st_mtime_ns for p in Path().rglob("*")}


def test_a_dry_run_says_what_the_run_needs_and_writes_nothing(config, capsys):
    before = files()
    assert main([config, "--dry_run"]) == 0
    assert files() == before
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if line[:1].isalpha())
    assert {"chains", "split", "train", "validation", "test"} <= set(lines), "chains and tokens of each split"
    tokens = {name: int(lines[name].split()[1].replace(",", "")) for name in ("train", "validation", "test")}
    assert lines["pass"].startswith(f"{tokens['train']:,} training and {tokens['validation']:,} validation tokens")
    assert "GB on cpu for all" in lines["memory"]
    assert lines["model"] == "reads training tokens once, validation tokens once, test tokens once"
    assert f"{sum(tokens.values()):,} tokens" in lines["time"] and " s for the model" in lines["time"]
    assert re.fullmatch(r"blocks 0 to 2 are( [\d.]+ GB in (float32|bf16|8-bit|4-bit),?){4} \(.*\)", lines["weights"])
    assert re.fullmatch(r"[\d.]+ GB of weights", lines["loaded"])
    assert re.fullmatch(r"\d+ \(label, target, lag\) at layer0\d(, layer0\d)*: each linear", lines["probes"])
    assert "wrote" not in lines


def test_a_dry_run_names_the_kinds_whose_time_it_does_not_tell(config, capsys):
    assert main([config, "--dry_run", "--kinds", "linear", "mlp4", "ema4", "--sites", "attn_out", *SINGLE]) == 0
    said = capsys.readouterr().out
    assert re.search(
        r"\nprobes    .* at attn_out0\d.*: each linear, mlp4, ema4\n          mlp4: trained on a sample", said
    )


def test_a_dry_run_tells_how_often_the_model_reads_what_does_not_fit(config, capsys):
    assert main([config, "--dry_run", "--memory_gb", "0.0028", *SINGLE]) == 0
    printed = capsys.readouterr().out
    assert "training tokens in each of at most 3 passes, validation tokens once, test tokens once" in printed
    assert main([config, "--dry_run", "--memory_gb", "0.005"]) == 0
    assert "training tokens in each of at most 3 passes and as many of nested probes, v" in capsys.readouterr().out
    assert main([config, "--dry_run", "--layers", "9"]) == 2, "what the user got wrong is told as ever"
    assert not Path("runs").exists()


def test_a_dry_run_beside_a_run_leaves_it_alone(config):
    assert main([config, *SINGLE, "--max_passes", "1"]) == 0
    before = files()
    assert main([config, *SINGLE, "--dry_run"]) == 0
    assert main([config, *SINGLE, "--dry_run", "--resume"]) == 2, "which would be checked against the run"
    assert files() == before
    check_same_run({"dry_run": False, "seed": 0}, {"seed": 0})  # a checkpoint from before there was such a key


def test_a_dry_run_runs_the_model_for_a_trial_text_and_two_batches_only(config, monkeypatch, capsys):
    forwards = []
    forward = LlamaModel.forward
    monkeypatch.setattr(
        LlamaModel, "forward", lambda *a, **k: forwards.append(k["input_ids"].shape) or forward(*a, **k)
    )
    assert main([config, "--dry_run"]) == 0
    tried, timed = forwards[:2], forwards[2:]  # the text that every model is tried with, and a full batch
    assert tried == [(5, 23)] * 2
    assert len(timed) == 2 and timed[0] == timed[1] and 256 < timed[0].numel() <= 512


def test_saved_probes_give_the_saved_results(config, model_dir):
    assert main([config, "--controls", "none"]) == 0
    setup = setup_of([config, "--controls", "none"])
    [feed] = setup.feeds
    banks = [(load_probes("runs/tiny", solver), feed) for solver in ("adam", "newton")]
    scored = evaluate(banks, setup.reader.read("test"))
    measured = [measure(each.scores, each.targets, each.valid) for each in scored]
    aurocs = [area for metrics in measured for area in metrics["auroc"].flatten().tolist()]
    rows = csv.DictReader(Path("runs/tiny/results.csv").open())
    assert [float(r["auroc"]) for r in rows] == pytest.approx(aurocs, rel=1e-5)


def test_the_config_that_a_run_wrote_runs_it_again(config):
    assert main([config, *SINGLE]) == 0
    assert main(["runs/tiny/config.yaml", "--output_dir", "again"]) == 0
    assert outputs("again") == outputs("runs/tiny")
    assert main([config, *SINGLE, "--seed", "1"]) == 0, "a second run goes to a folder of its own"
    assert outputs("runs/tiny-2") != outputs("runs/tiny")


def test_a_rare_label_runs_whatever_its_permuted_twin_loses(config, chains_file, capsys):
    """One section in all training chains: some shifts leave no positive at the longest lag, and those are left out."""
    rows = json.loads(chains_file.read_text())
    splits = inputs_of([config, "--controls", "none"]).dataset.splits
    once = {split[0].id for split in splits.values()}
    for row in rows:
        tag = '["backtracking"]'
        kept = 1 if row["task_id"] in once else 0
        row["annotated_chain"] = (
            row["annotated_chain"].replace(tag, "@", kept).replace(tag, '["deduction"]').replace("@", tag)
        )
    Path("rare.json").write_text(json.dumps(rows))
    argv = [
        "--data",
        "rare.json",
        "--labels",
        "backtracking",
        "--targets",
        "onset",
        "--lags",
        "0",
        "40",
        "--solvers",
        "newton",
    ]
    for seed in range(5):
        assert main([config, *argv, "--seed", str(seed)]) == 0
    printed = capsys.readouterr().out
    assert "columns without both classes are left out" in printed
    assert re.search("(no test chain|at most 1 test chain) holds a positive", printed)


def test_the_data_keep_their_fingerprint(config):
    """Seeds and controls are no part of the data."""
    prints = set()
    for argv in (["--seed", "1"], ["--seed", "2", "--seeds", "2"], ["--controls", "none"]):
        prints.add(inputs_of([config, *argv]).fingerprint)
    assert len(prints) == 1 and inputs_of([config, "--test_share", "0.3"]).fingerprint not in prints


def test_seeds_spread_what_is_random_and_nothing_else(config):
    """Adam's starts and the permuted labels; Newton's probes have one solution."""
    argv = ("--seeds", "3", "--targets", "token", "--labels", "backtracking", "--max_passes", "2")
    assert main([config, *argv]) == 0
    rows = list(csv.DictReader(Path("runs/tiny/results.csv").open()))
    spread = {(r["solver"], r["control"]): float(r["auroc_spread"]) for r in rows}
    assert {place for place, value in spread.items() if value == value} == {
        ("newton", "permuted"),
        *(("adam", c) for c in ("", *CONTROLS)),
    }
    assert 0 < spread["adam", ""] < 0.1 < 10 * spread["newton", "permuted"]
    assert len(rows) == 2 * (2 * 3 * 2 + 2 * 3 + 3 + 3), "one row for all seeds"
    assert load_probes("runs/tiny", "adam").weight.shape == (2, 3, 32), "the first seed's probes are saved"


def test_tensorboard_holds_every_probe_and_a_chart_per_layer(drawn, config):
    assert main([config, "--log_probes", "all"]) == 0
    events = EventAccumulator("runs/tiny").Reload()
    scalars = events.Tags()["scalars"]
    assert {
        "auroc/validation/adam/backtracking/token lag+04 layer02",
        "train_loss/newton/deduction/onset lag-02 layer00",
        "train_loss/adam/median",
    } <= set(scalars)
    assert {"progress/tokens_per_second", "progress/memory_gb", "progress/final_probes"} <= set(scalars)
    steps = [e.step for e in events.Scalars("f1/validation/adam/backtracking/token lag+00 layer00")]
    assert len(steps) == 3 and steps == sorted(steps)
    from tensorboard.plugins.custom_scalar import layout_pb2

    layout = layout_pb2.Layout()
    layout.ParseFromString(events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    charts = {c.title: [k.title for k in c.chart] for c in layout.category}
    title = "auroc validation newton backtracking token: "
    assert charts[title + "all lags, by layer"] == ["layer00", "layer02"]
    assert (
        charts[title + "all layers, by lag"]
        == charts[title + "best layer and controls, by lag"]
        == ["lag-02", "lag+00", "lag+04"]
    )
    assert charts[title + "all lags, by control"] == [
        "control embed",
        "control text",
        "control position",
        "control persistence",
        "control joint",
        "control joint+chain",
        "layer00 control permuted",
        "layer02 control permuted",
    ]
    assert len(events.Tags()["images"]) == 2 * 2 * 3 * 3, "solvers, labels, targets; AUROC, average precision and lift"
    texts = {tag.split("/")[0] for tag in events.Tags()["tensors"] if tag.endswith("text_summary")}
    assert texts == {"1 verdict", "2 preflight", "3 config"}


SPY = """
import json, os, sys
touched = {}
def hook(event, args):
    if event == "open" and isinstance(args[0], str) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        touched.setdefault(os.path.abspath(args[0]), 0)
    if event in ("os.rename", "os.mkdir", "os.link", "os.symlink"):
        touched.setdefault(os.path.abspath(os.fspath(args[1] if event != "os.mkdir" else args[0])), 0)
from streamprobe import cli
from streamprobe.run import pipeline
sys.addaudithook(hook)
status = cli.train(sys.argv[1:])
open_paths = sorted(touched)
print("TOUCHED " + json.dumps(open_paths))
sys.exit(status)
"""


def spied(config, *argv):
    """Runs the command line under an audit hook; every path that was opened for writing, made or renamed to."""
    done = subprocess.run(
        [sys.executable, "-B", "-c", SPY, config, *argv],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=Path.cwd(),
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    return [Path(p) for p in json.loads(done.stdout.split("TOUCHED ")[1])]


def holds_nothing(path):
    """A folder, an empty lock of a library's cache, or the void."""
    return path.is_dir() or str(path) == "/dev/null" or (path.suffix == ".lock" and not path.stat().st_size)


@pytest.mark.parametrize("memory", ["auto", "0.0008"], ids=["replayed", "streamed"])
def test_no_activation_reaches_a_file(config, memory):
    """Every write is inside output_dir, and no file is larger than the probes and the curves explain."""
    paths = spied(config, "--memory_gb", memory, "--output_dir", "out", "--controls", "none")
    out = Path("out").resolve()
    assert not [p for p in paths if not p.is_relative_to(out) and not holds_nothing(p)]
    probes, hidden, curves = 2 * 14, 32, 2 * 8
    bank = probes * (hidden + 1) * 4
    vectors = 4 + 2 * PAIRS  # float64, of each probe of Newton's
    families, columns, pictures = 2 * 2 * 3, 14, 3  # of solver, label and target; pictures of each, at each pass
    limits = {
        "state.safetensors": (5 + 2 * vectors) * bank,
        "probes.safetensors": 3 * bank,
        "report.html": families * pictures * 10_000,
        "summary.json": 2 * probes * len(FIELDS) * 35,  # a line for each number of a probe
        "transcripts.json": 10 * 250 * (probes + 12),  # a letter for each probe, and the token
    }
    events = probes * curves * 3 * 2 * 50 + families * 2 * 3 * 3_000 + 2 * columns * 6_000
    activations = 60 * 60 * 2 * hidden * 4  # of the shortest conceivable data set
    for path in (p for p in Path("out").rglob("*") if p.is_file()):
        limit = limits.get(path.name, events if "tfevents" in path.name else 60_000) + 8_000
        assert path.stat().st_size < limit < activations, path


def test_the_spy_sees_a_write_outside(config):
    """The negative control: a run that leaves one file elsewhere is caught."""
    global SPY
    honest = SPY
    try:
        SPY = honest.replace("open_paths =", "open('leak.bin', 'wb').write(bytes(9)); open_paths =")
        assert Path("leak.bin").resolve() in spied(config, "--output_dir", "out", "--controls", "none")
    finally:
        SPY = honest


def launch(config, *argv):
    """A process of its own, with as many threads as this one: sums of another order are not bit-identical."""
    return subprocess.Popen(
        [sys.executable, ROOT / "run.py", config, *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


@pytest.mark.parametrize(
    ("memory", "stops"),
    [("auto", [(3, 3), (5, 3)]), ("auto", [(2, 0), (6, 3)]), ("0.0028", [(3, 3)]), ("0.0028", [(3, 2)])],
    ids=["replayed", "replayed from an older pass", "streamed", "streamed from an older pass"],
)
def test_killed_at_any_moment_and_resumed_it_ends_the_same(config, memory, stops, capsys):
    """kill -9 after a pass, with its own checkpoint or an older one: results, probes and curves are the same."""
    argv = ("--memory_gb", memory, "--max_passes", "6", "--patience", "9", *SINGLE)
    assert main([config, *argv, "--output_dir", "straight"]) == 0
    resume = []
    for number, saved in stops:
        [done] = forked([config, *argv, "--output_dir", "killed", *resume], prepare=killed_after(number, saved))
        assert done.status == -signal.SIGKILL
        assert not Path("killed/results.csv").exists()
        resume = ["--resume"]
    assert main([config, *argv, "--output_dir", "killed", "--resume"]) == 0
    assert f"resumed   after pass {saved}" in capsys.readouterr().out
    assert outputs("killed") == outputs("straight")
    tag = "auroc/validation/adam/backtracking/token lag+00 best layer"
    curves = [[(e.step, e.value) for e in EventAccumulator(f).Reload().Scalars(tag)] for f in ("killed", "straight")]
    assert curves[0] == curves[1] and len(curves[0]) == 6


def test_killed_before_the_first_checkpoint_resume_starts_over(config):
    run = launch(config, *SINGLE, "--output_dir", "killed")
    for line in run.stdout:
        if line.startswith("memory"):
            break
    run.send_signal(signal.SIGKILL)
    run.wait(60)
    assert main([config, *SINGLE, "--output_dir", "killed", "--resume"]) == 0
    assert main([config, *SINGLE, "--output_dir", "straight"]) == 0
    assert outputs("killed") == outputs("straight")


def test_resume_refuses_other_chains(config, chains_file, capsys):
    """Else chains that were held out could be trained on."""
    rows = json.loads(chains_file.read_text())
    Path("mine.json").write_text(json.dumps(rows))
    assert main([config, "--data", "mine.json", "--controls", "none", "--output_dir", "out"]) == 0
    Path("mine.json").write_text(json.dumps(rows[::-1]))
    argv = ["--data", "mine.json", "--controls", "none", "--output_dir", "out", "--resume", "--max_passes", "4"]
    assert main([config, *argv]) == 2
    assert "--resume with data_fingerprint" in capsys.readouterr().err


def test_validation_without_a_positive_is_told(config, chains_file, capsys):
    rows = json.loads(chains_file.read_text())
    order = [i for i in np.random.RandomState(42).permutation(60)[12:]]
    for i in order[:5]:
        rows[i]["annotated_chain"] = rows[i]["annotated_chain"].replace("backtracking", "deduction")
    Path("mine.json").write_text(json.dumps(rows))
    assert main([config, "--data", "mine.json", "--labels", "backtracking", "--max_passes", "2", *SINGLE]) == 0
    assert "no positive in validation for backtracking/token/lag-02" in capsys.readouterr().out
    rows = list(csv.DictReader(Path("runs/tiny/results.csv").open()))
    assert all(r["f1"] == "nan" and r["threshold"] == "nan" for r in rows)
    assert {(r["solver"], r["best_pass"]) for r in rows} == {("adam", "1"), ("newton", "2")}
    assert all(float(r["auroc"]) > 0 for r in rows)


def test_resume_refuses_another_config_but_takes_more_passes(config, capsys):
    assert main([config, *SINGLE, "--output_dir", "out", "--patience", "9"]) == 0
    assert main([config, *SINGLE, "--output_dir", "out", "--patience", "9", "--layers", "1", "--resume"]) == 2
    assert "--resume with layers [1]" in capsys.readouterr().err
    assert main([config, *SINGLE, "--output_dir", "out", "--patience", "9", "--max_passes", "5", "--resume"]) == 0
    assert main([config, *SINGLE, "--output_dir", "straight", "--patience", "9", "--max_passes", "5"]) == 0
    assert outputs("out") == outputs("straight")


PLANTED, LAG = 7, 8


def planted_chains(n, seed, permuted=False):
    """Random tokens; the token LAG after each token PLANTED is positive.  `permuted` shifts the labels of each chain."""
    random = torch.Generator().manual_seed(seed)
    chains = []
    for i in range(n):
        ids = torch.randint(0, 20, (100,), generator=random)
        codes = torch.full((100, 1), OUTSIDE, dtype=torch.int8)
        codes[LAG:][ids[:-LAG] == PLANTED] = INSIDE
        if permuted:
            codes = codes.roll(int(torch.randint(20, 80, (), generator=random)), 0)
        chains.append(Chain(f"chain_{i}", ids, codes, torch.ones(100, dtype=torch.bool)))
    return chains


@pytest.mark.parametrize("permuted", [False, True])
def test_a_planted_direction_is_found_at_its_lag_and_its_permuted_twin_is_not(permuted):
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=20,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    model = LlamaModel(shape).eval()
    layers, columns, labels = [0, 1], [Column("event", "token", lag) for lag in (-8, 0, 8, 16)], ["event"]
    splits = [planted_chains(n, seed, permuted) for seed, n in enumerate((150, 30, 150))]
    read = partial(stream, backbone=model, layers=layers, columns=columns, labels=labels, max_batch_tokens=3000)
    shards, census = deal([100] * len(splits[0]), 1, 3000), count_tokens(splits[0], columns, labels)
    memory = ActivationMemory(census.tokens, True, Sizes(2, 32, 4, 0, torch.float32), torch.device("cpu"))
    weight = (census.valid - census.positive) / census.positive
    sites = layer_sites(layers)
    adam = AdamSolver(sites, columns, 32, weight, learning_rate=1e-2, batch_size=256)
    newton = NewtonSolver(sites, columns, 32, weight, n_tokens=10_000)
    feed = Feed("layers", sites, 32, lambda batch: batch.acts, torch.arange(4))
    jobs = [Job(adam, BestProbes(adam.bank(), 3), feed), Job(newton, BestProbes(newton.bank(), None), feed)]
    trainer.train(
        jobs,
        memory,
        lambda number: Trip(shards, lambda batches: read(splits[0], batches=batches), number),
        lambda: read(splits[1]),
        tracker=Tracker([], [adam, newton]),
        save=lambda done: None,
        max_passes=5,
        batch_size=256,
        seed=0,
    )
    for scored in evaluate([(job.best.bank, feed) for job in jobs], read(splits[2])):
        auroc = measure(scored.scores, scored.targets, scored.valid)["auroc"]  # [L, K]
        if permuted:
            assert (auroc - 0.5).abs().max() < 0.05
        else:
            assert auroc[:, 2].min() > 0.99
            assert (auroc[:, [0, 3]] - 0.5).abs().max() < 0.05


def test_help_names_every_key_and_does_not_import_the_heavy_libraries():
    """Time depends on the machine; what it is spent on does not."""
    probe = (
        "import sys; sys.argv = ['run.py', '--help']\n"
        "from streamprobe.cli import train as main\n"
        "try: main()\nexcept SystemExit as stop: assert stop.code == 0\n"
        "heavy = {'torch', 'datasets', 'tensorboard', 'bitsandbytes', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    for name in ("--model", "--prompt", "--layers", "--lags", "--memory_gb", "--resume"):
        assert name in done.stdout
    print(f"--help took {time.perf_counter() - start:.1f} s")


def test_data_by_url_checked_against_its_digest(config, chains_file, monkeypatch, capsys):
    monkeypatch.setattr("datasets.config.DOWNLOADED_DATASETS_PATH", str(Path("downloads").resolve()))
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)  # this test serves its own network
    handler = partial(SimpleHTTPRequestHandler, directory=chains_file.parent)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/{chains_file.name}"
    digest = hashlib.sha256(chains_file.read_bytes()).hexdigest()
    assert main([config, "--data", url, "--data_sha256", digest, "--controls", "none", "--max_passes", "1"]) == 0
    assert main([config, "--data", url, "--data_sha256", "f" * 64]) == 2
    assert main([config, "--data", url + "x"]) == 2
    server.shutdown()
    errors = capsys.readouterr().err.splitlines()
    assert digest in errors[-2] and "f" * 64 in errors[-2] and url + "x" in errors[-1]


def test_memory_that_is_not_there_leaves_no_run_behind(config, monkeypatch, capsys):
    def fail(*_):
        raise MemoryError

    before = files()
    with monkeypatch.context() as patch:
        patch.setattr("streamprobe.run.pipeline.make_memories", fail)
        assert main([config, "--output_dir", "small"]) == 2 and "memory" in capsys.readouterr().err
    assert files() == before
    assert main([config, *SINGLE, "--output_dir", "small", "--max_passes", "1", "--max_batch_tokens", "256"]) == 0


def test_layers_by_name_are_compared_also_where_there_is_no_checkpoint_yet(config, capsys):
    none = ("--controls", "none")
    assert main([config, *none, "--layers", "0-1", "--max_passes", "1", "--output_dir", "run"]) == 0
    for path in [path for path in Path("run").rglob("*") if path.is_file() and path.name != "config.yaml"]:
        path.unlink()
    before = Path("run/config.yaml").read_bytes()
    capsys.readouterr()
    assert main([config, *none, "--layers", "1-2", "--resume", "--output_dir", "run"]) == 2
    assert "--resume with layers [1, 2]; expected [0, 1]" in capsys.readouterr().err
    assert Path("run/config.yaml").read_bytes() == before
    assert main([config, *none, "--layers", "0-1", "--max_passes", "1", "--resume", "--output_dir", "run"]) == 0


def test_the_time_that_is_printed_is_that_of_the_summary(config, capsys):
    assert main([config, *SINGLE]) == 0
    seconds = json.loads(Path("runs/tiny/summary.json").read_text())["run"]["seconds"]
    assert f"time      {seconds:,} s for 3 passes" in capsys.readouterr().out


def test_data_with_one_label_a_text_are_judged_by_texts_too(config, tmp_path, capsys):
    """And data with sections are not."""
    rows = json.loads(Path(yaml.safe_load(Path(config).read_text())["data"]).read_text())
    for number, row in enumerate(rows):
        label = "false" if number % 3 == 0 else "true"
        row["annotated_chain"] = f'["{label}"]{row["reasoning_chain"]}["end-section"]'
    (tmp_path / "pooled.json").write_text(json.dumps(rows))
    keys = ["--targets", "token", "--lags", "0", "4", "--controls", "embed", "position", "--bootstrap", "20"]
    assert main([config, "--data", str(tmp_path / "pooled.json"), "--labels", "false", *keys]) == 0
    printed = capsys.readouterr().out
    run = Path("runs") / Path(config).stem
    texts = list(csv.DictReader((run / "texts.csv").open()))
    assert len(texts) == 2 * (2 + 2) * 2 * 3 and {row["pooling"] for row in texts} == {"mean", "max", "last"}
    n, n_positive = (int(texts[0][name]) for name in ("n_texts", "n_positive"))
    assert n == 12 and 0 < n_positive < n
    assert f"whole texts   false, solver newton, lag +0: {n_positive} of {n} positive" in printed
    assert "Whole texts" in (run / "report.html").read_text() and "texts.csv" in printed
    assert main([config, *keys]) == 0
    assert "whole texts" not in capsys.readouterr().out and not (Path(f"{run}-2") / "texts.csv").exists()
