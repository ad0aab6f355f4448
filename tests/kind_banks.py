"""Probes of several kinds, made by hand: squares of linear logits, all layers side by side, and one that looks back."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from streamprobe.probes.joined import Joined
from streamprobe.probes.kind_bank import KindBank
from streamprobe.probes.kinds import KINDS, Kind
from streamprobe.probes.linear import ProbeBank
from streamprobe.probes.storage import group_of, pack_probes, read_about

NAMES = ("squares", "concat", "fading")
FADES = 0.7  # by which what a chain has said so far counts less a token later


@dataclass(frozen=True)
class Squares:
    """logit = (weight . acts + bias)^2 / 4 + weight . acts"""

    kind: str = "squares"
    joined: bool = False
    looks_back: bool = False

    def scorer(self, parts: Mapping[str, Tensor]) -> Any:
        def logits(acts: Tensor, chain: Tensor) -> Tensor:
            said = torch.einsum("nld,lkd->nlk", acts.float(), parts["weight"])
            return (said + parts["bias"]).square() / 4 + said

        return logits

    def mean_of_folds(self, parts: Mapping[str, Tensor], n: int) -> dict[str, Tensor]:
        assert n == 1
        return dict(parts)

    def n_features(self, parts: Mapping[str, Tensor]) -> int:
        return parts["weight"].shape[2]


@dataclass(frozen=True)
class Fading(Squares):
    """state_t = FADES state_(t-1) + tanh(weight . acts_t), logit = state_t + bias; derivatives are not kept."""

    kind: str = "fading"
    looks_back: bool = True

    def scorer(self, parts: Mapping[str, Tensor]) -> Any:
        states: dict[int, Tensor] = {}

        @torch.no_grad()
        def logits(acts: Tensor, chain: Tensor) -> Tensor:
            said = torch.einsum("nld,lkd->nlk", acts.float(), parts["weight"]).tanh()
            found = []
            for own, number in zip(said, chain.tolist(), strict=True):
                states[number] = FADES * states.get(number, torch.zeros_like(own)) + own
                found.append(states[number] + parts["bias"])
            return torch.stack(found)

        return logits


def add_kinds(patch: pytest.MonkeyPatch) -> None:
    """Makes the kinds known that are not the package's."""
    patch.setitem(KINDS, "squares", Kind("for tests", form=lambda _: Squares()))
    patch.setitem(KINDS, "fading", Kind("for tests, looking back", form=lambda _: Fading()))


def make_bank(linear: ProbeBank, kind: str, seed: int = 0) -> KindBank:
    """Random probes of a kind, of the layers and columns of linear ones."""
    random = torch.Generator().manual_seed(seed)
    form: Any = {"squares": Squares(), "concat": Joined("concat"), "fading": Fading()}[kind]
    n_layers, n_columns, width = linear.weight.shape
    shape = (1, n_columns, n_layers, width) if form.joined else (n_layers, n_columns, width)
    places = (1 if form.joined else n_layers, n_columns)
    parts = {"weight": torch.randn(shape, generator=random) / 4, "bias": torch.randn(places, generator=random) / 4}
    threshold = torch.zeros(places, dtype=torch.float64)
    return KindBank(form, linear.sites, linear.columns, parts, threshold, linear.solver)


def add_probes(folder: Path, linear: ProbeBank) -> dict[str, KindBank]:
    """Writes probes of all kinds beside the linear ones of a run in `folder`, and rows of them; returns them."""
    import csv

    about = {name: value for name, value in read_about(folder / "probes.safetensors").items() if name == "config"}
    banks = {kind: replace(make_bank(linear, kind), solver=linear.solver) for kind in NAMES}
    every = {linear.solver: linear} | {group_of(linear.solver, kind): bank for kind, bank in banks.items()}
    (folder / "probes.safetensors").write_bytes(pack_probes(every, about))
    rows = list(csv.DictReader((folder / "results.csv").open()))
    joined = [row | {"site": "", "layer": "", "kind": "concat"} for row in rows if row["layer"] == "0"]
    more = [row | {"kind": kind} for kind in ("squares", "fading") for row in rows]
    with (folder / "results.csv").open("w", newline="") as f:
        table = csv.DictWriter(f, list(rows[0]), lineterminator="\n")
        table.writeheader()
        table.writerows([*rows, *joined, *more])
    return banks
