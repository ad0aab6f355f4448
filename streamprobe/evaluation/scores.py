"""Every probe's logit for every token.

Shapes: N tokens, L layers, K columns.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from streamprobe.activations.batch import TokenBatch
from streamprobe.activations.feed import Feed
from streamprobe.errors import InputError
from streamprobe.probes.base import Probes
from streamprobe.system.distributed import each, gather, world

STEPS = 1e5  # of the grid that scores are put on, to 1 of a logit


class ColumnTokens(NamedTuple):
    """The n tokens at which one column is asked, as L probes see them."""

    scores: Tensor  # [n, L] logits, float32
    targets: Tensor  # [n] bool
    chain: Tensor  # [n] int64
    token: Tensor  # [n] int64: the token's place in its chain


class Scored(NamedTuple):
    """Tokens as L x K probes see them, on the device of their scores."""

    scores: Tensor  # [N, L, K] logits, float32; each probe's lie side by side in memory
    targets: Tensor  # [N, K] bool
    valid: Tensor  # [N, K] bool
    chain: Tensor  # [N] int64
    token: Tensor  # [N] int64: the token's place in its chain

    def at(self, tokens: Tensor) -> "Scored":
        """The same for the tokens [N] where `tokens` is True alone."""
        place = tokens.nonzero()[:, 0]
        scores = self.scores.permute(1, 2, 0).index_select(-1, place).permute(2, 0, 1)
        targets, valid = (each.T.index_select(-1, place).T for each in (self.targets, self.valid))
        return Scored(scores, targets, valid, self.chain[place], self.token[place])


def tokens_of_column(places: Sequence[tuple[Scored, int]]) -> ColumnTokens:
    """The tokens at which a column is asked, as all of its probes see them; places: (tokens, number of the column)."""
    scored, k = places[0]
    valid, targets = scored.valid[:, k], scored.targets[:, k]
    for other, j in places[1:]:
        assert other.valid[:, j].equal(valid) and other.targets[:, j].equal(targets), "a column asks all the same"
    place = valid.nonzero()[:, 0]
    scores = torch.cat([other.scores[:, :, j].T.index_select(1, place) for other, j in places])
    return ColumnTokens(scores.T, targets[place], scored.chain[place], scored.token[place])


def to_grid(scores: Tensor) -> Tensor:
    """The logits to the nearest 1e-5, of any shape, float32.

    Features that are the same for many tokens, such as a place in the response, give these one score, which differs by
    rounding in the order of a sum.  On the grid such scores tie in every run; what moves is 5e-6 of a logit at most.
    Equal steps are equal floats, and none is a negative zero.
    """
    return (scores.double() * STEPS).round().div(STEPS).float() + 0.0


def evaluate(
    pairs: Sequence[tuple[Probes, Feed]],
    batches: Iterable[TokenBatch],
    *,
    held_out: bool = False,
    rank: int | None = None,
) -> list[Scored]:
    """Every probe's logit for every token, for each bank and its feed, to the grid on which they are ranked.

    Probes that read the logits of others stand behind these.  Tokens of a chain come in its order; those that no column
    asks are for probes that look back alone, and none of what is returned.
    Where a run has several folds all probes score the tokens that are valid for them, those of the other folds; or,
    with `held_out`, only the probes of each token's own fold do, so that there are the columns of one.  The batches are
    those of this rank; the tokens of all are returned on every rank, or on one.
    Raises InputError if a logit is not finite.
    """
    scores: list[list[Tensor]] = [[] for _ in pairs]
    rest, scorers = [], [bank.scorer() for bank, _ in pairs]
    for batch in batches:
        said: dict[str, Tensor] = {}
        for (bank, feed), scorer, own in zip(pairs, scorers, scores, strict=True):
            read = feed.features({name: said[f"{bank.solver} {name}"] for name in feed.reads} if feed.reads else batch)
            found = said[f"{bank.solver} {feed.name}"] = scorer(read, batch.chain)
            logits = found.permute(1, 2, 0)
            own.append(to_grid(_of_own_fold(logits, batch.fold, feed.n_folds) if held_out else logits))
        rest.append((batch.targets.T, batch.valid.T, batch.chain, batch.token, batch.fold))
    columns = [torch.cat(each, -1) for each in zip(*rest, strict=True)]
    result = []
    for (bank, feed), own in zip(pairs, scores, strict=True):
        asked = feed.first_fold() if held_out else feed
        result.append(_of_all_ranks(_scored(asked, own, columns) if rest else _nothing(bank, asked), rank))
    if not all(scored.scores.isfinite().all() for scored in result):
        raise InputError("scores that are infinite or not numbers", "finite weights", "lower --learning_rate")
    return result


def _scored(feed: Feed, scores: Sequence[Tensor], columns: Sequence[Tensor]) -> Scored:
    """The tokens of scores [L, K, n] and of a batch's columns [..., N], as a feed asks for them.

    Those that no column of the batch asks are left out.
    """
    targets, valid, chain, token, fold = columns
    asked, some = feed.to(targets.device), valid.any(0)
    both = targets[asked.columns].T, asked.valid(valid.T, fold)
    scored = Scored(torch.cat(list(scores), -1).permute(2, 0, 1), *both, chain, token)
    return scored if some.all() else scored.at(some)


def _nothing(bank: Probes, feed: Feed) -> Scored:
    """No token, of these probes."""
    shape, device = (0, len(bank.bias), len(feed.columns)), bank.bias.device
    asked = torch.zeros(shape[0], shape[2], dtype=torch.bool, device=device)
    place = torch.zeros(0, dtype=torch.int64, device=device)
    return Scored(torch.zeros(shape, device=device), asked, asked, place, place)


def _of_all_ranks(own: Scored, rank: int | None) -> Scored:
    """The tokens of all ranks; on one rank only where that is said, and none on the others."""
    if world().size == 1:
        return own
    found = Scored(*gather(own, each(len(own.chain)), rank))
    return found._replace(scores=found.scores.permute(1, 2, 0).contiguous().permute(2, 0, 1))


def _of_own_fold(logits: Tensor, fold: Tensor, n_folds: int) -> Tensor:
    """Of logits [L, K, N], whose columns stand fold by fold, those of each token's own fold [N]: [L, K / F, N]."""
    if n_folds == 1:
        return logits
    of_folds = logits.unflatten(1, (n_folds, -1))
    return of_folds.gather(1, fold.expand(len(logits), 1, of_folds.shape[2], -1))[:, 0]
