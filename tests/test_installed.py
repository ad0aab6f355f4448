"""What a wheel must hold; that it works alone, in an empty folder, is a step of `.ci/run`."""

from configparser import ConfigParser
from fnmatch import fnmatch
from pathlib import Path

from streamprobe.cli import main
from streamprobe.demo import CHAINS, MODEL
from streamprobe.system.shipped import shipped_configs, shipped_path

ROOT = Path(__file__).parents[1]
SETUP = ConfigParser()
SETUP.read(ROOT / "setup.cfg", encoding="utf-8")
PACKAGES = SETUP["options"]["packages"].split()
DATA = {package: patterns.split() for package, patterns in SETUP["options.package_data"].items()}


def left_out(files, packages, data):
    """The files of the package that no wheel would hold."""
    folders = {package.replace(".", "/"): data.get(package, []) for package in packages}

    def held(path):
        parents = [(str(parent), str(path.relative_to(parent))) for parent in path.parents if str(parent) in folders]
        code = path.suffix == ".py" and str(path.parent) in folders
        return code or any(fnmatch(name, pattern) for parent, name in parents for pattern in folders[parent])

    return {str(path) for path in files if not held(path)}


def files_of_the_package():
    every = [path.relative_to(ROOT) for path in (ROOT / "streamprobe").rglob("*") if path.is_file()]
    return [path for path in every if "__pycache__" not in path.parts]


def test_a_wheel_holds_every_file_of_the_package():
    assert len(files_of_the_package()) > 90 and left_out(files_of_the_package(), PACKAGES, DATA) == set()


def test_a_wheel_fails_without_a_room_or_its_data():
    fewer = [package for package in PACKAGES if package != "streamprobe.tools"]
    assert "streamprobe/tools/watch.py" in left_out(files_of_the_package(), fewer, DATA)
    assert "streamprobe/demo/chains.json" in left_out(files_of_the_package(), PACKAGES, {})


def test_a_wheel_holds_the_configs():
    assert SETUP["options"]["package_dir"].split() == ["streamprobe.configs", "=", "configs"]
    assert "streamprobe.configs" in PACKAGES and DATA["streamprobe.configs"] == ["*.yaml"]


def test_what_is_shipped_is_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Path(shipped_path("streamprobe/demo/model")) == MODEL.resolve() and (MODEL / "config.json").is_file()
    assert Path(shipped_path("streamprobe/demo/chains.json")) == CHAINS.resolve() and CHAINS.is_file()
    assert shipped_path("streamprobe/other") == "streamprobe/other" and shipped_path("user/name") == "user/name"
    assert shipped_configs()["demo"] == ROOT / "configs/demo.yaml"
    assert shipped_configs().keys() >= {"deepseek-r1-distill-llama-8b", "gemma-3-4b", "llama-3.1-70b-4bit", "qwen3-8b"}


def test_a_run_of_the_demo_is_launched_watched_and_steered_in_any_folder(tmp_path, monkeypatch, capsys):
    """And its config names nothing of the machine that it ran on."""
    keys = ["--max_chains", "60", "--layers", "1", "--lags", "0", "--max_passes", "1", "--bootstrap", "0"]
    (tmp_path / "one").mkdir()
    monkeypatch.chdir(tmp_path / "one")
    assert main(["demo", *keys, "--controls", "none"]) == 0
    config = Path("runs/demo/config.yaml").read_text(encoding="utf-8")
    assert "model: streamprobe/demo/model\n" in config and str(ROOT) not in config
    (tmp_path / "two").mkdir()
    monkeypatch.chdir(tmp_path / "two")
    run = ["../one/runs/demo", "--max_new_tokens", "3"]
    assert main(["watch", *run, "--prompt", "reach 27 with 15 13 14 ?"]) == 0
    assert main(["steer", *run, "--problems", "1", "--strengths", "0"]) == 0
    assert main(["report", "../one/runs/demo"]) == 0
    resumed = ["demo", *keys, "--controls", "none", "--output_dir", "../one/runs/demo", "--resume", "--max_passes", "2"]
    assert main(resumed) == 0, capsys.readouterr().err
