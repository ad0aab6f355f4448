"""What the tests share: a tiny model, made-up chains and a finished run.  Nothing here needs a network."""

import io
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is first imported, here and in programs that tests start

import pytest
import torch
from builders import make_rows, make_tokenizer
from hypothesis import settings

CACHE = tempfile.TemporaryDirectory(prefix="streamprobe-tests-")  # goes away with the process
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["HF_DATASETS_CACHE"] = CACHE.name  # read when `datasets` is first imported, which is after this file

settings.register_profile("streamprobe", database=None, deadline=None, derandomize=True)
settings.load_profile("streamprobe")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Matrices of this size are fastest, and sums always in the same order, in one thread."""
    torch.set_num_threads(1)


def hide_pictures(patch: pytest.MonkeyPatch) -> None:
    """Every chart is a blank one."""
    from PIL import Image

    from streamprobe.reporting.tracking.images import Picture

    png = io.BytesIO()
    Image.new("RGB", (1, 1)).save(png, "PNG")
    blank = Picture(png.getvalue(), 1, 1)
    for name in ("lag_curves", "lift_curve", "metric_map"):
        patch.setattr(f"streamprobe.reporting.html.page.{name}", lambda *_, **__: "<svg></svg>")
    patch.setattr("streamprobe.reporting.tracking.metric_grid.draw", lambda *_: blank)


@pytest.fixture(scope="module")
def undrawn() -> Iterator[pytest.MonkeyPatch]:
    """For modules whose tests look at no picture: to draw them takes most of the time of a small run."""
    with pytest.MonkeyPatch.context() as patch:
        hide_pictures(patch)
        yield patch


@pytest.fixture
def drawn(undrawn: pytest.MonkeyPatch) -> Iterator[None]:
    """For a test in such a module that does look at pictures."""
    undrawn.undo()
    yield
    hide_pictures(undrawn)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """The tiny tokenizer; it puts <s> in front of a text by itself, as Llama's does."""
    return make_tokenizer()


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> str:
    """A folder with a tiny random Llama (4 blocks, hidden size 32, float32) and the tiny tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = str(tmp_path_factory.mktemp("model"))
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,  # with the usual 0.02 a token hardly hears of the others in so small a model
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).float().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def chains_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSON list of 60 made-up annotated chains."""
    path = tmp_path_factory.mktemp("data") / "chains.json"
    path.write_text(json.dumps(make_rows(60, seed=7)), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def bank() -> Any:
    """Random probes of the tiny model: layers 0, 1 and 2, two targets, lags -2, 0 and 4."""
    from streamprobe.lags import make_columns
    from streamprobe.probes.linear import ProbeBank
    from streamprobe.probes.sites import layer_sites

    columns = make_columns(["backtracking"], ["token", "onset"], [-2, 0, 4])
    random = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(3, 6, 32, generator=random) / 4, torch.randn(3, 6, generator=random)
    threshold = torch.zeros(3, 6, dtype=torch.float64)
    return ProbeBank(layer_sites([0, 1, 2]), columns, weight, bias, threshold, "newton")


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory, model_dir: str, chains_file: Path, bank: Any) -> Path:
    """The folder of a finished run with these probes: config.yaml, probes.safetensors and results.csv."""
    import yaml

    from streamprobe.evaluation.rows import FIELDS
    from streamprobe.probes.storage import pack_probes
    from streamprobe.reporting.files import pack_rows
    from streamprobe.system.privacy import for_others

    folder = tmp_path_factory.mktemp("runs") / "tiny"
    folder.mkdir()
    keys = {
        "model": model_dir,
        "dtype": "float32",
        "data": str(chains_file),
        "layers": bank.layers,
        "lags": [-2, 0, 4],
        "targets": ["token", "onset"],
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(keys))
    (folder / "probes.safetensors").write_bytes(pack_probes({"newton": bank}, {"config": for_others(keys)}))
    rows = [
        dict.fromkeys(FIELDS, 0.0)
        | {
            "solver": "newton",
            "kind": "linear",
            "site": "resid_post",
            "layer": layer,
            "label": c.label,
            "target": c.target,
            "lag": c.lag,
            "control": "",
            "auroc": (0.6, 0.9, 0.7)[layer],
            "auroc_low": 0.5,
            "auroc_high": 1.0,
        }
        for layer in bank.layers
        for c in bank.columns
    ]
    (folder / "results.csv").write_bytes(pack_rows(rows, FIELDS))
    return folder
