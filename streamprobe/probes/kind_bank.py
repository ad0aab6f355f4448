"""Probes of a kind that is not linear, all of a run as stacked tensors.

Shapes: N tokens, L sites, K columns, D features.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from streamprobe.lags import Column
from streamprobe.probes.base import Form, Scorer
from streamprobe.probes.describe import describe
from streamprobe.probes.kinds import form_of
from streamprobe.probes.places import place_of
from streamprobe.probes.sites import ALL_LAYERS, Site


@dataclass(repr=False)
class KindBank:
    """The probes of one kind: `form` makes their logits of their parts, each a tensor that begins with [L, K]."""

    form: Form
    reads: list[Site]
    columns: list[Column]
    parts: dict[str, Tensor]
    threshold: Tensor | None = None  # [L, K] the logit from which on a probe says yes; None until validation chose it
    solver: str = ""
    about: Mapping[str, Any] = field(default_factory=dict)  # what the file that they were in says: see `load_probes`

    def __repr__(self) -> str:
        return describe(self)

    @property
    def kind(self) -> str:
        """What it is called in files."""
        return self.form.kind

    @property
    def sites(self) -> list[Site]:
        """Where they stand: at what they read, or at all layers."""
        return [ALL_LAYERS] if self.form.joined else self.reads

    @property
    def layers(self) -> list[int]:
        """The numbers of the layers that are read, in their order."""
        return [site.layer for site in self.reads if site.layer is not None]

    @property
    def n_features(self) -> int:
        """D: the width of what each site holds."""
        return self.form.n_features(self.parts)

    @property
    def bias(self) -> Tensor:
        """[L, K]"""
        return self.parts["bias"]

    @property
    def weight(self) -> Tensor:
        """What is linear of them: [L, K, D], or [1, K, L, D] of probes that read all layers."""
        return self.parts["weight"]

    def scores(self, acts: Tensor) -> Tensor:
        """Logits [N, L, K], float32, of activations [N, L, D]; where they look back, of the tokens of one chain."""
        return self.scorer()(acts, torch.zeros(len(acts), dtype=torch.int64, device=acts.device))

    def scorer(self) -> Scorer:
        """What gives logits of the tokens of one trip: see `Probes`."""
        return self.form.scorer(self.parts)

    def probabilities(self, acts: Tensor) -> Tensor:
        """Probabilities [N, L, K], float32: see `scores`."""
        return self.scores(acts).sigmoid()

    def score(self, model: Any, tokenizer: Any, texts: Any, **options: Any) -> Any:
        """Probabilities at every token of texts: `streamprobe.score` of these probes."""
        import streamprobe  # by the package's front door: what lets a model read lies above this folder

        return streamprobe.score(self, model, tokenizer, texts, **options)

    def place(
        self,
        layer: int | None,
        lag: int,
        label: str | None = None,
        target: str | None = None,
        *,
        site: str | None = None,
    ) -> tuple[int, int]:
        """Where a probe lies, (l, k): see `place_of`."""
        return place_of(self.sites, self.columns, layer=layer, lag=lag, label=label, target=target, site=site)

    def tensors(self) -> dict[str, Tensor]:
        """The parts."""
        return dict(self.parts)

    @classmethod
    def from_tensors(
        cls, sites: list[Site], columns: list[Column], tensors: Mapping[str, Tensor], *, solver: str, kind: str
    ) -> "KindBank":
        """The probes again, which read these sites.  Raises ValueError for tensors that are no such probes."""
        form = form_of(kind)
        shape = (1 if form.joined else len(sites), len(columns))
        if any(tuple(tensor.shape[:2]) != shape for tensor in tensors.values()):
            raise ValueError(f"tensors that are no grid of {shape[0]} layers x {shape[1]} columns")
        form.n_features(tensors)
        return cls(form, sites, columns, {name: each.float() for name, each in tensors.items()}, solver=solver)

    def mean_of_folds(self, n: int) -> "KindBank":
        """The probes whose logits are the means of those of n folds, whose columns stand fold by fold."""
        parts = self.form.mean_of_folds(self.parts, n)
        return replace(self, columns=self.columns[: len(self.columns) // n], parts=parts, threshold=None)

    def clone(self) -> "KindBank":
        """A copy that shares no tensor with these."""
        return self._with(Tensor.clone)

    def take(self, where: Tensor, other: Any) -> None:
        """Copies other's probes over these where `where` [L, K] is True."""
        for name, ours in self.parts.items():
            wide = where.view(*where.shape, *[1] * (ours.dim() - 2))
            ours.copy_(torch.where(wide, other.parts[name], ours))

    def add_to_logits(self, added: Tensor) -> "KindBank":
        """The same probes with `added` [K] added to every logit."""
        return replace(self, parts=self.parts | {"bias": self.bias + added})

    def choose(self, columns: list[int], threshold: Tensor) -> "KindBank":
        """The probes of these columns, with their thresholds [L, len(columns)]."""
        chosen = self._with(lambda tensor: tensor[:, columns])
        return replace(chosen, columns=[self.columns[k] for k in columns], threshold=threshold)

    def to(self, device: Any) -> "KindBank":
        """These with their tensors on `device`."""
        return self._with(lambda tensor: tensor.to(device))

    def _with(self, change: Callable[[Tensor], Tensor]) -> "KindBank":
        """These with every tensor changed."""
        threshold = None if self.threshold is None else change(self.threshold)
        return replace(self, parts={name: change(each) for name, each in self.parts.items()}, threshold=threshold)
