"""What every kind of probe can do, so that results, files, the report and the live monitor take any of them.

Shapes: N tokens, L sites, K columns, D features.
"""

from collections.abc import Mapping
from typing import Any, Protocol, Self

from torch import Tensor

from streamprobe.lags import Column
from streamprobe.probes.sites import Site


class Probes(Protocol):
    """The L x K probes of one kind and one solver: a probe for every site and column.

    To add a kind, write a module with such a class and a row in `storage.KINDS`.
    """

    kind: str  # what it is called in files
    sites: list[Site]
    columns: list[Column]
    bias: Tensor  # [L, K]
    threshold: Tensor | None  # [L, K] the logit from which on a probe says yes; None until validation chose it
    solver: str
    about: Mapping[str, Any]  # what the file that they were in says of them; nothing if they were in none

    @property
    def layers(self) -> list[int]:
        """The numbers of the layers that are read, in the order of the sites."""
        ...

    @property
    def n_features(self) -> int:
        """D: the width of what each site holds."""
        ...

    def place(self, layer: int, lag: int, label: str | None = None, target: str | None = None) -> tuple[int, int]:
        """Where a probe lies, (l, k).  Raises InputError for a probe that these have not."""
        ...

    def probabilities(self, acts: Tensor) -> Tensor:
        """The sigmoids of `scores`, [N, L, K]."""
        ...

    def scores(self, acts: Tensor) -> Tensor:
        """Logits [N, L, K], float32, of what the sites hold, [N, L, D]."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """What they are made of, each beginning with [L, K], by name: a file of probes holds these."""
        ...

    @classmethod
    def from_tensors(cls, sites: list[Site], columns: list[Column], tensors: dict[str, Tensor], solver: str) -> Self:
        """The probes again.  Raises ValueError for tensors that are no such probes."""
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
