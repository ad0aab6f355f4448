"""The demo's tokenizer, and the embedded model, which solves what it was trained for."""

import torch

from streamprobe.demo import task
from streamprobe.demo.model import PROMPT, Example, make_batch, make_model, make_tokenizer, share_solved
from streamprobe.demo.train import MODEL


def test_a_token_is_a_word_and_knows_its_characters():
    tokenizer = make_tokenizer()
    row = task.make_rows(1, task.PROBING.start)[0]
    text = PROMPT.format(problem=row["problem"]) + row["reasoning_chain"]
    encoded = tokenizer(text, return_offsets_mapping=True)
    assert tokenizer.decode(encoded["input_ids"]).split() == ["<s>", *text.split()]
    assert [text[start:end] for start, end in encoded["offset_mapping"][1:]] == text.split()
    long, short = (
        Example(PROMPT.format(problem=row["problem"]), row["reasoning_chain"]),
        Example("reach 5 ?\n\n", "so 5"),
    )
    ids, labels = make_batch([long, short], tokenizer)
    assert tokenizer.decode(ids[0][labels[0] >= 0]) == row["reasoning_chain"] + " </s>"
    assert tokenizer.decode(ids[1][labels[1] >= 0]) == "so 5 </s>"
    assert torch.equal(ids[labels >= 0], labels[labels >= 0])


def test_the_embedded_model_is_small_and_solves_held_out_problems():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert sum(path.stat().st_size for path in MODEL.iterdir()) < 4_000_000
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    assert model.num_parameters() <= 1_500_000
    assert tokenizer.get_vocab() == make_tokenizer().get_vocab()
    assert share_solved(model, tokenizer, task.make_problems(60, task.HELD_OUT[2])) >= 0.9


def test_solving_fails_without_training():
    assert share_solved(make_model(0, 2, 32).eval(), make_tokenizer(), task.make_problems(10, task.HELD_OUT[3])) == 0
