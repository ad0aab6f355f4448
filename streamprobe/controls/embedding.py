"""Layers like those of the model, made of embeddings: the controls `embed` and `text`, and what `joint` is given.

A layer of this kind is a function `words, embedded, n -> [n, width]`: what it gives at the last n of the tokens whose
embeddings are `embedded` [T, E]; `words` are EmbeddingLayers, for what is known of all embeddings.

Shapes: N tokens, T of them in a row, E width of an embedding, S such layers, D hidden size.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from streamprobe.errors import InputError
from streamprobe.model.places import main_device
from streamprobe.system.hardware import send

WINDOWS = (8, 32, 128)  # tokens that `text` averages
PARTS = (2, 4, 8, 8)  # of its E directions `last_tokens` keeps one in so many: of this token, the one before it, ...
Embedded = Callable[[Any, Tensor, int], Tensor]  # a layer of this kind


def this_token(words: Any, embedded: Tensor, n: int) -> Tensor:
    """Control `embed`: each token's embedding [n, E]."""
    return embedded[-n:]


def recent_tokens(words: Any, embedded: Tensor, n: int) -> Tensor:
    """Control `text`: for each of WINDOWS the mean embedding of so many tokens up to this one, [n, E].

    Of each mean the first third of the principal directions is kept, so that a probe of `text` has as many weights as
    one of a layer.
    """
    x = (embedded.float() - words.mean) @ words.first(len(words.mean) // len(WINDOWS))
    middle, width = x.mean(0), x.shape[1]  # about which sums stay small, and so exact
    sums = nn.functional.pad((x - middle).cumsum(0), (0, 0, 1, 0))
    end = torch.arange(len(embedded) - n + 1, len(embedded) + 1, device=x.device)
    text = torch.zeros_like(embedded[-n:])
    for i, window in enumerate(WINDOWS):
        before = nn.functional.pad(sums, (0, 0, window, 0))[-n - window : -window]  # nothing before the chain
        text[:, i * width : (i + 1) * width] = middle + (sums[-n:] - before) / end.clamp_max(window)[:, None]
    return text


def last_tokens(words: Any, embedded: Tensor, n: int) -> Tensor:
    """The last four tokens in order, [n, E], which a mean is blind to; no control of its own, but part of `joint`.

    Each is reduced to its first principal directions, half of them for this token and fewer for those before it, so
    that a probe of all four has as many weights as one of a layer.  Before the chain every number is 0.
    """
    width, near = len(words.mean), embedded[-(n + len(PARTS) - 1) :]
    x = (near.float() - words.mean) @ words.first(width // min(PARTS))
    x = nn.functional.pad(x, (0, 0, n + len(PARTS) - 1 - len(x), 0))
    order, start = torch.zeros_like(embedded[-n:]), 0
    for back, part in enumerate(PARTS):
        size, first = width // part, len(PARTS) - 1 - back
        order[:, start : start + size] = x[first : first + n, :size]
        start += size
    return order


class WordBasis(NamedTuple):
    """What is known of the embeddings of all training tokens."""

    mean: Tensor  # [E]
    directions: Tensor  # [E, E / 2] the first principal ones, by falling variance


class EmbeddingLayers:
    """Such layers side by side, from token ids alone."""

    before = max(WINDOWS) - 1  # tokens that a token's row looks back on

    def __init__(self, embedding: nn.Module, words: WordBasis, hidden_size: int, layers: Mapping[str, Embedded]):
        """`embedding` maps ids to [..., E]; rows are filled up with zeros to D = `hidden_size`.

        Raises InputError for a model whose E is larger.
        """
        self.embedding, self.layers, self.words = embedding, layers, words
        self.mean, self.directions = words
        self._first: dict[int, Tensor] = {}
        self.missing = hidden_size - len(words.mean)
        if self.missing < 0:
            raise InputError(
                f"embeddings of size {len(words.mean)} in a model of hidden size {hidden_size}",
                "no larger ones, for controls that are made of them",
                "give other --controls, such as position persistence permuted",
            )

    @classmethod
    def fitted(
        cls, embedding: nn.Module, ids: Tensor, hidden_size: int, layers: Mapping[str, Embedded]
    ) -> "EmbeddingLayers":
        """The layers whose principal directions are those of the embeddings of the tokens `ids` [N].

        Raises InputError for embeddings that are not finite, too.
        """
        kinds, counts = ids.unique(return_counts=True)
        with torch.no_grad():
            table = embedding(kinds.to(main_device(embedding))).float()  # [V, E]
        if not table.isfinite().all():
            raise InputError(
                "embeddings that are infinite or not a number",
                "finite ones, for controls that are made of them",
                "check the files of --model, or use another --dtype",
            )
        weight = (counts / counts.sum()).to(table)[:, None]
        mean = (table * weight).sum(0)
        centred = (table - mean) * weight.sqrt()
        directions = torch.linalg.eigh(centred.mT @ centred).eigenvectors  # by rising variance
        chosen = directions.flip(1)[:, : table.shape[1] // min(PARTS)]
        words = WordBasis(mean, chosen.contiguous())  # as a file gives it: products round by how a matrix lies
        return cls(embedding, words, hidden_size, layers)

    @property
    def width(self) -> int:
        """E."""
        return len(self.mean)

    def first(self, n: int) -> Tensor:
        """The first n principal directions [E, n], in a matrix of their own: products round by how it lies."""
        if n not in self._first:
            self._first[n] = self.directions[:, :n].contiguous()
        return self._first[n]

    @torch.no_grad()
    def rows(self, ids: Tensor, n: int) -> Tensor:
        """The layers [n, S, D] of the last n of these tokens of a chain, in the dtype of the embedding.

        ids [T] begin `before` tokens earlier, or with the chain.
        """
        embedded = self.embedding(send(ids, self.mean.device))  # [T, E]
        layers = [layer(self, embedded, n) for layer in self.layers.values()]
        return nn.functional.pad(torch.stack(layers, dim=1), (0, self.missing))
