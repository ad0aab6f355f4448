"""Controls `embed` and `text`: what the words give, as layers that need no forward pass.

Shapes: N tokens, D hidden size.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from streamprobe.errors import InputError

WINDOWS = (8, 32, 128)  # tokens that `text` averages


class EmbeddingLayers:
    """The controls `embed` and `text` as layers like those of the model, or one of them, from token ids alone.

    `text` holds for each of WINDOWS the mean embedding of so many tokens up to this one, of which the first third of
    the principal directions is kept, so that a probe of `text` has as many weights as one of a layer.
    """

    NAMES = ("embed", "text")
    before = max(WINDOWS) - 1  # tokens that a token's row looks back on

    def __init__(self, embedding: nn.Module, ids: Tensor, hidden_size: int, names: Sequence[str] = NAMES):
        """`embedding` maps ids to [..., E]; `ids` [N] are tokens whose embeddings set the principal directions.

        Rows are filled up with zeros to D = `hidden_size`.  Raises InputError for a model whose E is larger,
        and for embeddings that are not finite.
        """
        self.embedding, self.names = embedding, names
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
        both = dict(zip(self.NAMES, (embed[-n:], text), strict=True))
        return nn.functional.pad(torch.stack([both[name] for name in self.names], dim=1), self.pad)
