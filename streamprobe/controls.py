"""What a probe must beat, made of the same chains and fed by the same passes.

    embed        the token's embedding, as one more layer: what the current word gives
    text         averages of the last 8, 32 and 128 tokens' embeddings, as one more layer: what recent words give
    position     the token's place in the response
    persistence  the label at t and the time since its last section, where the label asked for lies ahead: what is known
                 to someone who watches the sections go by
    permuted     the probed layers, for labels shifted within each chain: what the chain as a whole gives

None of them knows anything of the tokens after t.

Shapes: T tokens in a chain, C labels, N tokens, D hidden size, P features.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from streamprobe.errors import InputError
from streamprobe.lags import INSIDE, ONSET, UNKNOWN, Column

BESIDE = ("position", "persistence")  # those that are features on the side
WINDOWS = (8, 32, 128)  # tokens that `text` averages
KNOTS = torch.tensor([0, 1, *(n << k for k in range(13) for n in (2, 3))]).float()  # 0, 1, 2, 3, 4, 6, 8, 12, ...


def permute_labels(codes: Tensor, support: Tensor, random: np.random.Generator) -> Tensor:
    """Label codes [T, C] of a chain, shifted around the circle of its labelled samples by a random number of them.

    All C labels move together.  Base rate and lengths of runs stay (a run may part at the ends), and so does where
    labels are unknown.  Each shift is as likely as any other, so what a token's place or text says of its label is
    gone: only what the whole chain says is left.
    """
    labelled = ((codes != UNKNOWN).any(1) & support).nonzero()[:, 0]
    moved = codes.clone()
    if len(labelled):
        moved[labelled] = codes[labelled].roll(int(random.integers(len(labelled))), dims=0)
    return moved


def with_permuted(columns: Sequence[Column], seeds: int) -> list[Column]:
    """The columns and, for each seed, their permuted twins."""
    return [*columns, *(c._replace(control="permuted", seed=seed) for seed in range(seeds) for c in columns)]


def hats(x: Tensor) -> Tensor:
    """x [N] >= 0 -> [N, len(KNOTS)]: its shares in the knots on both sides, so that a sum of them is piecewise linear.

    The knots grow in steps of a half or a third; all beyond the last one is one.
    """
    x = x.float().clamp(max=float(KNOTS[-1]))
    after = torch.searchsorted(KNOTS, x).clamp_min(1)
    low, high = KNOTS[after - 1], KNOTS[after]
    share = ((x - low) / (high - low))[:, None]
    empty = torch.zeros(len(x), len(KNOTS))
    return empty.scatter(1, after[:, None], share).scatter(1, after[:, None] - 1, 1 - share)


def position_features(n_tokens: int, start: int) -> Tensor:
    """[T, P] of a chain whose response begins at token `start`: whether t is before it, and else its place."""
    place = torch.arange(n_tokens)
    problem = (place < start).float()[:, None]
    return torch.cat([problem, hats((place - start).clamp_min(0)) * (1 - problem)], dim=1)


def persistence_features(codes: Tensor) -> Tensor:
    """[T, P] from label codes [T, C] up to each token: for every label the time in a section or since the last one.

    For each label: is t inside; was there a section before; the tokens since this one began or since the last ended.
    """
    place = torch.arange(len(codes))[:, None]
    inside = codes >= INSIDE  # [T, C]
    began = torch.where(codes == ONSET, place, -1).cummax(0).values
    ended = torch.where(inside, place, -1).cummax(0).values
    before = ended >= 0
    features = []
    for c in range(codes.shape[1]):
        since = torch.where(inside[:, c], place[:, 0] - began[:, c].clamp_min(0), place[:, 0] - ended[:, c])
        flags = torch.stack([inside[:, c], before[:, c] & ~inside[:, c]], dim=1).float()
        features.append(torch.cat([flags, (hats(since)[:, None] * flags[:, :, None]).flatten(1)], dim=1))
    return torch.cat(features, dim=1)


def side_features(n_tokens: int, start: int, codes: Tensor, names: Sequence[str]) -> list[Tensor]:
    """Those of BESIDE that are in `names`, [T, P] each: see the functions of these names."""
    position = [position_features(n_tokens, start)] if "position" in names else []
    return position + ([persistence_features(codes)] if "persistence" in names else [])


class Surface:
    """The layers `embed` and `text` of a model, or one of them, from token ids alone.

    `text` holds for each of WINDOWS the mean embedding of so many tokens up to this one, of which the first third of
    the principal directions is kept, so that a probe of `text` has as many weights as one of a layer.
    """

    LAYERS = ("embed", "text")
    before = max(WINDOWS) - 1  # tokens that a token's row looks back on

    def __init__(self, embedding: nn.Module, ids: Tensor, hidden_size: int, layers: Sequence[str] = LAYERS):
        """`embedding` maps ids to [..., E]; `ids` [N] are tokens whose embeddings set the principal directions.

        Rows are filled up with zeros to D = `hidden_size`.  Raises InputError for a model whose E is larger,
        and for embeddings that are not finite.
        """
        self.embedding, self.layers = embedding, layers
        kinds, counts = ids.unique(return_counts=True)
        with torch.no_grad():
            table = embedding(kinds.to(next(embedding.parameters()).device)).float()  # [V, E]
        self.pad = (0, hidden_size - table.shape[1])
        if self.pad[1] < 0:
            raise InputError(
                f"embeddings of size {table.shape[1]} in a model of hidden size {hidden_size}",
                "no larger ones, for the controls embed and text",
                "give --controls position persistence permuted",
            )
        if not table.isfinite().all():
            raise InputError(
                "embeddings that are infinite or not a number",
                "finite ones, for the controls embed and text",
                "check the files of --model, or use another --dtype",
            )
        weight = (counts / counts.sum()).to(table)[:, None]
        self.mean = (table * weight).sum(0)
        centred = (table - self.mean) * weight.sqrt()
        directions = torch.linalg.eigh(centred.mT @ centred).eigenvectors  # by rising variance
        self.directions = directions.flip(1)[:, : table.shape[1] // len(WINDOWS)]  # [E, E / 3]

    @torch.no_grad()
    def rows(self, ids: Tensor, n: int) -> Tensor:
        """The layers [n, S, D] of the last n of these tokens of a chain, in the dtype of the embedding.

        ids [T] on the embedding's device begin `before` tokens earlier, or with the chain.
        """
        embed = self.embedding(ids)  # [T, E]
        x = (embed.float() - self.mean) @ self.directions
        middle, width = x.mean(0), x.shape[1]  # about which sums stay small, and so exact
        sums = nn.functional.pad((x - middle).cumsum(0), (0, 0, 1, 0))
        end = torch.arange(len(ids) - n + 1, len(ids) + 1, device=x.device)
        text = torch.zeros_like(embed[-n:])
        for i, window in enumerate(WINDOWS):
            begin = (end - window).clamp_min(0)
            text[:, i * width : (i + 1) * width] = middle + (sums[end] - sums[begin]) / (end - begin)[:, None]
        both = dict(zip(self.LAYERS, (embed[-n:], text), strict=True))
        return nn.functional.pad(torch.stack([both[name] for name in self.layers], dim=1), self.pad)
