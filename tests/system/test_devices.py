"""Probes and `watch` take tensors of any device; `meta` stands for one that is not the model's."""

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from streamprobe import load_probes, watch
from streamprobe.probes.linear import ProbeBank

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
    """A tensor on the CPU of which nothing can be computed until it is moved."""

    @classmethod
    def __torch_function__(cls, function: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is not torch.Tensor.to:
            raise RuntimeError("tensors on two devices")
        with torch._C.DisableTorchFunctionSubclass():
            return args[0].to(*args[1:], **kwargs or {}).clone().as_subclass(torch.Tensor)


def test_watch_moves_the_mask_to_the_model(model_dir: str, bank: ProbeBank) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_dir).eval()
    ids = torch.tensor([[2, 2, 5, 9], [4, 5, 6, 7]])
    mask = (ids != 2).long()
    options: dict[str, Any] = {"do_sample": False, "pad_token_id": 2, "eos_token_id": None}

    def written(mask: torch.Tensor) -> list[list[int]]:
        return [token.tolist() for token, _ in watch(model, bank, ids, 5, attention_mask=mask, **options)]

    assert written(mask.as_subclass(Elsewhere)) == written(mask)
    with pytest.raises(RuntimeError, match="two devices"):  # negative control: `generate` moves nothing
        model.generate(ids, attention_mask=mask.as_subclass(Elsewhere), max_new_tokens=5, **options)
