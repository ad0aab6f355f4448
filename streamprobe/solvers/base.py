"""What the training loop asks of a solver, so that one method can be exchanged for another.

Shapes: N tokens, L layers, K columns, D hidden size.
"""

from typing import Protocol

from torch import Tensor

from streamprobe.activations.batch import Extras
from streamprobe.lags import Column
from streamprobe.probes.base import Probes
from streamprobe.probes.sites import Site


class Solver(Protocol):
    """Trains L x K probes, one chunk of tokens after another."""

    name: str
    shuffles: bool  # whether it wants tokens in random order; else they may come as they lie
    sites: list[Site]
    columns: list[Column]
    converged: Tensor  # [L, K] bool: probes that no further pass would change
    gradient_norm: Tensor  # [L, K] of the objective at the probes of `bank`; NaN where it is not known

    def begin(self, acts: Tensor | None, source: int) -> None:
        """Begins a pass, whose first tokens acts [N, L, D] are on the rank `source`; None: this rank has no token."""

    def step(self, acts: Tensor, targets: Tensor, valid: Tensor, extras: Extras | None = None) -> None:
        """Trains on acts [N, L, D], targets [N, K] bool and valid [N, K] bool.

        extras: the fold of each where there are several, and its chance, by which some tokens may be drawn.
        """

    def end_part(self) -> None:
        """Ends a part of a pass: what is summed does not depend on which other parts this rank is given."""

    def end_pass(self) -> None:
        """Ends a pass: all training tokens have been seen once more, each on one rank."""

    def bank(self) -> Probes:
        """The probes as they are now, in raw activation space, sharing no memory with the solver."""
        ...

    @property
    def resumable(self) -> bool:
        """Whether `state`, between two passes, holds all that the next one needs."""
        ...

    def loss(self) -> Tensor:
        """Mean loss [L, K] of the tokens since the last call, each taken before the solver trained on it."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Everything that a later `load` needs to go on bit for bit, where it is `resumable`."""
        ...

    def load(self, state: dict[str, Tensor]) -> None:
        """Takes up where the solver that gave `state` stood.  Raises InputError for the state of another one."""
