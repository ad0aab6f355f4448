"""Trains the embedded model from scratch.

python -m streamprobe.demo.train                                    # streamprobe/demo/model/: some minutes
python -m streamprobe.demo.train --out DIR --steps N --seed 1

Problems are made on the way, so few are seen twice.  The loss is that of the response alone.  The weights are saved in
bfloat16, and the share of problems solved is measured with the weights that are saved.
"""

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor

from streamprobe.demo import MODEL
from streamprobe.demo.model import PROMPT, Example, make_batch, make_model, make_tokenizer, share_solved
from streamprobe.demo.muon import Muon
from streamprobe.demo.task import HELD_OUT, SIZES, TRAINING, make_problem, make_problems, solve

WARM_UP = 50  # steps
SORTED = 8  # so many batches are drawn at once and sorted by length, which saves padding

CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---

# A model organism of backtracking

A Llama of {parameters:,} parameters ({blocks} blocks, hidden size {hidden}, one token per word) that searches for a
subset of numbers with a given sum, in plain words, dead ends and returns included, in the manner of Stream of Search
(Gandhi et al., 2024, arXiv 2404.03683).  It is what `python run.py` probes; it is good for nothing else.

    reach 27 with 15 13 14 ?

    i look for 27 . take 15 , 12 left . 13 is too big . wait , 14 is too big . wait , drop 15 , 27 left .
    13 fits , 14 left . so take 14 and 0 is left . so 13 + 14 = 27 .

Task: `streamprobe/demo/task.py`.  Problems have {sizes} different numbers and are split by a hash, so that no problem
is for training and for anything else.  Training: `python -m streamprobe.demo.train{arguments}`, {steps:,} steps of
{batch} fresh problems, Muon and AdamW, loss on the response alone, {minutes:.0f} minutes on {device}.

| | |
|---|---|
| loss, mean of the last 50 steps | {loss:.5f} nats a token |
| {n} held-out problems solved greedily, every step right | {solved:.1%} |
| {n} problems with {more} numbers, one more than in training | {harder:.1%} |

Both shares are of the bfloat16 weights in this folder, computed in float32.
"""


def batches(tokenizer: Any, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless token ids and labels, int64 [size, T]; each batch holds responses of about the same length."""
    rng = Random(TRAINING[seed])
    while True:
        examples = []
        for _ in range(SORTED * size):
            problem = make_problem(rng)
            response = " ".join(text for _, text in solve(problem))
            examples.append(Example(PROMPT.format(problem=problem), response))
        examples.sort(key=lambda example: len(example.response.split()))
        for i in rng.sample(range(SORTED), SORTED):
            yield make_batch(examples[i * size : (i + 1) * size], tokenizer)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over WARM_UP steps, then the peak, then down a line over the last third."""
    return peak * min(1, (step + 1) / WARM_UP, 3 * (steps - step) / steps)


def make_optimizers(model: Any) -> list[torch.optim.Optimizer]:
    """Muon for the weight matrices of the blocks, AdamW for the embedding and the norms."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if all(p is not m for m in matrices)]
    return [Muon(matrices), torch.optim.AdamW(rest, betas=(0.9, 0.98), weight_decay=0.0)]


def train(model: Any, tokenizer: Any, *, steps: int, batch_size: int, peak: float, seed: int) -> list[float]:
    """Trains `model` in place on its device; returns the loss of every step in nats a token.

    batch_size: problems in a step; peak: the highest learning rate.
    """
    optimizers = make_optimizers(model)
    losses: list[float] = []
    began = time.perf_counter()
    model.train()
    for step, (ids, labels) in zip(range(steps), batches(tokenizer, batch_size, seed), strict=False):
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = learning_rate(step, steps, peak)
        loss = model(input_ids=ids.to(model.device), labels=labels.to(model.device), use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        if step % 50 == 49:
            mean, seconds = sum(losses[-50:]) / 50, time.perf_counter() - began
            print(f"step {step + 1:>6} of {steps}   loss {mean:.5f}   {seconds:>6.0f} s", flush=True)
    model.eval()
    return losses


def save(model: Any, tokenizer: Any, folder: Path) -> Any:
    """Writes the bfloat16 weights and the tokenizer; returns the model with these weights in float32."""
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model.float()


def write_card(folder: Path, model: Any, **facts: Any) -> None:
    """Writes the model card."""
    text = CARD.format(
        parameters=model.num_parameters(),
        blocks=model.config.num_hidden_layers,
        hidden=model.config.hidden_size,
        sizes=f"{min(SIZES)} to {max(SIZES)}",
        more=max(SIZES) + 1,
        **facts,
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=MODEL, help="folder of the model")
    parser.add_argument("--steps", type=int, default=1000, help="optimizer steps")
    parser.add_argument("--batch", type=int, default=64, help="problems in a step")
    parser.add_argument("--learning_rate", type=float, default=4e-3, help="highest learning rate")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and problems")
    given = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} CPU thread(s)"
    tokenizer, model = make_tokenizer(), make_model(given.seed).to(device)
    print(f"{model.num_parameters():,} parameters on {name}", flush=True)
    began = time.perf_counter()
    how = {"steps": given.steps, "batch_size": given.batch, "peak": given.learning_rate, "seed": given.seed}
    losses = train(model, tokenizer, **how)
    minutes = (time.perf_counter() - began) / 60
    model = save(model, tokenizer, given.out)
    fresh, larger = make_problems(200, HELD_OUT[0]), make_problems(200, HELD_OUT[1], [max(SIZES) + 1])
    solved, harder = (share_solved(model, tokenizer, problems) for problems in (fresh, larger))
    loss = sum(losses[-50:]) / len(losses[-50:])
    changed = [f" --{k} {v}" for k, v in vars(given).items() if k != "out" and v != parser.get_default(k)]
    measured = {"loss": loss, "n": len(fresh), "solved": solved, "harder": harder, "minutes": minutes, "device": name}
    write_card(given.out, model, arguments="".join(changed), steps=given.steps, batch=given.batch, **measured)
    print(f"loss {loss:.5f}   solved {solved:.1%}   one number more {harder:.1%}   {minutes:.1f} min")


if __name__ == "__main__":
    main()
