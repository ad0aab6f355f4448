"""The one command line: what `--help` shows can be run, and what is wrong ends in one line."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import streamprobe
from streamprobe import cli
from streamprobe.config.load import load_config
from streamprobe.run import pipeline

ROOT = Path(__file__).parents[1]
NAMES = [*cli.TRAINING, *cli.COMMANDS]


def printed(capsys, argv, status=2):
    """Runs the command line; returns what it printed where that is as it should be."""
    assert cli.main(argv) == status
    said = capsys.readouterr()
    if status == 0:
        assert not said.err
        return said.out
    assert said.err.startswith("streamprobe: ") and said.err.count("\n") == 1 and not said.out
    assert "; expected " in said.err and "; fix: " in said.err
    return said.err


def example_of(text):
    """The words of the example in a help text, without the command's name."""
    words = shlex.split(text.split("example:")[1])
    assert words[0] == "streamprobe"
    return words[1:]


# --- help ---


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"]])
def test_the_overview_has_a_line_for_each_command(capsys, argv):
    lines = printed(capsys, argv, 0).splitlines()
    for name in NAMES:
        assert len([line for line in lines if line.startswith(f"  {name} ") and len(line) < 120]) >= 1


@pytest.mark.parametrize("name", NAMES)
def test_the_help_of_a_command_has_an_example_that_parses(capsys, name):
    text = printed(capsys, [*name.split(), "--help"], 0)
    words = example_of(text)
    assert words[: len(name.split())] == name.split()
    rest = words[len(name.split()) :]
    if name in cli.TRAINING:
        assert load_config(rest if name == "train" else ["demo", *rest]).probes.lags == [0, 8, 24]
    else:
        given = cli.parse(name, rest)
        assert not cli.COMMANDS[name].takes_keys or load_config(given.keys)
        assert cli.COMMANDS[name].about in text


def test_an_example_fails_without_options_that_exist(capsys):
    for name, command in cli.COMMANDS.items():
        said = printed(capsys, [*name.split(), *shlex.split(command.example), "--nothing"])
        assert ("unknown key 'nothing'" if command.takes_keys else "--nothing") in said


def test_help_of_every_command_needs_no_torch():
    script = """
import contextlib, io, sys
from streamprobe import cli
for name in [*cli.TRAINING, *cli.COMMANDS]:
    with contextlib.redirect_stdout(io.StringIO()):
        assert cli.main([*name.split(), "--help"]) == 0
assert cli.main(["--version"]) == cli.main(["configs"]) == 0
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    loaded = "import sys; from streamprobe.run import opened; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", loaded], cwd=ROOT, check=True)  # what the commands import does need it


def test_the_version(capsys):
    assert printed(capsys, ["--version"], 0) == f"streamprobe {streamprobe.__version__}\n"


def test_the_module_is_the_command():
    ran = subprocess.run([sys.executable, "-m", "streamprobe", "--version"], cwd=ROOT, capture_output=True, text=True)
    assert ran.stdout == f"streamprobe {streamprobe.__version__}\n" and ran.returncode == 0


# --- training ---


@pytest.fixture
def ran(monkeypatch, tmp_path):
    """The configs of the runs that were launched, of which none is carried out; the working directory is empty."""
    configs = []
    monkeypatch.setattr(pipeline, "run", configs.append)
    monkeypatch.chdir(tmp_path)
    return configs


def test_train_is_run_py(ran):
    keys = ["--layers", "1", "--lags", "0", "2"]
    Path("own.yaml").write_text(yaml.safe_dump({"model": "m", "data": "d.json"}))
    for argv in ([], keys, ["demo", *keys], ["llama-3.1-8b", *keys], ["own.yaml", *keys]):
        assert cli.main(["train", *argv]) == cli.train(argv) == 0
        assert ran[-1] == ran[-2]
    assert len({config.name for config in ran}) == 3


def test_the_demo_is_the_shipped_config_whatever_lies_here(ran, capsys):
    Path("demo").write_text(yaml.safe_dump({"model": "m", "data": "d.json"}))
    assert cli.main(["demo", "--max_passes", "3"]) == 0
    assert ran[0].model.model == "streamprobe/demo/model" and ran[0].training.max_passes == 3
    assert ran[0].name == "demo" and ran[0].probes == load_config([str(ROOT / "configs/demo.yaml")]).probes
    assert "streamprobe train own.yaml" in printed(capsys, ["demo", "own.yaml"])


def test_every_shipped_config_is_listed_and_can_be_launched_by_its_name(ran, capsys):
    listed = printed(capsys, ["configs"], 0)
    paths = sorted((ROOT / "configs").glob("*.yaml"))
    assert len(paths) >= 8
    for path in paths:
        name, about, launch, where = listed[listed.index(f"{path.stem}\n") :].splitlines()[:4]
        assert where.strip() == str(path) and len(about.strip()) > 20
        assert launch.strip().startswith(f"streamprobe train {name} ") and launch.endswith(f"configs/{path.name})")
        assert cli.main(["train", name]) == 0 and ran[-1].name == name


# --- what is wrong ---


@pytest.mark.parametrize(
    "argv, said",
    [
        (["wacth", "runs/demo"], "unknown command 'wacth'; expected watch, the nearest command"),
        (["trian"], "expected train"),
        (["configs/demo.yaml"], "unknown command"),
        (
            ["xyz"],
            "expected one of train, demo, preview, score, evaluate, watch, steer, report, compare, push, bench, "
            "bench watching, bench processes, bench streams, configs",
        ),
        (["--nothing"], "unknown command '--nothing'"),
        (["train", "--layer", "1"], "--layers, the nearest key"),
        (["train", "--layers", "one"], "--layers"),
        (["train", "gone.yaml"], "gone.yaml, which is no file"),
        (["train", "--layers", "1", "x.yaml"], "fix: streamprobe train x.yaml ..."),
        (["demo", "--seeds", "0"], "seeds 0"),
        (["preview", "gone"], "gone, which is no file"),
        (["preview", "demo", "--layer", "1"], "--layers, the nearest key"),
        (["preview", "demo", "--chains", "3"], "chains 3 without a page; expected --html FILE"),
        (["preview", "--html", "x.html", "--chains", "0"], "chains 0; expected at least 1"),
        (["preview", "--html", "gone/x.html"], "html gone/x.html, which cannot be written"),
        (["preview", "--html", "."], "html ., which cannot be written"),
        (["preview", "--html", "x.html", "--labels", "waiting"], "label 'waiting', which never occurs"),
        (["preview", "--html"], "argument --html: expected one argument"),
        (["score"], "RUN, TEXTS"),
        (["score", "gone", "texts.json"], "gone, which is no folder"),
        (["evaluate"], "RUN"),
        (["evaluate", "gone"], "nothing to judge on"),
        (["evaluate", "gone", "--split", "test"], "gone, which is no folder"),
        (["evaluate", "gone", "--split", "train"], "--split"),
        (["watch"], "RUN"),
        (["watch", "gone", "--prompt", "x"], "gone, which is no folder"),
        (["watch", "gone", "--prompt", "x", "--top_p", "2"], "top_p 2.0"),
        (["steer"], "RUN"),
        (["steer", "gone"], "gone, which is no folder"),
        (["report"], "RUN"),
        (["report", "gone"], "gone, which is no folder"),
        (["report", "a", "b"], "unrecognized arguments: b"),
        (["push", "gone"], "USER/NAME"),
        (["push", "gone", "a/b"], "gone, which holds no results.csv"),
        (["bench", "--repeats", "0"], "repeats 0"),
        (["bench", "writing"], "unrecognized arguments: writing"),
        (["bench", "watching", "--rounds", "0"], "rounds 0"),
        (["bench", "watching", "--chains", "3"], "--chains"),
        (["configs", "demo"], "unrecognized arguments: demo"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_the_user_got_wrong_is_one_line(capsys, monkeypatch, tmp_path, argv, said):
    monkeypatch.chdir(tmp_path)
    assert said in printed(capsys, argv)


def test_watching_and_steering_write_over_no_file_of_the_run(run_folder, capsys):
    before = (run_folder / "config.yaml").read_bytes()
    for argv in (["watch", str(run_folder), "--prompt", "x", "--html"], ["steer", str(run_folder), "--json"]):
        assert cli.main([*argv, str(run_folder / "config.yaml")]) == 2
        assert "which is a file of the run; expected another file" in capsys.readouterr().err
    assert (run_folder / "config.yaml").read_bytes() == before
