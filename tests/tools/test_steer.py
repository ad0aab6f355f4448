"""Pushing a model along a direction: the hook, the scale, and the command line."""

import json
import os
import re

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from streamprobe import cli
from streamprobe.activations.batch import TokenBatch
from streamprobe.demo import MODEL, task
from streamprobe.demo.model import PROMPT, answer
from streamprobe.errors import InputError
from streamprobe.model.blocks import decoder_layers
from streamprobe.model.hooks import steer, tap
from streamprobe.probes.sites import layer_sites
from streamprobe.tools import steer as steering

GREEDY = {"do_sample": False}


@pytest.fixture
def model(model_dir):
    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def demo():
    return (
        AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval(),
        AutoTokenizer.from_pretrained(MODEL),
    )


def tokens(seed=0, shape=(2, 7)):
    return torch.randint(3, 400, shape, generator=torch.Generator().manual_seed(seed))


def vector(seed=0, shape=(32,)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def n_hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


# --- the hook ---


def test_the_hook_is_there_inside_and_gone_after_also_after_an_exception(model):
    blocks = decoder_layers(model)
    assert n_hooks(model) == 0
    with steer(blocks[1], add=vector()):
        assert n_hooks(model) == 1
        with steer(blocks[2], ablate=vector()), tap({1: blocks[1]}):
            assert n_hooks(model) == 3
        assert n_hooks(model) == 1
    assert n_hooks(model) == 0
    with pytest.raises(ZeroDivisionError), steer(blocks[1], add=vector()):
        assert n_hooks(model) == 1
        raise ZeroDivisionError
    assert n_hooks(model) == 0
    with pytest.raises(RuntimeError), steer(blocks[1], add=vector(shape=(31,))):  # from within the model
        model(tokens())
    assert n_hooks(model) == 0


@torch.no_grad()
def outputs(model, *around) -> list[torch.Tensor]:
    """What taps see at blocks 0 .. 3, and the logits, of a pass within these context managers."""
    blocks = decoder_layers(model)
    with around[0], tap(dict(enumerate(blocks))) as taken:
        logits = model(tokens(), use_cache=False).logits
        return [*(taken[i].clone() for i in range(4)), logits]


class Edited(nn.Module):
    """A block whose output is changed by hand, without a hook."""

    def __init__(self, block, change):
        super().__init__()
        self.block, self.change = block, change

    def __getattr__(self, name):
        return super().__getattr__(name) if name in ("block", "change") else getattr(super().__getattr__("block"), name)

    def forward(self, *args, **kwargs):
        return self.change(self.block(*args, **kwargs))


def projector(u: torch.Tensor) -> torch.Tensor:
    """[D, D]: the projection onto what is orthogonal to u, from a complete orthonormal basis that begins with u."""
    q, _ = torch.linalg.qr(
        torch.cat([u[:, None], torch.randn(32, 31, generator=torch.Generator().manual_seed(9))], 1).double()
    )
    return (q[:, 1:] @ q[:, 1:].T).float()


@pytest.mark.parametrize("kind", ["add", "ablate"])
def test_steering_is_what_an_edited_block_does(model, kind):
    v = vector()
    plain = outputs(model, tap({}))
    steered = outputs(model, steer(decoder_layers(model)[1], **{kind: v}))
    change = {"add": lambda x: x + v, "ablate": lambda x: x @ projector(v)}[kind]
    model.model.layers[1] = Edited(model.model.layers[1], change)
    for got, expected in zip(steered, outputs(model, tap({})), strict=True):
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)
    assert torch.equal(steered[0], plain[0])  # below, nothing changes
    for got, expected in zip(steered[1:], plain[1:], strict=True):
        assert (got - expected).abs().mean() > 0.01  # negative control
    if kind == "ablate":
        along = [float((x[1] @ v).abs().max()) for x in (steered, plain)]
        assert along[0] < 1e-4 < 0.1 < along[1]


def test_a_tap_sees_the_steered_stream_in_either_order(model):
    block, v = decoder_layers(model)[1], vector()
    with torch.no_grad(), tap({1: block}) as before, steer(block, add=v), tap({1: block}) as after:
        model(tokens())
        seen = before[1].clone(), after[1].clone()
    plain = outputs(model, tap({}))[1]
    for got in seen:
        torch.testing.assert_close(got, plain + v, atol=1e-5, rtol=1e-5)


def test_newest_changes_the_last_token_only_and_each_chain_may_have_its_own_vector(model):
    block, v = decoder_layers(model)[1], vector(shape=(2, 1, 32))
    plain, steered = outputs(model, tap({}))[1], outputs(model, steer(block, add=v, newest=True))[1]
    assert torch.equal(steered[:, :-1], plain[:, :-1])
    torch.testing.assert_close(steered[:, -1], plain[:, -1] + v[:, 0], atol=1e-5, rtol=1e-5)
    everywhere = outputs(model, steer(block, add=v))[1]
    torch.testing.assert_close(everywhere, plain + v, atol=1e-5, rtol=1e-5)


def test_a_block_that_returns_a_tuple_keeps_the_rest_of_it():
    class Pair(nn.Module):
        def forward(self, x):
            return x, x + 1

    x = torch.zeros(1, 2, 4)
    block = Pair()
    with steer(block, add=torch.ones(4)):
        first, second = block(x)
    assert torch.equal(first, torch.ones(1, 2, 4)) and torch.equal(second, torch.ones(1, 2, 4))


def test_ablation_in_bfloat16_is_computed_in_float32():
    block, v = nn.Identity(), vector(shape=(4096,))
    x = (vector(1, (1, 3, 4096)) + 2 * v).bfloat16()
    with steer(block, ablate=v):
        got = block(x)
    expected = x.double() - (x.double() @ v.double() / v.double().square().sum())[..., None] * v.double()
    assert (
        got.dtype == torch.bfloat16
        and torch.equal(got, expected.bfloat16())
        or (got.double() - expected).abs().max() < 0.03
    )
    assert float((got.double() @ v.double() / v.norm()).abs().max()) < 0.05 * float(
        (x.double() @ v.double() / v.norm()).abs().max()
    )


def test_a_direction_with_a_known_effect_has_it(model):
    """Added to the last block in large measure, a token's row of the head makes the model write that token."""
    ids, token = tokens(shape=(1, 6)), 123
    norm = model.model.norm.weight.detach()
    push = 1000 * model.lm_head.weight[token].detach() * norm
    plain = model.generate(ids, max_new_tokens=5, eos_token_id=None, **GREEDY)
    with steer(decoder_layers(model)[3], add=push, newest=True):
        pushed = model.generate(ids, max_new_tokens=5, eos_token_id=None, **GREEDY)
    with steer(decoder_layers(model)[3], add=0 * push, newest=True):
        still = model.generate(ids, max_new_tokens=5, eos_token_id=None, **GREEDY)
    assert pushed[0, 6:].tolist() == [token] * 5 and token not in plain[0, 6:].tolist()
    assert torch.equal(plain, still)


# --- the sweep ---


def test_responses_are_the_demos_own_answers_and_rows_do_not_mix(demo):
    model, tokenizer = demo
    problems = task.make_problems(5, task.HELD_OUT[7])
    prompts = [tokenizer(PROMPT.format(problem=p), return_tensors="pt")["input_ids"][0] for p in problems]
    block = decoder_layers(model)[0]

    def respond(prompts, max_new_tokens, batch_size, **steered):
        settings = {"max_new_tokens": max_new_tokens, "batch_size": batch_size, "options": GREEDY}
        return steering.respond(model, tokenizer, block, prompts, **settings, **steered)

    with torch.no_grad():
        plain = respond(prompts, 101, 2)
        assert plain == answer(model, tokenizer, problems)
        each = 5 * vector(3, (5, 128))
        together = respond(prompts, 40, 5, add=each)
        alone = [respond([p], 40, 1, add=v[None])[0] for p, v in zip(prompts, each, strict=True)]
    assert together == alone and len(set(together)) == 5
    shifted = respond(prompts, 40, 2, add=each.roll(1, 0))
    assert shifted != together  # negative control: each problem has its own vector
    assert n_hooks(model) == 0


def batches(x, y):
    for part in torch.arange(len(x)).split(7):
        yield TokenBatch(
            x[part, None],
            torch.zeros(len(part), 0),
            y[part, None],
            torch.ones(len(part), 1, dtype=torch.bool),
            torch.zeros(len(part), dtype=torch.int64),
            part,
            torch.zeros(len(part), dtype=torch.int64),
            torch.zeros(len(part)),
        )


def test_the_scale_is_that_of_numpy():
    x = vector(1, (50, 8)) * 3 + 1
    y = torch.arange(50) % 3 == 0
    u = nn.functional.normalize(vector(2, (8,)), dim=0)
    std, norm, difference = steering.measure_scale(batches(x, y), u)
    a, b = x.double().numpy(), y.numpy()
    assert std == pytest.approx(np.std(a @ u.double().numpy())) and norm == pytest.approx(
        np.linalg.norm(a, axis=1).mean()
    )
    np.testing.assert_allclose(difference.numpy(), a[b].mean(0) - a[~b].mean(0), rtol=1e-5)
    assert std != pytest.approx(np.std(a @ np.roll(u.double().numpy(), 1)))  # negative control
    with pytest.raises(InputError, match="one class"):
        steering.measure_scale(batches(x, y & False), u)


def test_every_direction_is_pushed_by_the_same_length():
    vectors = steering.directions(vector(1), 7 * vector(2), 5, seed=0)
    lengths, calls = [], []

    def write(add=None, ablate=None):
        calls.append((add, ablate))
        if add is not None:
            lengths.append(add.norm(dim=1))
        return ["text"]

    rows = list(steering.steer_sweep(write, vectors, 2.5, [-4, 0, 2]))
    assert [row[:2] for row in rows[:4]] == [("none", "0"), ("probe", "-4"), ("probe", "+2"), ("probe", "ablate")]
    assert len(rows) == 1 + 3 * 3 and calls[0] == (None, None) and calls[3][0] is None
    for got, expected in zip(lengths, [10, 5] * 3, strict=True):
        torch.testing.assert_close(got, torch.full_like(got, expected))
    assert [len(v) for v in vectors.values()] == [1, 1, 5]
    assert torch.cosine_similarity(calls[1][0], vectors["probe"]).item() == pytest.approx(-1)
    again, other = (steering.directions(vector(1), vector(2), 5, seed)["random"] for seed in (0, 1))
    assert torch.equal(again, vectors["random"]) and not torch.equal(other, again)
    assert not any(strength == "0" for _, strength, _ in steering.steer_sweep(write, vectors, 1.0, [1]))


# --- the command line ---


def test_the_command_line_reports_every_direction_and_strength(run_folder, tmp_path, capsys):
    path = tmp_path / "sweep.json"
    options = "--layer 1 --lag 4 --strengths -2 0 30 --problems 5 --batch 3 --max_new_tokens 12 --marker [aeiou]"
    argv = [str(run_folder), *options.split(), "--json", str(path)]
    assert cli.main(["steer", *argv]) == 0
    out, found = capsys.readouterr().out, json.loads(path.read_text())
    assert "layer 1, backtracking/token/lag+04, newton; 5 test problems" in out and found["layer"] == 1
    names = [(row["direction"], row["strength"]) for row in found["rows"]]
    assert names == [
        ("none", "0"),
        *((d, s) for d in ("probe", "difference of means", "random") for s in ("-2", "+30", "ablate")),
    ]
    for row in found["rows"]:
        counts = [len(re.findall("[aeiou]", text, re.I)) for text in row["responses"]]
        assert row["events"][0] == pytest.approx(np.mean(counts)) and len(counts) == 5
        assert re.search(rf"{row['direction']} +{re.escape(row['strength'])} +{row['events'][0]:.2f} \(", out)
    texts = [row["responses"] for row in found["rows"]]
    assert texts[0] != texts[2] and texts[2] != texts[8]  # a strong push changes the text, another one otherwise
    assert len(set(found["problems"])) == 5


@pytest.fixture(scope="module")
def demo_run(tmp_path_factory):
    """A run of the demo with random probes."""
    import yaml

    from streamprobe.lags import make_columns
    from streamprobe.probes.linear import ProbeBank
    from streamprobe.probes.storage import pack_probes

    folder = tmp_path_factory.mktemp("demo")
    keys = {
        "model": str(MODEL),
        "data": str(task.CHAINS),
        "layers": [1],
        "lags": [0, 8],
        "max_chains": 60,
        "dtype": "float32",
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(keys))
    columns = make_columns(["backtracking"], ["token"], [0, 8])
    bank = ProbeBank(layer_sites([1]), columns, torch.randn(1, 2, 128), torch.zeros(1, 2), torch.zeros(1, 2))
    (folder / "probes.safetensors").write_bytes(pack_probes({"newton": bank}, {"config": keys}))
    return folder


def test_the_demo_is_judged_exactly(demo_run, capsys):
    argv = "--layer 1 --lag 8 --strengths 0 --problems 6 --max_new_tokens 110".split()
    assert cli.main(["steer", str(demo_run), *argv]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[3].split("  ")[-1].strip() == "solved" and " early " in lines[3]
    none = next(line for line in lines if line.startswith("none"))
    assert re.search(r"( 0\.00 \(0\.00 to 0\.39\) +){2}1\.00 \(0\.61 to 1\.00\)$", none)  # no early return, all solved


OK = ["--layer", "1", "--lag", "4"]
CASES = {
    "layer": (["--layer", "9"], "layer 9; expected one of 0 1 2"),
    "lag": (["--layer", "1", "--lag", "3"], "lag 3; expected one of -2 0 4"),
    "strengths that are no numbers": ([*OK, "--strengths", "strong"], "'strong'"),
    "no strengths": ([*OK, "--strengths"], "--strengths"),
    "endless strength": ([*OK, "--strengths", "inf"], "strengths [inf]"),
    "strength nan": ([*OK, "--strengths", "0", "nan"], "finite"),
    "no problems": ([*OK, "--problems", "0"], "problems 0"),
    "no batch": ([*OK, "--batch", "-1"], "batch -1"),
    "huge strength": ([*OK, "--strengths", "1e300"], "1,000,000"),
    "empty marker": ([*OK, "--marker", "x*"], "matches no text"),
    "marker": ([*OK, "--marker", "("], "marker"),
    "deep marker": ([*OK, "--marker", "(" * 20_000 + "a" + ")" * 20_000], "recursion"),
    "endless marker": ([*OK, "--marker", "(?R)"], "'(?R)', which takes more than 1 s or all memory"),
    "json in no folder": ([*OK, "--json", "gone/x.json"], "gone/x.json"),
    "unknown option": ([*OK, "--prompt", "x"], "--prompt"),
    "CUDA where there is none": ([*OK, "--device_map", "cuda:7"], "cuda:7"),
}


@pytest.mark.parametrize("argv, told", CASES.values(), ids=CASES.keys())
def test_what_the_user_got_wrong_is_told_in_one_line(run_folder, tmp_path, capsys, monkeypatch, argv, told):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["steer", str(run_folder), *argv]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("streamprobe: ") and "\n" not in error and "; expected " in error and "; fix: " in error
    assert told in error and os.listdir(tmp_path) == []


def test_a_file_that_cannot_be_written_is_told(run_folder, tmp_path, capsys):
    (tmp_path / "x.json").symlink_to("gone/x.json")  # also for root
    options = "--problems 1 --max_new_tokens 1 --strengths 0".split()
    assert cli.main(["steer", str(run_folder), *OK, *options, "--json", str(tmp_path / "x.json")]) == 2
    error = capsys.readouterr().err
    assert "x.json" in error and error.count("\n") == 1


def test_data_that_is_gone_is_told(run_folder, tmp_path, capsys):
    for path in run_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = (tmp_path / "config.yaml").read_text()
    (tmp_path / "config.yaml").write_text(re.sub("data: .*", "data: gone.json", config))
    assert cli.main(["steer", str(tmp_path), *OK]) == 2
    assert "gone.json" in capsys.readouterr().err
