"""Answers to several prompts at once, as token ids."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from streamprobe.errors import InputError
from streamprobe.model.sampling import Sampling
from streamprobe.tools.writing import seeded, write

GREEDY = Sampling().options
PROMPTS = [torch.tensor([0, 30, 40, 50]), torch.tensor([0, 60]), torch.tensor([0, 70, 80])]


@pytest.fixture
def model(model_dir):
    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()


def test_answers_are_those_of_each_prompt_alone(model, tokenizer):
    together = write(model, tokenizer, PROMPTS, max_new_tokens=6, options=GREEDY)
    alone = [write(model, tokenizer, [p], max_new_tokens=6, options=GREEDY)[0] for p in PROMPTS]
    assert together == alone and all(len(ids) == 6 for ids in together)


def test_an_answer_ends_before_the_token_that_ends_it(model, tokenizer):
    """One of those that come with the model, or the tokenizer's own where none does."""
    plain = write(model, tokenizer, PROMPTS, max_new_tokens=6, options=GREEDY)
    model.generation_config.eos_token_id = [plain[0][2], 399]
    ended = write(model, tokenizer, PROMPTS, max_new_tokens=6, options=GREEDY)
    assert ended[0] == plain[0][: plain[0].index(plain[0][2])]
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    tokenizer_ends = plain[1][1]
    own = type("Own", (), {"pad_token_id": 2, "eos_token_id": tokenizer_ends})
    assert write(model, own, PROMPTS, max_new_tokens=6, options=GREEDY)[1] == plain[1][: plain[1].index(tokenizer_ends)]


def test_answers_end_where_it_is_stopped(model, tokenizer):
    asked = iter([False, False, True])
    ids = write(model, tokenizer, PROMPTS, max_new_tokens=6, options=GREEDY, stopped=lambda: next(asked))
    assert [len(each) for each in ids] == [3, 3, 3]


def test_logits_that_are_no_numbers_are_reported_in_a_line(model, tokenizer):
    model.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(InputError, match="LlamaForCausalLM, which cannot write") as caught:
        write(model, tokenizer, PROMPTS, max_new_tokens=3, options=Sampling(temperature=1.0).options)
    assert "\n" not in str(caught.value)


def test_a_seed_holds_in_its_context_alone():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    with seeded(5):
        first = torch.rand(2)
    assert torch.equal(torch.rand(2), expected)
    with seeded(5):
        assert torch.equal(torch.rand(2), first)


def test_what_comes_with_the_model_changes_no_draw(model, tokenizer):
    plain = write(model, tokenizer, PROMPTS, max_new_tokens=6, options=GREEDY)
    model.generation_config.update(repetition_penalty=50.0, num_beams=3, do_sample=True, top_k=3)
    assert write(model, tokenizer, PROMPTS, max_new_tokens=6, options=GREEDY) == plain
    without = {name: value for name, value in GREEDY.items() if name != "repetition_penalty"}
    assert write(model, tokenizer, PROMPTS, max_new_tokens=6, options=without) != plain  # negative control
