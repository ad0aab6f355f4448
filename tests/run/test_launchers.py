"""The launchers that people use start the same run: torchrun, accelerate, ranks that are started anew, and two nodes."""

import csv
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from launched import free_port

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


@pytest.fixture
def config(tmp_path: Path, model_dir: str, chains_file: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    keys = {
        "model": model_dir,
        "data": str(chains_file),
        "max_chains": 40,
        "dtype": "float32",
        "layers": [0, 2],
        "lags": [0, 4],
        "labels": ["backtracking"],
        "max_passes": 2,
        "controls": ["position"],
        "bootstrap": 10,
        "report_to": ["none"],
    }
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(yaml.safe_dump(keys))
    return "tiny.yaml"


def start(
    *words: object, script: object = ROOT / "run.py", before: tuple[str, ...] = (), folder: str = "."
) -> "subprocess.Popen[str]":
    """A launcher of this environment at work on a script, in a folder."""
    launcher, *options = map(str, words)
    at = options.index("SCRIPT")
    options[at] = str(script)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [*before, str(BIN / launcher), *options]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, **pipes, text=True, env=environment, cwd=folder)


def ended(process: "subprocess.Popen[str]") -> tuple[int, str, str]:
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def results(folder: str) -> list[dict[str, str]]:
    return list(csv.DictReader(Path(folder, "results.csv").open()))


@pytest.fixture
def straight(config: str) -> list[dict[str, str]]:
    """The results of one process, without a launcher."""
    status, _, err = ended(start("python", "SCRIPT", config, "--output_dir", "straight"))
    assert status == 0, err
    return results("straight")


def test_torchrun_and_accelerate_start_the_same_run(config: str, straight: list[dict[str, str]]) -> None:
    launchers = {
        "torchrun": ["torchrun", "--nproc-per-node", 2, "--master-port"],
        "accelerate": ["accelerate", "launch", "--multi_gpu", "--num_processes", 2, "--main_process_port"],
    }
    for name, words in launchers.items():
        status, out, err = ended(start(*words, free_port(), "SCRIPT", config, "--output_dir", name))
        assert status == 0, err
        assert out.count("verdict") == 1 and results(name) == straight
    assert Path("torchrun/probes.safetensors").read_bytes() == Path("accelerate/probes.safetensors").read_bytes()


def test_ranks_that_torchrun_starts_anew_go_on(config: str, straight: list[dict[str, str]]) -> None:
    dying = """
import os, signal, sys
from streamprobe.cli import train
from streamprobe.run.pipeline import PassEnd
end = PassEnd.__call__
def deadly(self, done):
    self.checkpoints.seconds = 0.0
    end(self, done)
    self.checkpoints.wait()
    if done.passes == 1 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
PassEnd.__call__ = deadly
sys.exit(train())
"""
    Path("dying.py").write_text(dying)
    words = ["torchrun", "--nproc-per-node", 2, "--max-restarts", 1, "--master-port", free_port(), "SCRIPT", config]
    status, out, err = ended(start(*words, "--output_dir", "run", script="dying.py"))
    assert status == 0, err
    assert "resumed   after pass 1" in out and results("run") == straight
    assert err.count("streamprobe: rank 1 on ") == 1


# --- two nodes ---


def network(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def nodes() -> Iterator[list[tuple[str, str]]]:
    """Two network namespaces with addresses of their own, joined by a cable: as many machines, for a network's eyes."""
    names = [f"sp{os.getpid()}{letter}" for letter in "ab"]
    try:
        for name in names:
            network("netns", "add", name)
        network("link", "add", names[0], "netns", names[0], "type", "veth", "peer", "name", names[1], "netns", names[1])
        for number, name in enumerate(names):
            network("-n", name, "addr", "add", f"10.77.0.{number + 1}/24", "dev", name)
            network("-n", name, "link", "set", name, "up")
            network("-n", name, "link", "set", "lo", "up")
        yield [(name, f"10.77.0.{number + 1}") for number, name in enumerate(names)]
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no network namespaces here: {getattr(error, 'stderr', b'') or error}")
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def test_two_nodes_work_on_one_run(config: str, straight: list[dict[str, str]], nodes: list[tuple[str, str]]) -> None:
    (_, address), _ = nodes
    runs = []
    for number, (name, _) in enumerate(nodes):
        disk = Path(f"disk{number}")  # each node has one of its own
        disk.mkdir()
        (disk / config).write_bytes(Path(config).read_bytes())
        words = ["torchrun", "--nnodes", 2, "--node-rank", number, "--nproc-per-node", 1, "--master-addr", address]
        words += ["--master-port", 29_511, "SCRIPT", config, "--output_dir", "run"]
        before = ("env", f"GLOO_SOCKET_IFNAME={name}", "ip", "netns", "exec", name)
        runs.append(start(*words, before=before, folder=str(disk)))
    for process in runs:
        status, _, err = ended(process)
        assert status == 0, err
    assert results("disk0/run") == straight
    assert os.listdir("disk1") == [config]  # rank 0 alone writes
