"""Running sums over a stream of activations, each with `add` and `merge`, and what an affine map makes of them.

Shapes: N tokens, L layers, D hidden size, E = D + 1: features with a one behind them.  A trailing underscore marks a
sum that is not divided by its count.
"""

import torch
from torch import Tensor


class Moments:
    """Mean and standard deviation of features, summed over a stream and merged over shards.

    Chan, Golub & LeVeque (1983): the merge of two shards equals one pass over both, without cancellation.
    """

    def __init__(self, *shape: int):
        self.n = 0
        self.mean = torch.zeros(shape, dtype=torch.float64)
        self.squares_ = torch.zeros(shape, dtype=torch.float64)  # sum of squared deviations from the mean

    def add(self, x: Tensor) -> "Moments":
        """Adds x [N, *shape] of any float dtype, N > 0."""
        shard = Moments(*x.shape[1:])
        x = x.cpu().double()  # not every accelerator has float64
        shard.n, shard.mean = len(x), x.mean(0)
        shard.squares_ = (x - shard.mean).square().sum(0)
        return self.merge(shard)

    def merge(self, other: "Moments") -> "Moments":
        """Adds what `other` has summed."""
        if not other.n:
            return self
        n = self.n + other.n
        delta = other.mean - self.mean
        self.squares_ = self.squares_ + other.squares_ + delta.square() * (self.n * other.n / n)
        self.mean, self.n = self.mean + delta * (other.n / n), n
        return self

    @property
    def std(self) -> Tensor:
        """Population standard deviation [*shape]."""
        return (self.squares_ / self.n).sqrt()


def first_scaling(acts: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [L, D] of acts [N, L, D] in float32; 1 where a feature is constant."""
    moments = Moments(*acts.shape[1:]).add(acts)
    std = torch.where(moments.std > 0, moments.std, 1.0)
    return moments.mean.float().to(acts.device), std.float().to(acts.device)


def mapped_vector(vector: Tensor, d: Tensor, c: Tensor) -> Tensor:
    """A sum of r [x, 1] over tokens -> the sum of r [d x + c, 1]: vector [..., E], d and c [..., D]."""
    return torch.cat([d * vector[..., :-1] + c * vector[..., -1:], vector[..., -1:]], dim=-1)


def mapped(gram: Tensor, d: Tensor, c: Tensor) -> Tensor:
    """The same of a sum of r [x, 1] [x, 1]^T: gram [..., E, E], d and c [..., D]."""
    for _ in range(2):  # columns, then rows
        gram = mapped_vector(gram, d[..., None, :], c[..., None, :]).mT
    return gram
