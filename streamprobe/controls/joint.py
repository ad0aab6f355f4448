"""Controls `joint` and `joint+chain`: all that is known without the hidden state, at once.

A layer that knows two things, such as the position and the text, may be above a control of each without foreseeing
anything; what it adds to a control that is given all of them it cannot have from these.

Shapes: T tokens in a chain, N tokens of any chains, A labels whose sections are known, P features.
"""

import torch
from torch import Tensor

from streamprobe.controls.persistence import expand_ages, section_ages
from streamprobe.controls.piecewise_linear import known_or_not
from streamprobe.controls.position import expand_position, position_features
from streamprobe.data.tokenize import Chain
from streamprobe.lags import INSIDE, ONSET, UNKNOWN

OF_A_LABEL, ALONE = 4, 2  # numbers that `joint` stores of each label (its age and three so far), and beside these
RATES = 2  # numbers that `joint+chain` adds of each label


def joint_features(chain: Chain, n_labels: int) -> Tensor:
    """[T, 2 + 4A] of a chain: place, ages of sections, the chain so far, and the tokens since a sentence ended."""
    parts = [position_features(chain), section_ages(chain.sections), chain_so_far(chain.sections)]
    return torch.cat([*parts, sentence_ages(chain.sentence_end)], dim=1)


def expand_joint(stored: Tensor) -> Tensor:
    """[N, 2 + 4A] -> [N, P]: each of them as features, the chain so far as it is stored."""
    return torch.cat(_parts(stored), dim=1)


def _parts(stored: Tensor) -> list[Tensor]:
    """The features of `expand_joint` side by side."""
    n = (stored.shape[1] - ALONE) // OF_A_LABEL  # A
    place, ages, so_far, sentence = stored.split([1, n, 3 * n, 1], dim=1)
    return [expand_position(place), expand_ages(ages), so_far, known_or_not(sentence[:, 0])]


def chain_rates(chain: Chain, n_labels: int) -> Tensor:
    """[T, 2A] of a chain, the same at each of its tokens: how much of each label all of the chain has.

    For each label the rate (see `log_odds`) of tokens that are inside, and that of sections that begin.
    """
    codes = chain.sections
    known = (codes != UNKNOWN).sum(0)
    rates = [log_odds((codes >= INSIDE).sum(0), known), log_odds((codes == ONSET).sum(0), known)]
    return torch.stack(rates, dim=1).flatten().expand(len(codes), -1)


def expand_with_rates(stored: Tensor) -> Tensor:
    """[N, 2 + 6A], what `joint` stores and the rates of the whole chain -> [N, P + 2A]."""
    n = (stored.shape[1] - ALONE) // (OF_A_LABEL + RATES)  # A
    joint, rates = stored.split([ALONE + OF_A_LABEL * n, RATES * n], dim=1)
    return torch.cat([*_parts(joint), rates], dim=1)


def log_odds(k: Tensor, n: Tensor) -> Tensor:
    """log((k + 1/2) / (n - k + 1/2)) of k among n, of any shape, float32: smoothed, so that 0 and n are finite, too."""
    return ((k + 0.5).double() / (n - k + 0.5)).log().float()


def chain_so_far(codes: Tensor) -> Tensor:
    """Label codes [T, A] -> [T, 3A] of each label up to and including each token, float32.

    log(1 + k) of the k sections that began; their rate among the labelled tokens (see `log_odds`); the share of these
    that are inside, 0 where there are none.
    """
    begun = (codes == ONSET).cumsum(0)
    known = (codes != UNKNOWN).cumsum(0)
    inside = (codes >= INSIDE).cumsum(0)
    counts = [begun.double().log1p().float(), log_odds(begun, known), inside / known.clamp_min(1)]
    return torch.stack(counts, dim=2).flatten(1)


def sentence_ages(ends: Tensor) -> Tensor:
    """Where a sentence ends [T] bool -> the tokens since one last did [T, 1] float32; -1 where none has yet."""
    place = torch.arange(len(ends))
    ended = torch.where(ends, place, -1).cummax(0).values
    return torch.where(ended >= 0, place - ended, -1).float()[:, None]
