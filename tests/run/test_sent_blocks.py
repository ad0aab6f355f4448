"""A run whose model does not all fit on its device ends as one whose model does."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from sent_weights import accelerate_plans

from streamprobe import cli

pytestmark = pytest.mark.usefixtures("undrawn")
PLACES = ("embed_tokens", "norm", "rotary_emb", "layers.0", "layers.1", "layers.2")
KEYS = {
    "dtype": "float32",
    "layers": [0, 2],
    "lags": [0, 4],
    "max_passes": 1,
    "max_chains": 40,
    "max_batch_tokens": 512,
    "bootstrap": 10,
    "memory_gb": 0.0034,  # the model reads in every pass
}


@pytest.fixture
def config(tmp_path: Path, model_dir: str, chains_file: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(yaml.safe_dump({**KEYS, "model": model_dir, "data": str(chains_file)}))
    return "tiny.yaml"


def blocks_line(printed: str) -> str:
    """What the run says of where the blocks lie."""
    return "".join(line for line in printed.splitlines() if line.startswith("model     blocks"))


@pytest.mark.parametrize("in_ram", [["layers.1", "layers.2"], ["embed_tokens"]], ids=str)
def test_a_run_ends_as_with_all_blocks_on_the_device(config: str, in_ram: list[str], capsys: Any) -> None:
    assert cli.train([config, "--output_dir", "near"]) == 0
    assert blocks_line(capsys.readouterr().out) == ""  # negative control: all on one device
    with accelerate_plans(dict.fromkeys(PLACES, "cpu:0") | dict.fromkeys(in_ram, "cpu")) as sent:
        assert cli.train([config, "--output_dir", "sent"]) == 0
        assert blocks_line(capsys.readouterr().out) == (
            "model     blocks 0 on cpu, 1-2 on cpu (sent to cpu for each batch)"
            if "layers.1" in in_ram
            else "model     blocks 0-2 on cpu"
        )
        if "layers.1" in in_ram:
            assert cli.main(["evaluate", "sent", "--data", config_of("sent")["data"], "--out", "again"]) == 0
    assert sent.alive() == 0 < len(sent.copies)
    for name in ("results.csv", "probes.safetensors", "controls.safetensors"):
        assert tensors_of(Path("near", name)) == tensors_of(Path("sent", name))
    assert len(fingerprint_of("near")) == 1 and fingerprint_of("near") == fingerprint_of("sent")


def tensors_of(path: Path) -> Any:
    """The bytes of a file without the folder that its run wrote to, which its header names."""
    return path.read_bytes().replace(b"sent", b"near")


def config_of(run: str) -> dict[str, Any]:
    return yaml.safe_load(Path(run, "config.yaml").read_text())


def fingerprint_of(run: str) -> list[str]:
    return [line for line in Path(run, "config.yaml").read_text().splitlines() if "model_fingerprint" in line]
