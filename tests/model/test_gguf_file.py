"""A GGUF file is parsed once, and what is read in it is what transformers reads by itself."""

from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from gguf_files import NAME, WORDS, save_gguf

from streamprobe.cli import train
from streamprobe.model import gguf_file
from streamprobe.model.backbone import load_backbone
from streamprobe.model.blocks import decoder_layers
from streamprobe.model.loading import read_config
from streamprobe.model.tokenizer import load_tokenizer

gguf = pytest.importorskip("gguf")
FILE = {"gguf_file": NAME}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_gguf(tmp_path_factory.mktemp("gguf"))


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """How often `gguf` parses a file and turns a tensor into numbers."""
    counts: Counter[str] = Counter()
    parse, dequantize = gguf.GGUFReader.__init__, gguf.dequantize

    def count_parses(*arguments):
        counts["parsed"] += 1
        return parse(*arguments)

    def count_tensors(*arguments):
        counts["tensors"] += 1
        return dequantize(*arguments)

    monkeypatch.setattr(gguf.GGUFReader, "__init__", count_parses)
    monkeypatch.setattr(gguf, "dequantize", count_tensors)
    yield counts


def test_config_and_tokenizer_are_those_of_transformers(folder):
    from transformers import AutoConfig, AutoTokenizer

    expected = AutoConfig.from_pretrained(folder, **FILE)
    for _ in range(2):  # parsed, and from what was parsed
        assert read_config(folder, **FILE).to_dict() == expected.to_dict()
    theirs, ours = AutoTokenizer.from_pretrained(folder, **FILE), load_tokenizer(folder, **FILE)
    assert type(ours) is type(theirs) and ours.get_vocab() == theirs.get_vocab()
    assert (ours.bos_token, ours.eos_token) == (theirs.bos_token, theirs.eos_token) == ("<s>", "</s>")
    text = f" {' '.join(WORDS)} só 2\n\n"
    assert ours(text)["input_ids"] == theirs(text)["input_ids"]
    assert set(WORDS) <= set(theirs.get_vocab())


@pytest.mark.parametrize("layers", [[0, 2], None])
def test_weights_are_those_of_transformers(folder, layers):
    from transformers import AutoModelForCausalLM

    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **FILE).state_dict()
    found = load_backbone(folder, layers, "float32", device_map="cpu", **FILE).state_dict()
    assert len(found) > 20
    for name, weight in found.items():
        assert torch.equal(weight, expected[name if layers is None else f"model.{name}"])


def test_only_the_weights_of_kept_blocks_are_turned_into_numbers(folder, counted):
    assert len(decoder_layers(load_backbone(folder, [0, 2], "float32", device_map="cpu", **FILE))) == 3
    assert counted == {"parsed": 1, "tensors": 3 * 9 + 3}


def test_a_whole_run_parses_the_file_once(folder, counted, chains_file, tmp_path):
    argv = f"--model {folder} --gguf_file {NAME} --data {chains_file} --layers 1 --lags 0 --targets token"
    argv += f" --dtype float32 --max_passes 1 --bootstrap 10 --device_map cpu --output_dir {tmp_path / 'run'}"
    assert train(argv.split()) == 0
    assert counted["parsed"] == 1


def test_one_parse_fails_without_what_was_parsed_before(folder, counted, monkeypatch):
    """The negative control: transformers by itself parses the file each time."""
    monkeypatch.setattr(gguf_file, "find_spec", lambda name: None)
    read_config(folder, **FILE)
    load_tokenizer(folder, **FILE)
    load_backbone(folder, [0], "float32", device_map="cpu", **FILE)
    assert counted == {"parsed": 4, "tensors": 6 * 9 + 3}


def test_a_file_that_was_changed_is_parsed_again(folder, counted, tmp_path):
    save_gguf(tmp_path)
    read_config(str(tmp_path), **FILE)
    read_config(str(tmp_path), **FILE)
    assert counted["parsed"] == 1
    save_gguf(tmp_path)
    read_config(str(tmp_path), **FILE)
    assert counted["parsed"] == 2
