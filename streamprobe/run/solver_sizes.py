"""What Newton's solvers take in memory, and nested probes, which are trained behind them, on the disk, too.

Shapes: L layers, K columns, P features of the joint control, D hidden size.
"""

from collections.abc import Sequence
from typing import NamedTuple

from streamprobe.activations.feed import Feed
from streamprobe.evaluation.rows import JOINT_CHAIN
from streamprobe.solvers.block_matrices import PENALTIES
from streamprobe.solvers.curvature import curvature_bytes
from streamprobe.solvers.lbfgs import PAIRS, vector_bytes
from streamprobe.solvers.matrix_sums import kept_numbers


class NestedSize(NamedTuple):
    """How much is trained of nested probes; nothing where a run has none."""

    layers: int = 0  # L
    columns: int = 0  # K
    control: int = 0  # P
    hidden: int = 0  # D

    @classmethod
    def of(cls, feeds: Sequence[Feed]) -> "NestedSize":
        """Of the probes that read the joint control and the layers; all as if they were as wide as the widest."""
        control = next((feed for feed in feeds if feed.name == JOINT_CHAIN), None)
        if control is None:
            return cls()
        layers = [feed for feed in feeds if feed.is_probed]
        n_layers, widest = sum(len(feed.sites) for feed in layers), max(feed.n_features for feed in layers)
        return cls(n_layers, len(control.columns), control.n_features, widest)

    def vector_bytes(self) -> int:
        """What a NestedSolver takes beside its matrices."""
        return self.layers * self.columns * (self.control + 1 + self.hidden) * 8 * (7 + 2 * PAIRS)

    def matrix_bytes(self, shared: bool) -> int:
        """What the sums [A, B; B', C] take, float64, or what BlockMatrices make of them: A for each group, and for a
        layer, too, A^-1 B, C, and its factor with a penalty.

        Where all columns are one group their penalties may be as many as there are.
        """
        groups, factors = (min(1, self.columns), min(len(PENALTIES), self.columns)) if shared else (self.columns, 1)
        width = self.control + 1
        sums = 8 * (width * self.hidden + kept_numbers(self.hidden))
        of_layer = max(sums, 4 * (width * self.hidden + (1 + factors) * self.hidden**2))
        return groups * (8 * kept_numbers(width) + self.layers * of_layer)

    def state_bytes(self) -> int:
        """What a checkpoint holds of them once they are final."""
        probes = self.layers * self.columns
        return probes * ((self.control + 1 + self.hidden) * 8 + 4 * 8 + 1) + (8 if probes else 0)

    def file_bytes(self) -> int:
        """What is kept of them and of the control beside them, in `controls.safetensors`."""
        probes = (self.layers + 1) * self.columns
        return probes * ((self.control + 1 + self.hidden) * 4 + 4 * 8) + 4 * self.columns

    def chunk_bytes(self, tokens: int) -> int:
        """What is made of so many tokens on the way: features of the control, thrice, and of all layers, and logits."""
        each = 3 * (self.control + 1) + self.layers * (self.hidden + 1) + 6 * self.layers * self.columns
        return 4 * tokens * each

    def drawn_bytes(self, tokens: int, token_bytes: int) -> int:
        """What so many tokens take that are drawn for matrices: as they are, twice, and their features."""
        features = 2 * (self.control + 1) + (self.layers + 1) * (self.hidden + 1)
        return tokens * (2 * (token_bytes + 4 * (self.control + self.columns)) + 4 * features) if self.layers else 0


class Matrices(NamedTuple):
    """What Newton's solvers take.

    Nested probes are trained behind the others, whose matrices are let go first, but not their vectors.
    """

    vectors: int  # bytes beside the matrices
    all: int  # bytes of a matrix for every site and column, beside the sums of each site
    one: int  # bytes of one for every site and fold
    nested: NestedSize = NestedSize()

    @classmethod
    def of(cls, feeds: Sequence[Feed]) -> "Matrices":
        """Those of the solvers of these feeds."""
        sizes = [(len(feed.sites), len(feed.columns), feed.n_features) for feed in feeds]
        sums = [(len(feed.sites), feed.n_folds, feed.n_features) for feed in feeds]
        nested = NestedSize.of(feeds)
        return cls(
            vectors=sum(vector_bytes(*size) for size in sizes) + nested.vector_bytes(),
            all=sum(curvature_bytes(*size) for size in sizes),
            one=sum(curvature_bytes(*size) for size in sums),
            nested=nested,
        )

    def must_share(self, room: int, activations: int, pool: int) -> bool:
        """Whether the columns of a site must share a matrix, with `room` bytes for all.

        Where a matrix for each would take over half of the room, or would push out activations that could else be kept
        (`activations` bytes in all), or would not leave the `pool` bytes in which tokens are mixed at the least.
        """
        more = self.taken(False) - self.taken(True)
        return more > room / 2 or 0 <= room - activations - self.taken(True) < more or room - self.taken(False) < pool

    def taken(self, shared: bool) -> int:
        """Bytes in all."""
        return self.vectors + max(self.one + (0 if shared else self.all), self.nested.matrix_bytes(shared))
