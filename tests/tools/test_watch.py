"""Watching a model write: the same tokens as without, and at each the probabilities of a plain pass over the text."""

import math
import os
import threading
from html.parser import HTMLParser

import pytest
import torch
from builders import make_record, make_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from streamprobe import cli
from streamprobe.data.tokenize import TextOptions
from streamprobe.lags import make_columns
from streamprobe.probes.linear import ProbeBank
from streamprobe.probes.sites import layer_sites
from streamprobe.tools import generation
from streamprobe.tools import watch as monitor
from streamprobe.tools.watch import Mark, watch

N = 12
GREEDY = {"do_sample": False}


@pytest.fixture(scope="module")
def model(model_dir):
    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()


def prompt(seed: int = 0, length: int = 9) -> torch.Tensor:
    return torch.randint(3, 400, (length,), generator=torch.Generator().manual_seed(seed))


def n_hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@torch.no_grad()
def plain_pass(model, ids, bank, up: int = 0) -> torch.Tensor:
    """Probabilities [T, L, K] at every token of a text, from one pass without a cache and probe by probe."""
    states = model(ids[None], output_hidden_states=True, use_cache=False).hidden_states
    result = torch.empty(len(ids), *bank.bias.shape)
    for i, layer in enumerate(bank.layers):
        for k in range(len(bank.columns)):
            logit = states[layer + 1 + up][0].double() @ bank.weight[i, k].double() + bank.bias[i, k].double()
            result[:, i, k] = logit.sigmoid()
    return result


def written(model, ids, **options):
    return model.generate(ids[None], max_new_tokens=N, **options)[0, len(ids) :].tolist()


def both(model, bank, ids, **options):
    steps = list(watch(model, bank, ids, N, **options))
    return [token for token, _ in steps], torch.stack([p for _, p in steps])


@pytest.mark.parametrize(
    "options", [GREEDY, {"do_sample": True, "temperature": 1.5, "top_k": 20}], ids=["greedy", "sampled"]
)
def test_tokens_are_those_of_generate_and_probabilities_those_of_a_plain_pass(model, bank, options):
    ids = prompt()
    torch.manual_seed(1)
    expected = written(model, ids, **options)
    torch.manual_seed(1)
    tokens, given = both(model, bank, ids, **options)
    assert tokens == expected and len(tokens) == N
    text = torch.cat([ids, torch.tensor(tokens)])
    reference = plain_pass(model, text, bank)
    torch.testing.assert_close(given, reference[len(ids) :], atol=1e-4, rtol=0)
    for wrong in (reference[len(ids) - 1 : -1], plain_pass(model, text, bank, up=1)[len(ids) :]):
        assert (given - wrong).abs().mean() > 0.01  # negative controls: a token early, a layer up


def test_a_batch_is_what_each_of_its_prompts_is_alone(model, bank):
    prompts = [prompt(1, 5), prompt(2, 9), prompt(3, 7)]
    padded = torch.stack([nn.functional.pad(p, (9 - len(p), 0), value=2) for p in prompts])
    mask = (torch.arange(9) >= 9 - torch.tensor([[5], [9], [7]])).long()
    steps = list(watch(model, bank, padded, N, attention_mask=mask, eos_token_id=None, **GREEDY))
    assert len(steps) == N and steps[0][0].shape == (3,) and steps[0][1].shape == (3, 3, 6)
    for b, ids in enumerate(prompts):
        tokens, given = both(model, bank, ids, eos_token_id=None, **GREEDY)
        assert [int(step[0][b]) for step in steps] == tokens
        torch.testing.assert_close(torch.stack([step[1][b] for step in steps]), given, atol=1e-4, rtol=0)
    first, second = (torch.stack([step[1][b] for step in steps]) for b in (0, 1))
    assert (first - second).abs().mean() > 0.01  # negative control: rows differ


def test_a_model_of_another_kind():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=400, n_embd=32, n_layer=3, n_head=4, n_positions=64, initializer_range=0.3)
    model = GPT2LMHeadModel(config).eval()
    columns = make_columns(["backtracking"], ["token"], [0, 4])
    bank = ProbeBank(layer_sites([0, 1]), columns, torch.randn(2, 2, 32) / 8, torch.zeros(2, 2))
    ids = prompt()
    options = {**GREEDY, "eos_token_id": None, "pad_token_id": 0}
    tokens, given = both(model, bank, ids, **options)
    assert tokens == written(model, ids, **options)
    reference = plain_pass(model, torch.cat([ids, torch.tensor(tokens)]), bank)
    torch.testing.assert_close(given, reference[len(ids) :], atol=1e-4, rtol=0)


def test_the_token_that_ends_a_text_is_never_read(model, bank):
    ids = prompt()
    every = written(model, ids, **GREEDY)
    end = next(t for i, t in enumerate(every) if i >= 3 and t not in every[:i])
    tokens, given = both(model, bank, ids, eos_token_id=end, pad_token_id=2, **GREEDY)
    assert tokens == every[: every.index(end) + 1] == written(model, ids, eos_token_id=end, pad_token_id=2, **GREEDY)
    assert given[-1].isnan().all() and not given[:-1].isnan().any()
    _, whole = both(model, bank, ids, **GREEDY)
    assert not whole.isnan().any()  # negative control: where the length ends it, the last token is read too


def test_own_stopping_criteria_count_as_well(model, bank):
    steps = list(
        watch(
            model,
            bank,
            prompt(),
            N,
            stopping_criteria=[lambda ids, scores, **_: torch.tensor([ids.shape[1] >= 12])],
            **GREEDY,
        )
    )
    assert len(steps) == 3 and steps[-1][1].isnan().all()


def test_hooks_and_thread_go_when_the_consumer_leaves(model, bank):
    passes, threads, others = [], threading.active_count(), n_hooks(model)  # transformers leaves hooks of its own
    counter = model.register_forward_hook(lambda *_: passes.append(1))
    steps = watch(model, bank, prompt(), 400, eos_token_id=None, **GREEDY)
    assert n_hooks(model) == others + 1  # nothing runs before the first token is asked for
    next(steps)
    assert n_hooks(model) == others + 1 + len(bank.layers)
    steps.close()
    counter.remove()
    assert n_hooks(model) == others and threading.active_count() == threads
    assert 1 < len(passes) < 400


def test_what_goes_wrong_in_the_model_reaches_the_consumer(model, bank):
    def fail(*_):
        raise ZeroDivisionError

    others = n_hooks(model)
    broken = model.model.layers[3].register_forward_hook(fail)
    try:
        with pytest.raises(ZeroDivisionError):
            list(watch(model, bank, prompt(), N, **GREEDY))
    finally:
        broken.remove()
    assert n_hooks(model) == others
    with pytest.raises(AssertionError, match="beams"):
        list(watch(model, bank, prompt(), N, num_beams=2))
    assert n_hooks(model) == others


TOKENIZER = make_tokenizer()


def pieces_of(ids, before=()):
    pieces = generation.Pieces(TOKENIZER, before)
    return [pieces.push(i) for i in ids] + [pieces.rest()]


@settings(max_examples=40)
@given(st.text(max_size=30).filter(lambda text: "\ufffd" not in text))
def test_the_pieces_of_a_text_are_the_text(text):
    ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    assert "".join(pieces_of(ids)) == text


def test_a_character_comes_when_it_is_whole():
    ids = TOKENIZER("so \u00e9\U0001f642 go", add_special_tokens=False)["input_ids"]
    pieces = pieces_of(ids, TOKENIZER("wait no")["input_ids"])
    assert "".join(pieces) == "so \u00e9\U0001f642 go" and "\U0001f642" in pieces and "" in pieces[:-1]
    assert "".join(TOKENIZER.decode([i]) for i in ids) != "so \u00e9\U0001f642 go"  # negative control
    assert "".join(pieces_of(ids[:6])).endswith("\ufffd")  # the end does not wait


def probabilities(*values):
    """Steps whose probe (0, 1) says `values`, and the others .5."""
    for i, value in enumerate(values):
        p = torch.full((3, 6), 0.5)
        p[0, 1] = value
        yield 10 + i, p


class Letters:
    """A tokenizer of one letter a token, in which token 12 is half a character."""

    def decode(self, ids, **_):
        return "".join("\ufffd" if i == 12 and i == ids[-1] else "" if i == 12 else chr(ord("a") + i - 10) for i in ids)


def test_a_mark_has_the_highest_probability_of_its_tokens_and_the_alarm_of_its_threshold(bank):
    shown = list(
        monitor.marks(probabilities(0.1, 0.5, 0.9, 0.2, math.nan), bank, (0, 1), generation.Pieces(Letters(), []))
    )
    assert [m.text for m in shown] == ["a", "b", "d", "e"]
    assert [round(m.probability, 3) for m in shown] == [0.1, 0.5, 0.9, 0.0]
    assert [m.alarm for m in shown] == [False, True, True, False]  # the threshold is .5
    assert shown[0].others == "-2: 0.50  +0: 0.10  +4: 0.50"
    high = ProbeBank(bank.layers, bank.columns, bank.weight, bank.bias, bank.threshold + 3)
    assert not any(
        m.alarm for m in monitor.marks(probabilities(0.1, 0.9), high, (0, 1), generation.Pieces(Letters(), []))
    )


def test_the_terminal_gets_no_commands_from_the_model():
    evil = Mark(" \x1b[2Jhi\x07\u202e\n", 0.5, True, "")
    plain, coloured = monitor.for_terminal(evil, False, False), monitor.for_terminal(evil, False, True)
    assert plain == " \u25b2\ufffd[2Jhi\ufffd\ufffd\n" and "\x1b" not in plain
    assert coloured.count("\x1b") == 2 and coloured.endswith("\x1b[0m\n") and "\x1b[1;4;38" in coloured
    assert monitor.for_terminal(Mark(" a", 0.1, False, ""), True, False) == "\u25bc a"
    assert monitor.for_terminal(Mark(" a", 0.9, True, ""), True, False) == " a"
    red, green, blue = zip(*(monitor.shade(p / 10) for p in range(11)), strict=True)
    assert set(red) == {255} and green == tuple(sorted(green, reverse=True)) and 0 < min(blue) and green[0] == 255


class Text(HTMLParser):
    """The text of a page and its elements."""

    def __init__(self, page):
        super().__init__()
        self.text, self.tags = "", []
        self.feed(page)

    def handle_data(self, data):
        self.text += data

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))


def test_a_page_shows_text_and_runs_none():
    evil = "<script>alert('x')</script>&amp; \" ' "
    shown = [Mark(evil, 0.25, True, evil), Mark("ok", 0.0, False, "")]
    page = Text(monitor.page(evil, evil, evil, shown))
    assert evil + "ok" in page.text and not [tag for tag, _ in page.tags if tag in ("script", "link", "img")]
    spans = [attributes for tag, attributes in page.tags if tag == "span"]
    assert spans[0]["class"] == "alarm" and spans[0]["title"] == f"0.250   {evil}" and "class" not in spans[1]
    unescaped = Text(f"<pre>{evil}</pre>")
    assert [tag for tag, _ in unescaped.tags if tag == "script"]  # negative control


def test_the_command_line_shows_what_watch_gives(run_folder, model, bank, tokenizer, capsys, tmp_path):
    page = tmp_path / "watch.html"
    argv = [str(run_folder), "--prompt", "which box?", "--max_new_tokens", "20", "--lag", "4", "--target", "onset"]
    assert cli.main(["watch", *argv, "--html", str(page)]) == 0
    out = capsys.readouterr().out
    assert "layer 1, backtracking/onset/lag+04" in out  # the best of results.csv
    ids = generation.encode("which box?", "{problem}\n\n", tokenizer, True)
    assert ids.tolist() == tokenizer("which box?\n\n")["input_ids"] and ids[0] == tokenizer.bos_token_id
    steps = list(watch(model, bank, ids, 20, **GREEDY))
    shown = list(
        monitor.marks(iter(steps), bank, bank.place(1, 4, target="onset"), generation.Pieces(tokenizer, ids.tolist()))
    )
    text = "".join(monitor.printable(m.text) for m in shown)
    assert text in out.replace("\u25b2", "").replace("\u25bc", "") and text in Text(page.read_text()).text
    assert any(m.alarm for m in shown) and not all(m.alarm for m in shown) and "\x1b" not in out
    assert cli.main(["watch", *argv, "--layer", "0"]) == 0 and "layer 0, backtracking/onset" in capsys.readouterr().out


def test_sampling_repeats_with_its_seed(run_folder, capsys):
    def once(seed):
        argv = [str(run_folder), "--prompt", "go", "--temperature", "2", "--top_p", "0.9", "--max_new_tokens", "15"]
        assert cli.main(["watch", *argv, "--seed", seed]) == 0
        return capsys.readouterr().out

    assert once("1") == once("1") != once("2")


def broken_run(kind, run_folder, tmp_path):
    """A copy of the run that lacks something, or a path that is none."""
    folder = tmp_path / "run"
    folder.mkdir()
    for path in run_folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    if kind == "gone":
        return tmp_path / "gone"
    if kind == "file":
        return folder / "config.yaml"
    if kind.startswith("no "):
        (folder / kind[3:]).unlink()
    if kind == "torn":
        (folder / "probes.safetensors").write_bytes(b"\x00" * 100)
    if kind == "empty":
        (folder / "probes.safetensors").write_bytes(b"")
    if kind == "odd results":
        (folder / "results.csv").write_text("a,b\n1,2\n")
    if kind == "odd config":
        (folder / "config.yaml").write_text("layer: [1\n")
    return folder


OK = ["--prompt", "go"]
CASES = {
    "no folder": ("gone", OK, "gone"),
    "a file": ("file", OK, "no folder"),
    "no probes": ("no probes.safetensors", OK, "without probes.safetensors"),
    "no config": ("no config.yaml", OK, "without config.yaml"),
    "no results": ("no results.csv", OK, "--layer"),
    "torn probes": ("torn", OK, "holds no probes"),
    "empty probes": ("empty", OK, "holds no probes"),
    "results of another kind": ("odd results", OK, "results.csv"),
    "config that is no YAML": ("odd config", OK, "config"),
    "layer": ("", [*OK, "--layer", "3"], "layer 3; expected one of 0 1 2"),
    "lag": ("", [*OK, "--lag", "5"], "lag 5; expected one of -2 0 4"),
    "lag and layer": ("", [*OK, "--lag", "5", "--layer", "7"], "layer 7"),
    "label": ("", [*OK, "--label", "joy"], "label joy; expected one of backtracking"),
    "target": ("", [*OK, "--target", "within"], "target within; expected one of token onset"),
    "solver": ("", [*OK, "--solver", "adam"], "'adam'"),
    "lag that is no number": ("", [*OK, "--lag", "soon"], "'soon'"),
    "empty prompt": ("", ["--prompt", " \n"], "an empty prompt"),
    "no prompt": ("", [], "--prompt"),
    "long prompt": ("", ["--prompt", "box " * 600], "tokens"),
    "unknown option": ("", [*OK, "--colour", "red"], "--colour"),
    "no tokens": ("", [*OK, "--max_new_tokens", "0"], "max_new_tokens 0"),
    "cold": ("", [*OK, "--temperature", "-1"], "temperature -1"),
    "all but cold": ("", [*OK, "--temperature", "1e-320"], "temperature 1e-320"),
    "temperature that is no number": ("", [*OK, "--temperature", "nan"], "temperature nan"),
    "mass": ("", [*OK, "--top_p", "0"], "top_p 0"),
    "seed": ("", [*OK, "--seed", "-1"], "seed -1"),
    "page in no folder": ("", [*OK, "--html", "gone/x.html"], "gone/x.html"),
    "page that is a folder": ("", [*OK, "--html", "."], "html ."),
    "model that is gone": ("", [*OK, "--model", "./gone"], "./gone"),
    "CUDA where there is none": ("", [*OK, "--device_map", "cuda:7"], "cuda:7"),
}


@pytest.mark.parametrize("kind, argv, told", CASES.values(), ids=CASES.keys())
def test_what_the_user_got_wrong_is_told_in_one_line(run_folder, tmp_path, capsys, monkeypatch, kind, argv, told):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["watch", str(broken_run(kind, run_folder, tmp_path)), *argv]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("streamprobe: ") and "\n" not in error and "; expected " in error and "; fix: " in error
    assert told in error
    assert os.listdir(tmp_path) == ["run"]


def test_probes_of_another_width_are_refused(run_folder, tmp_path, capsys):
    from transformers import LlamaConfig, LlamaForCausalLM

    LlamaForCausalLM(
        LlamaConfig(vocab_size=400, hidden_size=16, intermediate_size=16, num_hidden_layers=4, num_attention_heads=2)
    ).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    assert cli.main(["watch", str(run_folder), *OK, "--model", str(tmp_path)]) == 2
    assert "32 features and a model of hidden size 16" in capsys.readouterr().err


@pytest.mark.parametrize("adds", ["<s> $A", "<s> <s> $A", "$A </s>", "<s> $A </s>"])
@pytest.mark.parametrize("style", ["{problem}\n\n", "chat"])
def test_a_prompt_is_encoded_as_in_training(adds, style):
    from streamprobe.data.tokenize import tokenize

    template = "<s>{% for m in messages %}{{ m['content'] }}{% endfor %}\n\n"
    tokenizer = make_tokenizer(adds, chat_template=template)
    chain = tokenize(make_record("which box?", "okay so one"), tokenizer, [], TextOptions(style, "response", "ignore"))
    assert generation.encode("which box?", style, tokenizer, True).tolist() == chain.ids[: chain.start].tolist()
    plain = generation.encode("which box?", style, tokenizer, False).tolist()
    assert plain == [token for token in chain.ids[: chain.start].tolist() if token != tokenizer.bos_token_id]
