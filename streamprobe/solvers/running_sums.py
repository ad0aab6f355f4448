"""Running sums over a stream of activations, each with `add` and `merge`.

Shapes: N tokens, L layers, K columns, D hidden size, E = D + 1: features with a one behind them.  A trailing underscore
marks a sum that is not divided by its count.
"""

import torch
from torch import Tensor

REST_TOKENS = 4096  # that wait before they are added


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


class Grams:
    """Class-weighted second moments of every column's own valid tokens, at about the price of one Gram per layer.

    With x the features under the affine map (acts - mean) / scale and a one behind them, y the target and p the weight
    of a positive, column k needs

        C_k = sum over valid tokens of (p_k y + 1 - y) x x^T = sum over all of x x^T + the rest,

    where the rest are its positives (p_k - 1 times each) and its invalid tokens (-1 times): few, so one Gram over all
    tokens of a layer serves all columns.  They wait until they are REST_TOKENS, for each addition to K matrices costs
    as much as many tokens.  `shared` sums the mean of all C_k instead, one matrix per layer.
    Sums over a chunk are float32, over chunks float64.
    """

    def __init__(self, mean: Tensor, scale: Tensor, positive_weight: Tensor, shared: bool = False):
        """mean and scale [L, D] and positive_weight [K], float32 on the device where the sums shall lie."""
        self.mean, self.scale, self.positive_weight, self.shared = mean, scale, positive_weight, shared
        (n_layers, hidden_size), n_columns = mean.shape, 0 if shared else len(positive_weight)
        size = hidden_size + 1
        self.common_ = torch.zeros(n_layers, size, size, dtype=torch.float64, device=mean.device)  # [L, E, E]
        self.rest_ = torch.zeros(n_layers, n_columns, size, size, dtype=torch.float64, device=mean.device)
        self.sum_ = torch.zeros(n_layers, 2, size, dtype=torch.float64, device=mean.device)  # x and x^2, all tokens
        self.waiting: list[tuple[Tensor, Tensor]] = []  # x [L, n, E] of the rest, and what each counts [n, K]

    def add(self, x: Tensor, targets: Tensor, valid: Tensor) -> "Grams":
        """Adds x [L, N, E] = with_one(acts, mean, scale) of these, targets [N, K] and valid [N, K] (bool)."""
        self.sum_ += torch.stack([x.sum(1), x.square().sum(1)], dim=1)
        if self.shared:
            weight = (valid * torch.where(targets, self.positive_weight, 1.0)).mean(1)  # [N]
            self.common_ += (x * weight[:, None]).mT @ x
            return self
        self.common_ += x.mT @ x
        extra = torch.where(targets, self.positive_weight - 1, 0.0).where(valid, -1.0)  # [N, K]
        rest = (extra != 0).any(1).nonzero()[:, 0]
        self.waiting.append((x[:, rest], extra[rest]))
        if sum(len(counts) for _, counts in self.waiting) >= REST_TOKENS:
            self.settle()
        return self

    def settle(self) -> None:
        """Adds the tokens that wait."""
        if not self.waiting:
            return
        x, extra = torch.cat([x for x, _ in self.waiting], dim=1), torch.cat([extra for _, extra in self.waiting])
        self.waiting.clear()
        at = extra.T.nonzero()  # (column, token), by column
        counts = (extra != 0).sum(0).tolist()
        for k, rows in enumerate(at[:, 1].split(counts)):
            few = x[:, rows]
            self.rest_[:, k] += (few * extra[rows, k, None]).mT @ few

    def merge(self, other: "Grams") -> "Grams":
        """Adds what `other` has summed, which may be under another affine map."""
        assert self.shared == other.shared
        self.settle()
        other.settle()
        d, c = other.scale.double() / self.scale, (other.mean.double() - self.mean) / self.scale
        self.common_ += mapped(other.common_, d, c)
        for k in range(self.rest_.shape[1]):
            self.rest_[:, k] += mapped(other.rest_[:, k], d, c)
        n, sums, squares = other.sum_[:, :1, -1], other.sum_[:, 0, :-1], other.sum_[:, 1, :-1]
        self.sum_[:, 0, :-1] += d * sums + c * n
        self.sum_[:, 1, :-1] += d * d * squares + 2 * c * d * sums + c * c * n
        self.sum_[..., -1] += other.sum_[..., -1]
        return self

    def final_scaling(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation [L, D], float64, of all tokens' raw features; 1 where a feature is constant."""
        n, sums, squares = self.sum_[:, :1, -1], self.sum_[:, 0, :-1], self.sum_[:, 1, :-1]
        mean = sums / n
        variance = (squares / n - mean.square()).clamp_min(0)
        std = torch.where(variance > 1e-12, variance.sqrt(), 1.0)  # under a map that makes it about 1
        return self.mean + mean * self.scale, std * self.scale

    def curvature(self, layer: int, k: int, mean: Tensor, scale: Tensor) -> Tensor:
        """C_k (or their mean, if shared) of the layer at this place [E, E], under the map of mean, scale [L, D]."""
        self.settle()
        gram = self.common_[layer] if self.shared else self.common_[layer] + self.rest_[layer, k]
        own_mean, own_scale = self.mean[layer].double(), self.scale[layer].double()
        return mapped(gram, own_scale / scale[layer], (own_mean - mean[layer]) / scale[layer])


def with_one(acts: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    """acts [N, L, D] of any float dtype -> (acts - mean) / scale with a one behind, in float32 [L, N, E]."""
    (n, n_layers, hidden_size) = acts.shape
    x = torch.empty(n_layers, n, hidden_size + 1, device=acts.device)
    torch.sub(acts.transpose(0, 1), mean[:, None], out=x[..., :-1])
    x[..., :-1] /= scale[:, None]
    x[..., -1] = 1
    return x


def mapped_vector(vector: Tensor, d: Tensor, c: Tensor) -> Tensor:
    """A sum of r [x, 1] over tokens -> the sum of r [d x + c, 1]: vector [..., E], d and c [..., D]."""
    return torch.cat([d * vector[..., :-1] + c * vector[..., -1:], vector[..., -1:]], dim=-1)


def mapped(gram: Tensor, d: Tensor, c: Tensor) -> Tensor:
    """The same of a sum of r [x, 1] [x, 1]^T: gram [..., E, E], d and c [..., D]."""
    for _ in range(2):  # columns, then rows
        gram = mapped_vector(gram, d[..., None, :], c[..., None, :]).mT
    return gram
