"""Processes that share one copy of a model: the numbers of one process with all of it, and an end that says why."""

import os
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from forked import Done, forked
from launched import launched, pooled, rows_of, said
from tiny_models import save_tiny
from torch import Tensor, nn

from streamprobe.errors import InputError
from streamprobe.model import served
from streamprobe.model.backbone import load_backbone
from streamprobe.model.blocks import decoder_layers
from streamprobe.model.chunks import make_cache
from streamprobe.model.hooks import read, tap
from streamprobe.model.served import load_shared
from streamprobe.model.sharded import own_part
from streamprobe.run import pipeline

pytestmark = pytest.mark.usefixtures("undrawn")
LAYERS = [0, 2]
# Sums over a shard each are added up in another order, so that activations of up to 5 differ by some units in the last
# place of float32 (6e-8 of them), and gradients and thresholds of up to 7 by as little, rounded to 1e-5.  Scores that are
# as close change places.  Of the 12 x 860 pairs of a positive and a negative of `onset` such a swap is 1e-4 of
# AUROC; it moves average precision, and where intervals over resampled chains end, by some times that.
ACTIVATIONS = 1e-5
SMOOTH, AREA, OTHER = 1e-4, 3e-4, 2e-3
COLUMNS = dict.fromkeys(["gradient_norm", "nested_gradient_norm", "threshold"], SMOOTH)
COLUMNS |= dict.fromkeys(["auroc", "lift", "gain_auroc"], AREA)


@pytest.fixture
def config(tmp_path: Path, model_dir: str, chains_file: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    keys = {
        "model": model_dir,
        "data": str(chains_file),
        "dtype": "float32",
        "layers": LAYERS,
        "lags": [-2, 4],
        "labels": ["backtracking"],
        "targets": ["token", "onset"],
        "max_chains": 40,
        "max_passes": 2,
        "max_batch_tokens": 512,
        "bootstrap": 20,
        "report_to": ["none"],
    }
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(yaml.safe_dump(keys))
    return "tiny.yaml"


def far(one: str, other: str) -> list[str]:
    """The columns of two tables whose numbers differ by more than rounding may; fails for rows that are not the same."""
    found = set()
    for ours, theirs in zip(rows_of(one), rows_of(other), strict=True):
        assert all(ours[name] == theirs[name] for name in ("layer", "label", "target", "lag", "n_tokens", "n_positive"))
        for name, value in ours.items():
            if value != theirs[name] and not abs(float(value) - float(theirs[name])) < COLUMNS.get(name, OTHER):
                found.add(name)
    return sorted(found)


def fingerprint(folder: str) -> str:
    return next(line for line in Path(folder, "config.yaml").read_text().splitlines() if "model_fingerprint" in line)


def only_line(every: list[Done]) -> str:
    """What the processes have said on standard error; fails unless one of them has said one line."""
    lines = [line for done in every for line in said(done).splitlines()]
    assert len(lines) == 1 and lines[0].startswith("streamprobe: "), every
    return lines[0]


@pytest.mark.parametrize("most", ["512", "64"])
def test_processes_that_share_a_copy_give_the_numbers_of_one(config: str, most: str) -> None:
    """With 64 tokens a batch, chains are read in chunks."""
    prepare, argv = (pooled if most == "64" else lambda: None), [config, "--max_batch_tokens", most]
    [one] = forked([*argv, "--output_dir", "one"], prepare=prepare)
    assert one.status == 0 and "one copy" not in one.out
    for size in (2, 4):
        every = launched([*argv, "--tp_size", "2", "--output_dir", f"of{size}"], size, prepare=prepare)
        assert [done.status for done in every] == [0] * size, every
        assert all(not done.out for done in every[1:]) and "verdict" in every[0].out
        workers = "1 worker" if size == 2 else "2 workers"
        assert f"model     one copy on 2 processes each, {workers}\n" in every[0].out
        assert not far("one", f"of{size}")
        assert fingerprint("one") == fingerprint(f"of{size}")


def test_another_model_gives_other_numbers(config: str, model_dir: str, tmp_path: Path) -> None:
    """Negative control of the test above."""
    from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM

    torch.manual_seed(1)
    LlamaForCausalLM(AutoConfig.from_pretrained(model_dir)).float().save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(model_dir).save_pretrained(tmp_path / "other")
    assert [done.status for done in forked([config, "--output_dir", "one"])] == [0]
    argv = [config, "--model", str(tmp_path / "other"), "--tp_size", "2", "--output_dir", "two"]
    assert [done.status for done in launched(argv, 2)] == [0, 0]
    assert {"gradient_norm", "threshold", "auroc", "average_precision", "auroc_low"} <= set(far("one", "two"))
    assert fingerprint("one") != fingerprint("two")


def some_ids() -> Tensor:
    return torch.randint(3, 60, (3, 20), generator=torch.Generator().manual_seed(0))


def activations(model: Any) -> list[Tensor]:
    """What the layers return for a text in one piece, and for its second half in chunks."""
    blocks, ids, found = decoder_layers(model), some_ids(), []
    with tap({layer: blocks[layer] for layer in LAYERS}) as taken:
        read(model, ids, last=blocks[-1])
        found += [taken[layer].clone() for layer in LAYERS]
        cache = make_cache(model.config)
        for chunk in ids.split(8, dim=1):
            read(model, chunk, last=blocks[-1], cache=cache)
        found += [taken[layer].clone() for layer in LAYERS]
    assert all(type(acts) is Tensor for acts in found)
    return found


def keep_activations(run: Any) -> None:
    """In place of a run: what the shared model computes, and how large its parts are, in a file."""
    model = load_shared(run.model.model, LAYERS, run.model.loading)
    sizes = {name: tuple(own_part(p).shape) for name, p in model.named_parameters()}
    torch.save({"acts": activations(model), "sizes": sizes}, "found.pt")


def kept_activations() -> None:
    pipeline.run = keep_activations  # type: ignore[assignment]


def test_activations_are_those_of_the_whole_model_from_half_of_its_matrices(config: str, model_dir: str) -> None:
    argv = [config, "--tp_size", "2"]
    assert [done.status for done in launched(argv, 2, prepare=kept_activations)] == [0, 0]
    found, plain = torch.load("found.pt"), load_backbone(model_dir, LAYERS, "float32", device_map="cpu")
    for ours, theirs in zip(found["acts"], activations(plain), strict=True):
        assert (ours - theirs).abs().max() < ACTIVATIONS < theirs.std() / 1e3
    whole: dict[str, nn.Parameter] = dict(plain.named_parameters())
    assert found["sizes"].keys() == whole.keys()
    for name, size in found["sizes"].items():
        shards = 2 if "proj" in name else 1  # the embedding and the norms are whole
        assert torch.Size(size).numel() * shards == whole[name].numel(), name


@pytest.mark.parametrize("kind", ["deepseek_v3", "gemma3_text", "gpt_neox", "phi3", "qwen3_moe"])
def test_other_types_of_model(config: str, kind: str, tmp_path: Path) -> None:
    """Latent attention, windows, keys and values in one matrix, packed matrices, experts."""
    folder = str(tmp_path / kind)
    save_tiny(kind, folder)
    argv = [config, "--tp_size", "2", "--model", folder]
    assert [done.status for done in launched(argv, 2, prepare=kept_activations)] == [0, 0]
    plain = activations(load_backbone(folder, LAYERS, "float32", device_map="cpu"))
    for ours, theirs in zip(torch.load("found.pt")["acts"], plain, strict=True):
        assert (ours - theirs).abs().max() < ACTIVATIONS * theirs.abs().max()


REFUSED = {
    "no launcher": (1, [], "tp_size 2 with 1 process; expected a launcher"),
    "a process too many": (3, [], "tp_size 2 with 3 processes; expected a launcher that starts 2"),
    "a place": (2, ["--device_map", "cpu"], "tp_size 2 with device_map cpu; "),
    "fewer bits": (2, ["--quantization", "4bit"], "tp_size 2 with quantization 4bit; "),
    "a file that is unpacked": (2, ["--gguf_file", "x.gguf"], "tp_size 2 with gguf_file x.gguf; "),
    "too few heads": (4, ["--tp_size", "4"], "tp_size 4 with a model of 2 key and value heads; "),
    "none": (2, ["--tp_size", "0"], "tp_size 0; "),
    "a layer": (2, ["--layers", "99"], "layers 99; "),
}


@pytest.mark.parametrize("size, argv, line", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_shared_is_said_once(config: str, size: int, argv: list[str], line: str) -> None:
    every = launched([config, "--tp_size", "2", *argv], size)
    assert [done.status for done in every] == [2] * size
    assert only_line(every).startswith(f"streamprobe: {line}")


def test_a_model_without_a_plan_is_refused(config: str, model_dir: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, GPT2Config, GPT2Model

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    GPT2Model(GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=3, n_head=2)).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    every = launched([config, "--tp_size", "2", "--model", str(tmp_path / "gpt2")], 2)
    assert [done.status for done in every] == [2, 2]
    assert "tp_size 2 with a gpt2 model, which transformers has no plan to shard; " in only_line(every)


def killed_at(number: int) -> None:
    """Lets a follower die when it is told to read for that time."""
    reads, along = 0, served._read_along

    def deadly(*arguments: Any) -> Any:
        nonlocal reads
        reads += 1
        if reads == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return along(*arguments)

    served._read_along = deadly


@pytest.mark.parametrize("size, rank", [(2, 1), (4, 3)])
@pytest.mark.parametrize("number", [1, 12])
def test_a_follower_that_is_killed_ends_all_and_is_named(config: str, size: int, rank: int, number: int) -> None:
    started = time.monotonic()
    every = launched([config, "--tp_size", "2"], size, prepare=partial(killed_at, number), only=rank)
    assert time.monotonic() - started < 60
    assert [done.status for done in every] == [-signal.SIGKILL if r == rank else 2 for r in range(size)], every
    assert only_line(every).startswith(f"streamprobe: rank {rank} on ") and "ended without a word" in only_line(every)


def test_what_is_wrong_on_a_follower_ends_all(config: str) -> None:
    def breaks() -> None:
        def broken(*_: Any) -> None:
            raise torch.OutOfMemoryError("a card that is full")

        served._read_along = broken

    every = launched([config, "--tp_size", "2"], 2, prepare=breaks, only=1)
    assert [done.status for done in every] == [2, 2], every
    assert "memory" in only_line(every)


def test_a_first_rank_that_is_killed_ends_its_follower(config: str) -> None:
    def dies() -> None:
        pipeline.make_jobs = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]

    every = launched([config, "--tp_size", "2"], 2, prepare=dies, only=0)
    assert [done.status for done in every] == [-signal.SIGKILL, 2], every
    assert only_line(every).startswith("streamprobe: rank 0 on ") and "ended without a word" in only_line(every)


@pytest.mark.parametrize("rank", [0, 2])
def test_what_is_wrong_on_a_first_rank_ends_all(config: str, rank: int) -> None:
    def breaks() -> None:
        def broken(*_: Any) -> None:
            raise InputError("a card that is broken", "a whole one", "mend it")

        pooled()
        pipeline.Setup.read_pass = broken  # type: ignore[method-assign, assignment]

    every = launched([config, "--tp_size", "2"], 4, prepare=breaks, only=rank)
    assert [done.status for done in every] == [2] * 4, every
    assert only_line(every).startswith("streamprobe: a card that is broken; ")


def test_a_run_is_resumed_with_more_processes_a_copy(config: str) -> None:
    from killed import killed_after

    assert [done.status for done in forked([config, "--output_dir", "straight"])] == [0]
    [done] = forked([config, "--output_dir", "run"], prepare=killed_after(1, saved=1))
    assert done.status == -signal.SIGKILL
    every = launched([config, "--output_dir", "run", "--resume", "--tp_size", "2"], 2)
    assert [done.status for done in every] == [0, 0] and "resumed   after pass" in every[0].out, every
    assert not far("straight", "run")


def test_a_dry_run(config: str) -> None:
    every = launched([config, "--tp_size", "2", "--dry_run"], 4)
    assert [done.status for done in every] == [0] * 4, every
    assert "loaded    0.000 GB of weights" in every[0].out and not every[2].out
