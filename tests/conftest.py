"""What the tests share: made-up annotated chains, a tiny tokenizer and a tiny model.  Nothing here needs a network."""

import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings

CACHE = tempfile.TemporaryDirectory(prefix="streamprobe-tests-")  # goes away with the process
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["HF_DATASETS_CACHE"] = CACHE.name  # read when `datasets` is first imported, which is after this file

settings.register_profile("streamprobe", database=None, deadline=None, derandomize=True)
settings.load_profile("streamprobe")

CATEGORIES = ("alpha", "beta", "gamma", "delta")
COMMON = "the a of to is in and each one two three four five six box stone door card number side row".split()
WORDS = {
    "initializing": "okay so puzzle asks given find question begin goal need told start".split(),
    "deduction": "then therefore since follows hence must equals gives total leaves adds means".split(),
    "backtracking": "wait no actually hmm but wrong again rather mistake instead undo reconsider".split(),
}


def make_rows(n: int, seed: int = 0) -> list[dict[str, str]]:
    """`n` annotated chains of 40 to 90 made-up words, each with at least one backtracking section at a random place.

    The first section is initializing and the others deduction, where they are not backtracking.  Words of the label
    and words that all labels share alternate at random, so that a label can be read off its tokens.  White space
    between sections is inside the tags of the second one or outside of all tags, at random.  The annotated text is an
    exact copy.
    """
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(n):
        n_words = int(rng.integers(40, 91))
        n_sections = n_words // 10
        sizes = 4 + rng.multinomial(n_words - 4 * n_sections, np.ones(n_sections) / n_sections)
        labels = ["initializing", *["deduction"] * (n_sections - 1)]
        for place in rng.choice(n_sections, rng.integers(1, n_sections // 3 + 1), replace=False):
            labels[place] = "backtracking"
        plain = tagged = ""
        for number, (label, size) in enumerate(zip(labels, sizes, strict=True)):
            own = rng.random(size) < 0.6
            text = " ".join(str(rng.choice(WORDS[label] if mine else COMMON)) for mine in own) + "."
            space = "" if number == 0 else str(rng.choice([" ", "\n\n"]))
            inside = bool(rng.random() < 0.5)
            plain += space + text
            tagged += f'{"" if inside else space}["{label}"]{space if inside else ""}{text}["end-section"]'
        problem = f"Puzzle {i}: which {' '.join(map(str, rng.choice(COMMON, 8)))}?"
        task_id = f"{CATEGORIES[i % 4]}_{i // 4}"
        rows.append({"task_id": task_id, "problem": problem, "reasoning_chain": plain, "annotated_chain": tagged})
    return rows


def sites_of(names: Sequence[int | str]) -> list[Any]:
    """The sites of layers, by number, and of controls, by name."""
    from streamprobe.probes.sites import control_sites, layer_sites

    return [site for name in names for site in (layer_sites if isinstance(name, int) else control_sites)([name])]


def inputs_of(argv: Sequence[str]) -> Any:
    """What a run of this command line works with before any weight is read."""
    from streamprobe.config.load import load_config
    from streamprobe.run.inputs import make_inputs, read_texts

    texts, config = read_texts(load_config(argv))
    return make_inputs(config, texts)


def setup_of(argv: Sequence[str]) -> Any:
    """What stands before the first pass of a run of this command line."""
    from streamprobe.config.load import load_config
    from streamprobe.run.cost import Cost
    from streamprobe.run.pipeline import set_up

    return set_up(load_config(argv), None, Cost())


def make_record(problem: str, response: str, sections: Sequence[Any] = (), id: str = "x") -> Any:
    """A record with these sections, (label, start, end) each."""
    from streamprobe.data.annotations import Annotation, Section
    from streamprobe.data.formats import Record

    return Record(response, Annotation([Section(*section) for section in sections]), problem, id)


def load_chains(
    rows: list[dict[str, Any]],
    tokenizer: Any,
    labels: list[str],
    context: int = 512,
    *,
    fields: Any = None,
    most: int | None = None,
    **options: Any,
) -> tuple[Any, Any]:
    """The splits and the counts of rows in the format `annotated`: `fields` are its FormatOptions."""
    from streamprobe.data.dataset import make_dataset
    from streamprobe.data.formats import FORMATS, FormatOptions
    from streamprobe.data.sources import RowSource, read_records

    fields = fields or FormatOptions()
    records = read_records(RowSource(rows, FORMATS["annotated"], fields, most), fields.label_names)
    dataset = make_dataset(records, tokenizer, labels, context=context, **options)
    return dataset.splits, dataset.counts


def fingerprint(splits: Any) -> str:
    """The fingerprint of a data set with these splits."""
    from streamprobe.data.dataset import Counts, Dataset

    return Dataset(splits, [], Counts()).fingerprint()


def make_tokenizer(adds: str = "<s> $A", bos: bool = True, chat_template: str | None = None) -> Any:
    """A byte-level BPE tokenizer of 400 entries; `adds` says which special tokens it puts around a text ($A)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<pad>"]
    texts = [row[name] for row in make_rows(40, seed=1) for name in ("problem", "reasoning_chain")]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    core.post_processor = processors.TemplateProcessing(single=adds, special_tokens=[("<s>", 0), ("</s>", 1)])
    names = {"eos_token": "</s>", "pad_token": "<pad>"} | ({"bos_token": "<s>"} if bos else {})
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **names)
    tokenizer.chat_template = chat_template
    return tokenizer


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Matrices of this size are fastest, and sums always in the same order, in one thread."""
    torch.set_num_threads(1)


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
        "model": model_dir, "dtype": "float32", "data": str(chains_file), "layers": bank.layers, "lags": [-2, 0, 4],
        "targets": ["token", "onset"],
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(keys))
    (folder / "probes.safetensors").write_bytes(pack_probes({"newton": bank}, {"config": for_others(keys)}))
    rows = [
        dict.fromkeys(FIELDS, 0.0)
        | {
            "solver": "newton", "layer": layer, "label": c.label, "target": c.target, "lag": c.lag, "control": "",
            "auroc": (0.6, 0.9, 0.7)[layer], "auroc_low": 0.5, "auroc_high": 1.0,
        }
        for layer in bank.layers
        for c in bank.columns
    ]  # fmt: skip
    (folder / "results.csv").write_bytes(pack_rows(rows, FIELDS))
    return folder
