"""What is judged: groups of probes that were trained together, with their logits of the test tokens.

Shapes: N tokens, L sites, K columns.
"""

from collections.abc import Collection
from typing import NamedTuple

from torch import Tensor

from streamprobe.evaluation.scores import Scored
from streamprobe.lags import Column
from streamprobe.probes.linear import LINEAR
from streamprobe.probes.nested import NESTED
from streamprobe.probes.sites import Site

GRIDS = ("threshold", "best_pass", "gradient_norm")  # of each group, [L, K]


class ScoredProbes(NamedTuple):
    """The probes of one job, and how they score the test tokens."""

    solver: str
    sites: list[Site]
    columns: list[Column]
    scored: Scored
    threshold: Tensor  # [L, K] the logit that validation chose
    half: Tensor  # [K] the logit at which the class-weighted probability is one half
    best_pass: Tensor  # [L, K]
    gradient_norm: Tensor  # [L, K]
    feed: str = ""  # the name of what they read
    penalty: Tensor | None = None  # [L, K] of a nested probe's layer, inf where it has none: see `gains`
    kind: str = LINEAR  # of the probes; of nested ones, of what they read beside the joint control

    @property
    def is_nested(self) -> bool:
        """Whether they read the joint control (the first site) and a layer each: they have no rows, but fill gains."""
        return self.feed.startswith(NESTED)

    def at(self, tokens: Tensor) -> "ScoredProbes":
        """The same for the tokens [N] where `tokens` is True alone, their chains counted anew from 0."""
        chosen = self.scored.at(tokens)
        _, chain = chosen.chain.unique(return_inverse=True)
        return self._replace(scored=chosen._replace(chain=chain))

    def without(self, controls: Collection[str]) -> "ScoredProbes | None":
        """The same without these controls; None where nothing else is left, or where they are part of every probe."""
        left_out = [site.is_control and site.name in controls for site in self.sites]
        if all(left_out) or (self.is_nested and any(left_out)):
            return None
        keep = [k for k, column in enumerate(self.columns) if column.control not in controls]
        scored = self.scored
        chosen = scored._replace(
            scores=scored.scores[:, :, keep], targets=scored.targets[:, keep], valid=scored.valid[:, keep]
        )
        known = [*GRIDS, *(["penalty"] if self.penalty is not None else [])]
        grids = {name: getattr(self, name)[:, keep] for name in known}
        return self._replace(columns=[self.columns[k] for k in keep], scored=chosen, half=self.half[keep], **grids)

    def real_columns(self) -> list[int]:
        """The numbers of the columns that are no controls, of the first seed; none of nested probes."""
        if self.is_nested:
            return []
        return [k for k, column in enumerate(self.columns) if not (column.control or column.seed)]

    def real(self) -> list[tuple[int, int]]:
        """The places (l, k) of the probes that are no controls, of the first seed, column by column."""
        return [(i, k) for k in self.real_columns() for i, site in enumerate(self.sites) if not site.is_control]
