"""Each config for a model on the hub, run on a model like it: its architecture, depth and kind of tokenizer, but tiny."""

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from builders import inputs_of, make_record, make_rows
from hub_models import MODELS, save_like

from streamprobe.cli import train as main
from streamprobe.config.load import load_config
from streamprobe.data.prompts import special_ids
from streamprobe.data.tokenize import render, tokenize
from streamprobe.model import served
from streamprobe.model.backbone import load_backbone
from streamprobe.model.blocks import decoder_layers, depth
from streamprobe.model.loading import read_config
from streamprobe.model.tokenizer import load_tokenizer
from streamprobe.system.shipped import shipped_configs

pytestmark = pytest.mark.usefixtures("undrawn")
CONFIGS = {
    "llama-3.1-8b": "meta-llama/Llama-3.1-8B",
    "llama-3.1-70b-4bit": "meta-llama/Llama-3.1-70B",
    "deepseek-r1-distill-llama-8b": "deepseek-ai/DeepSeek-R1-Distill-Llama-8B",
    "qwen3-8b": "Qwen/Qwen3-8B",
    "gemma-3-4b": "google/gemma-3-4b-it",
}
OTHERS = ["demo", "llama-3.1-8b-as-published", "smollm2-135m"]
ODD = "hmm\u2192\u00e9\U0001f642"  # letters of two, three and four bytes, of which no token holds a whole one


@pytest.fixture(scope="module", params=CONFIGS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(name: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a model like the one that the config names."""
    return save_like(CONFIGS[name], tmp_path_factory.mktemp(name))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Chains with odd letters, in a file of their own."""
    path = tmp_path_factory.mktemp("data") / "chains.json"
    rows = [{key: text.replace("hmm", ODD) for key, text in row.items()} for row in make_rows(30, seed=7)]
    path.write_text(json.dumps(rows), encoding="utf-8")
    return str(path)


def argv_of(name: str, model: str, data: str) -> list[str]:
    keys = "--max_passes 1 --bootstrap 10 --lags 0 4".split()
    return [name, "--model", model, "--data", data, "--data_sha256", "", *keys]


def test_every_shipped_config_is_tried_here_or_elsewhere():
    assert sorted(shipped_configs()) == sorted([*CONFIGS, *OTHERS])


def test_a_config_is_for_the_same_data_at_the_same_depths(name):
    """As the first one; and it says which model, and how it is launched."""
    first, config = load_config(["llama-3.1-8b"]), load_config([name])
    assert config.model.model == CONFIGS[name] and config.model.device_map == "auto"
    assert config.model.quantization == ("4bit" if "4bit" in name else "none")
    assert config.data == first.data and config.training == first.training
    assert (config.probes.lags, config.probes.labels, config.probes.targets) == (
        first.probes.lags,
        first.probes.labels,
        first.probes.targets,
    )
    blocks = MODELS[CONFIGS[name]].blocks
    layers = zip(config.probes.layers, first.probes.layers, strict=True)
    assert all(abs(int(layer) / blocks - int(other) / 32) < 1 / blocks for layer, other in layers)
    text = shipped_configs()[name].read_text(encoding="utf-8")
    assert text.startswith(f"# streamprobe train {name}   (from a checkout: python run.py configs/{name}.yaml)\n")


def test_a_run_of_the_config_reads_its_layers(name, model, data, tmp_path, monkeypatch):
    loaded: list[Any] = []

    def load(*given: Any, **options: Any) -> Any:
        loaded.append(load_backbone(*given, **options))
        return loaded[-1]

    monkeypatch.setattr(served, "load_backbone", load)
    assert main([*argv_of(name, model, data), "--output_dir", str(tmp_path / "run")]) == 0
    layers = [int(layer) for layer in yaml.safe_load(shipped_configs()[name].read_text(encoding="utf-8"))["layers"]]
    rows = list(csv.DictReader((tmp_path / "run/results.csv").open()))
    assert {int(row["layer"]) for row in rows if not row["control"]} == set(layers)
    assert {int(row["lag"]) for row in rows} == {0, 4} and {row["target"] for row in rows} == {"token", "onset"}
    assert all(0 <= float(row["auroc"]) <= 1 for row in rows)
    blocks = decoder_layers(loaded[0])
    assert len(blocks) == max(layers) + 1 < depth(read_config(model)) == MODELS[CONFIGS[name]].blocks
    matrices = [type(m).__name__ for block in blocks for m in block.modules() if "Linear" in type(m).__name__]
    assert set(matrices) == {"Linear4bit" if "4bit" in name else "Linear"} and len(matrices) == 7 * len(blocks)


def faults(text: str, ids: list[int], offsets: list[tuple[int, int]], tokenizer: Any, bos: str | None) -> list[str]:
    """What is wrong with the tokens of a text and the characters that each is said to cover."""
    found, begin = [], [tokenizer.convert_tokens_to_ids(bos)] if bos else []
    if ids[: len(begin)] != begin or begin and begin[0] in ids[1:]:
        found.append("BOS")
    read = list(zip(ids, offsets, strict=True))[len(begin) :]
    if tokenizer.decode([i for i, _ in read], clean_up_tokenization_spaces=False) != text:
        found.append("text")
    covered = {place for _, (start, end) in read for place in range(start, end)}
    if covered != set(range(len(text))) or any(start >= end for _, (start, end) in read):
        found.append("cover")
    for token, (start, end) in read:
        alone = tokenizer.decode([token], clean_up_tokenization_spaces=False)
        if alone != text[start:end] and (text[start:end].isascii() or end - start > 1):
            found.append(f"{alone!r} for {text[start:end]!r}")
    return found


def test_the_tokens_that_are_fed_are_those_of_the_text(name, model, data):
    inputs, tokenizer = inputs_of(argv_of(name, model, data)), load_tokenizer(model)
    bos = MODELS[CONFIGS[name]].bos
    rows = {row["task_id"]: row for row in json.loads(Path(data).read_text(encoding="utf-8"))}
    special, seen = special_ids(tokenizer), 0
    for chain in inputs.dataset.chains():
        row = rows[chain.id]
        record = make_record(row["problem"], row["reasoning_chain"])
        rendered = render(record, tokenizer)
        assert rendered.text == f"{row['problem']}\n\n{row['reasoning_chain']}" and chain.ids.tolist() == rendered.ids
        assert faults(rendered.text, rendered.ids, rendered.offsets, tokenizer, bos) == []
        assert not special & set(chain.ids[chain.support].tolist())
        head, *_ = (~chain.support).cummin(0).values.sum(0, keepdim=True).tolist()
        assert chain.support[head:].all() and head == chain.start > 1  # nothing but the problem is left out
        assert tokenizer.decode(chain.ids[head:], clean_up_tokenization_spaces=False) == row["reasoning_chain"]
        seen += ODD in row["reasoning_chain"]
    assert seen > 5


def test_special_tokens_in_a_text_are_no_samples(name, model):
    tokenizer = load_tokenizer(model)
    chain = tokenize(make_record("one", f"two {tokenizer.eos_token} one"), tokenizer, ["x"])
    (place,) = (chain.ids == tokenizer.eos_token_id).nonzero()[:, 0].tolist()
    assert not chain.support[place] and chain.support[place - 1] and chain.support[place + 1]


def test_tokens_for_thinking_are_text(tmp_path):
    """They are added to the vocabulary, and not special."""
    tokenizer = load_tokenizer(save_like(CONFIGS["deepseek-r1-distill-llama-8b"], tmp_path))
    chain = tokenize(make_record("one", "<think> two</think> one"), tokenizer, ["x"])
    for mark in ("<think>", "</think>"):
        (place,) = (chain.ids == tokenizer.convert_tokens_to_ids(mark)).nonzero()[:, 0].tolist()
        assert chain.support[place]


def test_the_check_of_tokens_fails_without_the_tokenizer_of_the_files(tmp_path):
    """Another class than the files describe, as their own settings name it."""
    from transformers import LlamaTokenizer

    folder = save_like(CONFIGS["deepseek-r1-distill-llama-8b"], tmp_path)
    text, bos = "one two\n\nthree", MODELS[CONFIGS["deepseek-r1-distill-llama-8b"]].bos
    for tokenizer, right in ((load_tokenizer(folder), True), (LlamaTokenizer.from_pretrained(folder), False)):
        encoded = tokenizer(text, return_offsets_mapping=True)
        found = faults(text, encoded["input_ids"], encoded["offset_mapping"], tokenizer, bos)
        assert found == [] if right else "text" in found


def test_a_config_that_is_quantized_says_so_in_its_name():
    for config, path in shipped_configs().items():
        quantization = re.search(r"^quantization: (\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
        assert (quantization is not None) == config.endswith("bit")
