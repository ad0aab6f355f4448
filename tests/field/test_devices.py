"""Probes and `watch` take tensors of any device; `meta` stands for one that is not the model's."""

from typing import Any

import torch
from transformers import AutoModelForCausalLM

from streamprobe import load_probes, watch
from streamprobe.probes import ProbeBank

AWAY = torch.device("meta")


def test_scores_lie_where_the_activations_do(run_folder: Any) -> None:
    probes = load_probes(run_folder)
    acts = torch.randn(5, 3, 32, dtype=torch.bfloat16)
    for scores in (probes.scores, probes.probabilities):
        there = scores(acts.to(AWAY))
        assert there.device == AWAY and there.shape == scores(acts).shape == (5, 3, 6)
        assert scores(acts).device == probes.weight.device  # the probes have not been moved


def test_scores_lie_elsewhere_without_moving_the_probes(bank: ProbeBank) -> None:
    """Negative control: a product of tensors of two devices is no product on the activations' device."""
    acts = torch.randn(3, 5, 32, device=AWAY)
    assert torch.baddbmm(bank.bias[:, None], acts, bank.weight.mT).device != AWAY


class Elsewhere(torch.Tensor):
    """A tensor on the CPU that says it lies elsewhere until it is moved."""

    moved = 0

    def to(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        Elsewhere.moved += 1
        return self.as_subclass(torch.Tensor).to(*args, **kwargs)


def test_watch_moves_the_mask_to_the_model(model_dir: str, bank: ProbeBank) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_dir).eval()
    ids = torch.tensor([[2, 2, 5, 9], [4, 5, 6, 7]])
    mask = (ids != 2).long()

    def written(mask: torch.Tensor) -> list[list[int]]:
        steps = watch(model, bank, ids, 5, attention_mask=mask, do_sample=False, pad_token_id=2, eos_token_id=None)
        return [token.tolist() for token, _ in steps]

    assert written(mask.as_subclass(Elsewhere)) == written(mask)
    assert Elsewhere.moved >= 1
