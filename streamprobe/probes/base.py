"""What every kind of probe can do, so that results, files, the report and the live monitor take any of them.

Shapes: N tokens, L sites, K columns, D features.
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol, Self

from torch import Tensor

from streamprobe.lags import Column
from streamprobe.probes.sites import Site

# Logits [N, L, K] float32 of tokens as a trip brings them: what the sites hold [N, L, D], and the chain [N] int64 of
# each.  The tokens of a chain come in its order, those of one call side by side, in as many calls as it takes.
Scorer = Callable[[Any, Tensor], Tensor]


class Form(Protocol):
    """How a kind of probe that is not linear makes logits of its parts, tensors by name, each beginning with [L, K].

    `weight` and `bias` are among them.  To add a kind, write a module with such a class and a row in `kinds.KINDS`.
    """

    @property
    def kind(self) -> str:
        """What it is called in configs and files."""
        ...

    @property
    def joined(self) -> bool:
        """Whether one probe reads all layers, so that L is 1."""
        ...

    @property
    def looks_back(self) -> bool:
        """Whether a logit depends on earlier tokens of its chain."""
        ...

    def scorer(self, parts: Mapping[str, Tensor]) -> Scorer:
        """What gives logits of tokens in one trip."""
        ...

    def mean_of_folds(self, parts: Mapping[str, Tensor], n: int) -> dict[str, Tensor]:
        """The parts of probes whose logits are the means of those of n folds; columns stand fold by fold."""
        ...

    def n_features(self, parts: Mapping[str, Tensor]) -> int:
        """D: the width of what each site holds.  Raises ValueError for parts that do not go together."""
        ...


class Probes(Protocol):
    """The L x K probes of one kind and one solver: a probe for every site and column."""

    columns: list[Column]
    threshold: Tensor | None  # [L, K] the logit from which on a probe says yes; None until validation chose it
    solver: str
    about: Mapping[str, Any]  # what the file that they were in says of them; nothing if they were in none

    @property
    def kind(self) -> str:
        """What it is called in files."""
        ...

    @property
    def bias(self) -> Tensor:
        """[L, K]"""
        ...

    @property
    def sites(self) -> list[Site]:
        """Where they stand, [L]."""
        ...

    @property
    def reads(self) -> list[Site]:
        """What has to be read for them, in the order of `acts`; more than their sites where one reads all layers."""
        ...

    @property
    def layers(self) -> list[int]:
        """The numbers of the layers that are read, in their order."""
        ...

    @property
    def n_features(self) -> int:
        """D: the width of what each site holds."""
        ...

    def place(
        self, layer: Any, lag: int, label: str | None = None, target: str | None = None, *, site: str | None = None
    ) -> tuple[int, int]:
        """Where a probe lies, (l, k).  Raises InputError for a probe that these have not."""
        ...

    def probabilities(self, acts: Tensor) -> Tensor:
        """The sigmoids of `scores`, [N, L, K]."""
        ...

    def scores(self, acts: Tensor) -> Tensor:
        """Logits [N, L, K], float32, of what is read, [N, L, D]; where they look back, of the tokens of one chain."""
        ...

    def scorer(self) -> Scorer:
        """What gives logits of the tokens of one trip over chains."""
        ...

    def mean_of_folds(self, n: int) -> Self:
        """The probes whose logits are the means of those of n folds, whose columns stand fold by fold."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """What they are made of, each beginning with [L, K], by name: a file of probes holds these."""
        ...

    @classmethod
    def from_tensors(
        cls, sites: list[Site], columns: list[Column], tensors: Mapping[str, Tensor], *, solver: str, kind: str
    ) -> Self:
        """The probes again, which read these sites.  Raises ValueError for tensors that are no such probes."""
        ...

    def clone(self) -> Self:
        """A copy that shares no tensor with these."""
        ...

    def take(self, where: Tensor, other: Any) -> None:
        """Copies other's probes over these where `where` [L, K] is True."""

    def add_to_logits(self, added: Tensor) -> Self:
        """The same probes with `added` [K] added to every logit."""
        ...

    def choose(self, columns: list[int], threshold: Tensor) -> Self:
        """The probes of these columns, with their thresholds [L, len(columns)]."""
        ...

    def to(self, device: Any) -> Self:
        """These with their tensors on `device`."""
        ...
