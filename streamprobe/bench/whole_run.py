"""A whole run of the shape that users launch, from its files to its files: the row of the bench that counts.

Two targets, all controls, metrics, intervals and every file, as `streamprobe train` does it; only the model's weights
are random, and its texts are words in random order.
"""

import io
import json
from collections.abc import Sequence
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import yaml
from torch import nn

from streamprobe.activations.stream import forward, make_batches
from streamprobe.bench.shapes import Shape
from streamprobe.bench.synthetic import BASE_RATE, LAGS, SECTION, SEED, draw_length, make_model
from streamprobe.bench.timings import Ledger
from streamprobe.config.load import load_config
from streamprobe.data.tokenize import Chain
from streamprobe.model.tokenizer import load_tokenizer
from streamprobe.run.inputs import chains_of, read_texts
from streamprobe.run.pipeline import run_in
from streamprobe.system.csv_files import read_csv

TOKENIZER = "streamprobe/demo/model"  # of whose words the texts are made
LABEL, OTHER = "backtracking", "deduction"
BARE = "bare forward over all chains of a whole run"
LEAST_CHAINS = 20  # so that every split has sections
WHOLE = "whole run: two targets, all controls, metrics, intervals and files"


def measure_whole_run(
    shape: Shape, ledger: Ledger, n_chains: int, *, max_batch_tokens: int, repeats: int
) -> dict[str, Any]:
    """Times whole runs in folders of their own, and the bare forward of their chains in turn.

    Returns what one of the runs was: its chains, tokens, probes and passes.
    """
    with TemporaryDirectory() as name:
        folder = Path(name)
        model = make_model(shape, max(shape.layers) + 1, ledger.device)
        write_model(model, folder / "model")
        (folder / "chains.json").write_text(json.dumps(make_texts(max(n_chains, LEAST_CHAINS))))
        config = load_config([str(write_config(shape, folder, max_batch_tokens))])
        with redirect_stdout(io.StringIO()):
            texts, settled = read_texts(config)
            chains = chains_of(settled, texts).chains()
        for number in range(repeats):
            (run := folder / f"run{number}").mkdir()
            ledger.time(BARE, partial(read_all, model, chains, max_batch_tokens))
            with redirect_stdout(io.StringIO()):
                ledger.time(WHOLE, partial(run_in, run, config))
        passes = json.loads((run / "summary.json").read_text())["run"]["passes"]
        n_probes = len(read_csv(run / "results.csv", ["auroc"]))
    known = {"chains": len(chains), "tokens": sum(len(chain.ids) for chain in chains)}
    return known | {"probes": n_probes, "passes": passes}


def write_model(model: Any, folder: Path) -> None:
    """Saves the model with a tokenizer whose words it knows."""
    model.save_pretrained(folder)
    load_tokenizer(TOKENIZER).save_pretrained(folder)


def write_config(shape: Shape, folder: Path, max_batch_tokens: int) -> Path:
    """The config of a run of this model over these chains."""
    keys = {
        "model": str(folder / "model"),
        "dtype": shape.dtype,
        "max_batch_tokens": max_batch_tokens,
        "data": str(folder / "chains.json"),
        "labels": [LABEL],
        "targets": ["token", "onset"],
        "layers": list(shape.layers),
        "lags": LAGS,
    }
    path = folder / "whole.yaml"
    path.write_text(yaml.safe_dump(keys))
    return path


def make_texts(n: int) -> list[dict[str, str]]:
    """Annotated chains of random words, each with a section or more at random places."""
    random, tokenizer = np.random.default_rng(SEED), load_tokenizer(TOKENIZER)
    words = np.array(sorted(set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens)))
    rows = []
    for i in range(n):
        text = words[random.integers(len(words), size=draw_length(random))].tolist()
        drawn = (random.random(len(text)) < BASE_RATE / SECTION).nonzero()[0].tolist()
        begins = sorted({int(random.integers(len(text))), *drawn})  # no chain is without one
        rows.append(
            {
                "id": str(i),
                "problem": " ".join(words[random.integers(len(words), size=8)].tolist()),
                "response": " ".join(text),
                "annotated_response": annotate(text, begins),
            }
        )
    return rows


def annotate(words: Sequence[str], begins: Sequence[int]) -> str:
    """The words with a section of SECTION of them at each of these places that the one before leaves free.

    The others are sections of another label: text in none would be left out.
    """
    parts, end = [], 0
    for begin in begins:
        if begin >= end:
            stop = min(begin + SECTION, len(words))
            parts += [(OTHER, words[end:begin]), (LABEL, words[begin:stop])]
            end = stop
    parts.append((OTHER, words[end:]))
    return " ".join(f'["{label}"]{" ".join(own)}["end-section"]' for label, own in parts if own)


def read_all(model: nn.Module, chains: Sequence[Chain], max_batch_tokens: int) -> None:
    """The chains through the model, and nothing else."""
    for batch in make_batches([len(chain.ids) for chain in chains], max_batch_tokens):
        forward(model, [chains[i].ids for i in batch])
