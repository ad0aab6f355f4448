"""Where the lag sign lives: which label each activation is asked to predict.

    lag k: the activation at token t predicts the label at token t + k.  Positive looks ahead.

Shapes: N tokens, C labels, K columns.  A label array holds one code per token and label:

    UNKNOWN  no label (problem text, special token, text the annotator left unlabelled)
    OUTSIDE  labelled text that is not in a section of this label
    INSIDE   in a section of this label
    ONSET    the first token of such a section (also inside it)
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

UNKNOWN, OUTSIDE, INSIDE, ONSET = -1, 0, 1, 2
Target = Literal["token", "onset", "within"]


class Column(NamedTuple):
    """What one probe predicts at token t.

    target `token`: token t + lag is inside a section of `label`.
    target `onset`: token t + lag is the first token of one; for lag > 0 asked only at tokens t outside the label.
    target `within`: a section begins in t + 1 .. t + lag (lag > 0); asked only where all of these have a label.

    A `control` asks the same of another label array, such as the permuted one.  Columns that differ in their seed alone
    differ in what is random about them: how a control was made, and where a solver starts.  Those that differ in their
    fold alone are trained on other chains: on all but those of that fold, where a run has several.
    """

    label: str
    target: str
    lag: int
    control: str = ""
    seed: int = 0
    fold: int = 0

    def __str__(self) -> str:
        start = f"/seed{self.seed}" if self.seed and not self.control else ""
        return f"{self.array}/{self.target}/lag{self.lag:+03d}{start}"

    @property
    def is_first(self) -> bool:
        """Whether it is of the first seed and fold."""
        return not (self.seed or self.fold)

    @property
    def saved(self) -> list[Any]:
        """What files say of it: all but the fold, since they hold the means over folds."""
        return [self.label, self.target, self.lag, self.control, self.seed]

    @property
    def array(self) -> str:
        """The name of the label array that it reads."""
        return f"{self.label}/{self.control}{self.seed}" if self.control else self.label


class Pairs(NamedTuple):
    """Activations beside what they must predict, in the order of the chain."""

    acts: Tensor  # [N, ...]
    targets: Tensor  # [N, K] bool, False where not valid
    valid: Tensor  # [N, K] bool: False where t is no sample, and where t + lag falls off the chain or has no label
    token: Tensor  # [N] int64: t, counted from the chain's first token


class LagBuffer:
    """Pairs the activations of one chain with the labels `lag` tokens away.

    Push the chain in chunks of any size; each push returns the tokens whose furthest label has arrived, and the chunk
    pushed with `last=True` returns all that is left.  The pairs are the same for every way of cutting the chain.
    Only activations that still wait for a label, and labels that a later token may look back on, are held.
    """

    def __init__(self, columns: Sequence[Column], labels: Sequence[str]):
        """`labels` names the C label arrays; every column's array is among them."""
        self.label_of = torch.tensor([labels.index(c.array) for c in columns])  # [K]
        self.lags = torch.tensor([c.lag for c in columns])  # [K]
        self.onset = torch.tensor([c.target == "onset" for c in columns])  # [K]
        self.within = torch.tensor([c.target == "within" for c in columns])  # [K]
        assert not (self.within & (self.lags <= 0)).any(), "`within` looks ahead: its lag is positive"
        self.ahead = max(0, int(self.lags.max()))
        self.behind = max(0, -int(self.lags.min()))
        self._reset()

    def _reset(self) -> None:
        self.waiting: Tensor | None = None  # [W, ...] activations whose furthest label has not arrived
        self.codes: Tensor | None = None  # [P + W, C] their label codes, and those of the P tokens before them
        self.support: Tensor | None = None  # [W]
        self.returned = 0  # tokens of the chain

    def push(self, acts: Tensor, codes: Tensor, support: Tensor, last: bool = False) -> Pairs:
        """Takes the next n tokens; returns the pairs that they complete.

        acts [n, ...] on any device; codes [n, C] int8 and support [n] bool (may this token be a sample?) on the CPU.
        """
        assert len(acts) == len(codes) == len(support)
        if self.waiting is not None and self.codes is not None and self.support is not None:
            acts = torch.cat([self.waiting, acts])
            codes = torch.cat([self.codes, codes])
            support = torch.cat([self.support, support])
        past = len(codes) - len(acts)
        done = len(acts) if last else max(0, len(acts) - self.ahead)
        targets, valid = self._look_up(codes, past, past + done)
        valid &= support[:done, None]
        pairs = Pairs(acts[:done], targets & valid, valid, torch.arange(self.returned, self.returned + done))
        if last:
            self._reset()
        else:
            self.returned += done
            self.waiting, self.support = acts[done:].clone(), support[done:].clone()  # not a view of the whole chunk
            self.codes = codes[max(0, past + done - self.behind) :].clone()
        return pairs

    def _look_up(self, codes: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Targets and validity [M, K] of the tokens at rows start .. stop of `codes` [P, C]."""
        padded = pad(codes, (0, 0, self.behind, self.ahead + 1), value=UNKNOWN)  # off the chain nothing is known
        here, code = self._at_lags(padded, start, stop)
        late = self.onset & (self.lags > 0) & (here != OUTSIDE)
        if not self.within.any():
            return torch.where(self.onset, code == ONSET, code >= INSIDE), (code != UNKNOWN) & ~late
        begun, begun_there = self._at_lags((padded == ONSET).int().cumsum(0), start, stop)
        blank, blank_there = self._at_lags((padded == UNKNOWN).int().cumsum(0), start, stop)
        targets = torch.where(self.onset, code == ONSET, code >= INSIDE)
        targets = torch.where(self.within, begun_there > begun, targets)
        return targets, ~torch.where(self.within, blank_there > blank, code == UNKNOWN) & ~late

    def _at_lags(self, padded: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """What [behind + P + ahead, C] holds for each column's label at rows start .. stop of P, and `lag` rows on."""
        window = padded.unfold(0, self.behind + 1 + self.ahead, 1)[start:stop]  # [M, C, W]
        return window[:, self.label_of, self.behind], window[:, self.label_of, self.behind + self.lags]


def make_columns(labels: Sequence[str], targets: Sequence[str], lags: Sequence[int]) -> list[Column]:
    """Every (label, target, lag); `within` only looks ahead and so has a column for each positive lag only."""
    return [
        Column(label, target, lag)
        for label in labels
        for target in targets
        for lag in sorted(lags)
        if target != "within" or lag > 0
    ]
