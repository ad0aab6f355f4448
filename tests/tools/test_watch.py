"""Watching a model write: the same tokens as without, and at each the probabilities of a plain pass over the text."""

import math
import threading

import pytest
import torch
from builders import make_record, make_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from streamprobe.data.tokenize import TextOptions
from streamprobe.lags import make_columns
from streamprobe.probes.linear import ProbeBank
from streamprobe.probes.sites import layer_sites
from streamprobe.tools import generation
from streamprobe.tools import watch as monitor
from streamprobe.tools.watch import watch

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


def marked(bank, *values):
    pieces = generation.Pieces(Letters(), [])
    steps = monitor.read_steps(probabilities(*values), bank, (0, 1), pieces)
    return list(monitor.marks(steps, monitor.alarm_threshold(bank, (0, 1)), pieces))


def test_a_step_has_the_probability_of_its_token_and_the_text_that_it_completes(bank):
    pieces = generation.Pieces(Letters(), [])
    steps = list(monitor.read_steps(probabilities(0.1, 0.5, 0.9, 0.2, math.nan), bank, (0, 1), pieces))
    assert [s.token for s in steps] == [10, 11, 12, 13, 14] and [s.text for s in steps] == ["a", "b", "", "d", "e"]
    assert [s.alarm for s in steps] == [False, True, True, False, False]  # the threshold is .5
    assert math.isnan(steps[-1].probability) and round(steps[2].probability, 3) == 0.9
    assert list(steps[0].lags) == [-2, 0, 4] and round(steps[0].lags[0], 3) == 0.1 and steps[0].lags[4] == 0.5


def test_a_mark_has_the_highest_probability_of_its_tokens_and_the_alarm_of_its_threshold(bank):
    shown = marked(bank, 0.1, 0.5, 0.9, 0.2, math.nan)
    assert [m.text for m in shown] == ["a", "b", "d", "e"]
    assert [round(m.probability, 3) for m in shown] == [0.1, 0.5, 0.9, 0.0]
    assert [m.alarm for m in shown] == [False, True, True, False]
    assert [round(m.level, 3) for m in shown] == [0.1, 0.5, 0.9, 0.0]
    high = ProbeBank(bank.layers, bank.columns, bank.weight, bank.bias, bank.threshold + 3)
    assert not any(m.alarm or m.level >= 0.5 for m in marked(high, 0.1, 0.9))


@given(st.floats(0, 1), st.floats(1e-6, 1 - 1e-6))
def test_the_threshold_is_in_the_middle_of_the_scale_wherever_it_is(probability, threshold):
    level = monitor.level_of(probability, threshold)
    assert monitor.level_of(0, threshold) == 0 and monitor.level_of(1, threshold) == 1 and 0 <= level <= 1
    assert monitor.level_of(threshold, threshold) == 0.5
    assert (level >= 0.5 - 1e-9) if probability >= threshold else (level <= 0.5 + 1e-9)
    if 1e-9 < probability < 1 - 1e-9:
        odds, alarm = probability / (1 - probability), threshold / (1 - threshold)
        assert math.isclose(level, 1 / (1 + alarm / odds), rel_tol=1e-6)


def test_an_alarm_at_a_low_probability_is_missed_without_the_scale():
    """Negative control: on a scale of the probability itself a low alarm is at its bottom."""
    assert monitor.level_of(0.08, 0.06) > 0.5 > 0.08
    assert monitor.level_of(1.0, 1.0) == monitor.level_of(0.0, 0.0) == 0.5  # the ends, at which there are no odds


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
