"""The training of the embedded model, in small."""

import pytest
import torch

from streamprobe.demo import task
from streamprobe.demo.model import answer, make_model, make_tokenizer
from streamprobe.demo.train import batches, learning_rate, save, train


def test_training_lowers_the_loss_and_repeats_bit_for_bit(tmp_path):
    def once() -> tuple[list[float], dict[str, torch.Tensor]]:
        model = make_model(1, 2, 32)
        return train(model, make_tokenizer(), steps=60, batch_size=8, peak=1e-2, seed=1), model.state_dict()

    (losses, weights), (again, same) = once(), once()
    assert sum(losses[-5:]) / 5 < 0.7 * losses[0] and losses == again
    assert all(torch.equal(weights[name], same[name]) for name in weights)
    first, other = (next(batches(make_tokenizer(), 4, seed))[0] for seed in (1, 2))
    assert first.shape != other.shape or not torch.equal(first, other)


def test_what_is_saved_is_what_is_measured(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, problems = make_tokenizer(), task.make_problems(3, task.HELD_OUT[4])
    model = save(make_model(2, 2, 32).eval(), tokenizer, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
    assert answer(model, tokenizer, problems) == answer(loaded, AutoTokenizer.from_pretrained(tmp_path), problems)
    alone = [answer(model, tokenizer, [problem])[0] for problem in problems]  # padding changes nothing
    assert alone == answer(model, tokenizer, problems)


def test_the_learning_rate_rises_and_falls():
    rates = [learning_rate(step, 300, 1.0) for step in range(300)]
    assert rates[:50] == pytest.approx([step / 50 for step in range(1, 51)]) and rates[50:200] == [1.0] * 150
    assert rates[200:] == sorted(rates[200:], reverse=True) and 0 < rates[-1] <= 0.01
