"""The usual way, to measure against: activations on disk first, then one probe after another.

Kinder to it than the original experiment: no LM head, no DataLoader, no evaluation.

Shapes: N tokens, K columns, D hidden size.
"""

import pickle
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from streamprobe.data.tokenize import Chain
from streamprobe.lags import Column, LagBuffer


def _path(folder: Path, chain: Chain, layer: int) -> Path:
    return folder / f"{chain.id}-{layer}.pickle"


@torch.no_grad()
def extract(model: nn.Module, chains: Sequence[Chain], layers: Sequence[int], folder: Path) -> None:
    """The full model over one chain at a time; the hidden states of each layer go into a file of their own."""
    device = next(model.parameters()).device
    for chain in chains:
        found = model(input_ids=chain.ids[None].to(device), output_hidden_states=True, use_cache=False)
        for layer in layers:
            acts = found.hidden_states[layer + 1][0].cpu()  # [T, D]
            with open(_path(folder, chain, layer), "wb") as f:  # as bytes: numpy has no bfloat16
                pickle.dump(acts.view(torch.uint8).numpy(), f, protocol=pickle.HIGHEST_PROTOCOL)


def load(
    chains: Sequence[Chain],
    layer: int,
    column: Column,
    *,
    labels: Sequence[str],
    dtype: torch.dtype,
    folder: Path,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """What one probe trains on: activations [N, D] in float32 and targets [N], from the files of `extract`."""
    buffer = LagBuffer([column], labels)
    acts, targets = [], []
    for chain in chains:
        with open(_path(folder, chain, layer), "rb") as f:
            stored = torch.from_numpy(pickle.load(f)).view(dtype)
        pairs = buffer.push(stored, chain.codes, chain.support, last=True)
        valid = pairs.valid[:, 0]
        acts.append(pairs.acts[valid].float())
        targets.append(pairs.targets[valid, 0].float())
    return torch.cat(acts).to(device), torch.cat(targets).to(device)


def fit_epoch(
    acts: Tensor,
    targets: Tensor,
    positive_weight: float,
    l2: float,
    *,
    batch_size: int = 64,
    learning_rate: float = 1e-3,
) -> nn.Linear:
    """One epoch of one probe on acts [N, D] and targets [N]: the recipe of the original experiment."""
    probe = nn.Linear(acts.shape[1], 1).to(acts.device)
    loss_of = nn.BCEWithLogitsLoss(pos_weight=torch.tensor(positive_weight, device=acts.device))
    adam = torch.optim.Adam(probe.parameters(), lr=learning_rate)
    for rows in torch.randperm(len(targets), device=acts.device).split(batch_size):
        loss = loss_of(probe(acts[rows])[:, 0], targets[rows]) + l2 * probe.weight.square().sum()
        adam.zero_grad()
        loss.backward()
        adam.step()
    return probe


def has_probelab() -> bool:
    """Whether the package probelab is installed."""
    return find_spec("probelab") is not None


def fit_probelab(acts: Tensor, targets: Tensor, valid: Tensor, l2: float) -> list[nn.Module]:
    """probelab's Logistic (L-BFGS, classes not weighted) on acts [N, D], for one column of targets [N, K] at a time.

    Each maps activations to logits.
    """
    from probelab import Activations
    from probelab.probes import Logistic

    probes: list[nn.Module] = []
    for k in range(targets.shape[1]):
        own = Activations.from_tensor(acts[valid[:, k]].float())
        probe = Logistic(C=1 / (2 * len(own.data) * l2), device=str(acts.device))
        probes.append(probe.fit(own, targets[valid[:, k], k].long()))
    return probes
