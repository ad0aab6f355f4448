"""What a probe must beat, made of the same chains and fed by the same passes: a row for each control.

None of them knows anything of the tokens after t, but for `joint+chain`.  To add one, write a module with its function
and a row in CONTROLS: config, help, training, results, charts and docs read the row.

Shapes: T tokens in a chain, N tokens of any chains, C labels, p numbers that are stored, P features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from streamprobe.data.tokenize import Chain
    from streamprobe.lags import Column


def later(module: str, name: str) -> Callable[..., Any]:
    """A function of a module of this folder, imported when it is called: torch takes seconds, and help needs none."""
    return lambda *given: getattr(import_module(f"streamprobe.controls.{module}"), name)(*given)


def at_every_lag(column: Column) -> bool:
    """A control that is a fair one for every column."""
    return True


def ahead_only(column: Column) -> bool:
    """A control that sees the label at t: it knows the answer unless that lies ahead."""
    return column.lag > 0


@dataclass(frozen=True)
class Control:
    """One row of the table; exactly one of `features`, `relabel` and `embedded` says how it is made."""

    about: str  # what it is given at token t, for help, report and docs
    marker: str  # of its curve, as matplotlib calls it
    applies: Callable[[Column], bool] = at_every_lag  # to which columns
    features: Callable[[Chain, int], Tensor] | None = None  # [T, p] float32 of a chain with codes of C labels
    expand: Callable[[Tensor], Tensor] | None = None  # of these [N, p], on any device, the features [N, P]; None: as is
    extends: str = ""  # the control whose [T, p], layers and [N, P] stand before its own, and are there once for both
    layers: Mapping[str, Callable[[Any, Tensor, int], Tensor]] = field(default_factory=dict)  # embedded, before these
    relabel: Callable[[Tensor, Tensor, Any], Tensor] | None = None  # see `permuted`
    embedded: Callable[[Any, Tensor, int], Tensor] | None = None  # a layer made of embeddings: see `embedding`
    within: bool = False  # whether it is made of how labels change within a text: where they do not, it knows them
    under_lift: bool = True  # whether it is one of those of which a lift is over the best


GIVEN_TO_JOINT = {"text": later("embedding", "recent_tokens"), "order": later("embedding", "last_tokens")}

CONTROLS = {
    "embed": Control(
        "the token's embedding: what the current word gives", "s", embedded=later("embedding", "this_token")
    ),
    "text": Control(
        "the mean embeddings of the last 8, 32 and 128 tokens, reduced to a layer's size: what recent words give",
        "^",
        embedded=later("embedding", "recent_tokens"),
    ),
    "position": Control(
        "the token's place in the response, as features of which any piecewise linear function is a weighted sum",
        "D",
        features=later("position", "position_features"),
        expand=later("position", "expand_position"),
    ),
    "persistence": Control(
        "the label at t, and the time since its last section began or ended: what is known to someone who reads along "
        "with the annotator's labels (lags above 0 only: at others it knows the answer)",
        "v",
        applies=ahead_only,
        features=later("persistence", "persistence_features"),
        expand=later("persistence", "expand_ages"),
        within=True,
    ),
    "permuted": Control(
        "the probed layer, for labels turned around the circle of each chain by a random number of tokens: what the "
        "chain as a whole gives",
        "x",
        relabel=later("permuted", "permute_labels"),
        within=True,
    ),
    "joint": Control(
        "at once text, the last four tokens in order, position, what persistence has for every label of the data, how "
        "often each occurred so far, and the time since a sentence ended (lags above 0 only)",
        "P",
        applies=ahead_only,
        features=later("joint", "joint_features"),
        expand=later("joint", "expand_joint"),
        layers=GIVEN_TO_JOINT,
        within=True,
        under_lift=False,
    ),
    "joint+chain": Control(
        "the same, and how often each label occurs in the whole chain, also after t: more than can be known, which can "
        "only favour the control (lags above 0 only)",
        "*",
        applies=ahead_only,
        features=later("joint", "chain_rates"),
        expand=later("joint", "expand_with_rates"),
        extends="joint",
        layers=GIVEN_TO_JOINT,
        within=True,
        under_lift=False,
    ),
}
