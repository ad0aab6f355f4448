"""Where a stream stands between two rounds, as a checkpoint holds it."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from streamprobe.controls.embedding import EmbeddingLayers
from streamprobe.run.checkpoint import Checkpoint
from streamprobe.run.memory_plan import Kept

NO_PLAN = Kept(1, False, False)  # every report plans anew


@dataclass
class Reached:
    """How far a stream has come."""

    rounds: int = 0
    tokens: int = 0  # of training chains
    reports: int = 0
    section_labels: list[str] = field(default_factory=list)
    controls: list[str] = field(default_factory=list)  # that do not know the labels
    counts: dict[str, Any] = field(default_factory=dict)  # what became of every chain that was read
    names: list[str] = field(default_factory=list)  # of tags in them
    stream: dict[str, Any] = field(default_factory=dict)  # where the source stands


def make_checkpoint(
    reached: Reached,
    states: Mapping[str, dict[str, Tensor]],
    embedded: EmbeddingLayers | None,
    facts: dict[str, Any],
) -> Checkpoint:
    """A checkpoint of a stream, given the states of its samples and learners."""
    about = json.dumps(asdict(reached)).encode()
    words = {name: tensor.cpu().clone() for name, tensor in embedded.words._asdict().items()} if embedded else {}
    own = {"stream": {"about": torch.from_numpy(np.frombuffer(about, np.uint8).copy())}, "words": words}
    return Checkpoint({**states, **own}, facts, reached.rounds, reached.tokens, NO_PLAN)


def read_reached(checkpoint: Checkpoint | None) -> Reached:
    """How far the stream of a checkpoint had come; none: it is to begin."""
    if checkpoint is None:
        return Reached()
    return Reached(**json.loads(checkpoint.states["stream"]["about"].numpy().tobytes()))
