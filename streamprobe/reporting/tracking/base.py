"""What a place that curves go to can do.  To add one, write a class that follows `Backend` and a row in opened.py.

Shapes: N tokens.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from streamprobe.reporting.tracking.images import Picture
from streamprobe.reporting.tracking.layout import Category


class Separation(NamedTuple):
    """How the logits of one probe part the positives of its column from the negatives."""

    name: str  # such as newton/backtracking/token lag+08 best layer
    scores: Tensor  # [N]
    targets: Tensor  # [N] bool


class Backend(Protocol):
    """A place that what a run logs goes to; what it cannot show it leaves out.

    What fails while a run trains waits for `flush`, which is called at the end of a pass.
    """

    def charts(self, categories: Sequence[Category]) -> None:
        """Which curves to overlay, given once, before the first of them."""

    def points(self, values: Mapping[str, float], step: int) -> None:
        """A point on each of many curves."""

    def epochs(self, values: Mapping[str, Sequence[float]]) -> None:
        """Curves over epochs, from 0 on: the steps of what is trained behind the passes."""

    def images(self, pictures: Mapping[str, Picture], step: int) -> None:
        """Heat maps by name."""

    def separation(self, found: Separation, step: int) -> None:
        """How the best layer of a column parts its classes."""

    def text(self, name: str, text: str) -> None:
        """A page of text, which may show the data's."""

    def outcome(self, said: str, numbers: Mapping[str, float]) -> None:
        """What the run ends with: the verdict with its table, and the numbers by which runs compare."""

    def flush(self) -> None:
        """Puts on disk what was logged so far.  Raises InputError where something was not logged."""

    def close(self) -> None:
        """Ends it.  Raises InputError as `flush` does."""
