"""A workbench for measurements of time: models, chains and grids that are real in every size and random in content.

Shapes: T tokens in a chain, C labels, K columns.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from streamprobe.activations.batch import TokenBatch
from streamprobe.activations.feed import Feed
from streamprobe.activations.shards import Shard, Trip, deal
from streamprobe.activations.store import ActivationMemory, Sizes
from streamprobe.activations.stream import forward, stream
from streamprobe.bench.shapes import Shape
from streamprobe.data.census import count_tokens
from streamprobe.data.tokenize import Chain
from streamprobe.errors import InputError
from streamprobe.lags import INSIDE, ONSET, OUTSIDE, Column, make_columns
from streamprobe.model.backbone import pick_dtype
from streamprobe.probes.early_stopping import BestProbes
from streamprobe.probes.sites import layer_sites
from streamprobe.reporting.tracking.tracker import Tracker
from streamprobe.run.memory_plan import memory_room
from streamprobe.solvers.adam import AdamSolver
from streamprobe.solvers.base import Solver
from streamprobe.solvers.curvature import curvature_bytes
from streamprobe.solvers.newton import NewtonSolver
from streamprobe.system.distributed import is_own
from streamprobe.trainer import Job, train_pass

LAGS = [-16, -12, -8, -4, 0, 4, 8, 12, 16, 20, 24, 32, 40, 48]
BATCH, L2 = 1024, 0.01
SEED, SHARDS = 0, 16
SECTION, BASE_RATE = 18, 0.024  # tokens in a section, fraction of tokens in one: as in the annotated chains


class Grid(NamedTuple):
    """The columns of one measurement, and the chains with their labels."""

    labels: list[str]
    columns: list[Column]
    train: list[Chain]
    validation: list[Chain]
    n_train: int  # tokens that are valid for some column
    n_validation: int
    positive_weight: Tensor  # [K]


def make_chains(n: int, n_labels: int, vocabulary: int) -> list[Chain]:
    """Chains of 300 to 900 random tokens, 540 on average, with sections at random places."""
    random = np.random.default_rng(SEED)
    chains = []
    for i in range(n):
        length = draw_length(random)
        begins = random.random((length, n_labels)) < BASE_RATE / SECTION  # [T, C]
        begins[length // 2] |= i == n - 1  # so that no label is without a section, nor any column without a positive
        begun = begins.cumsum(0)
        inside = begun > np.concatenate([np.zeros((SECTION, n_labels)), begun[:-SECTION]])
        codes = np.where(begins, ONSET, np.where(inside, INSIDE, OUTSIDE)).astype(np.int8)
        support = torch.arange(length) > 0
        ids = torch.from_numpy(random.integers(vocabulary, size=length))
        chains.append(Chain(str(i), ids, torch.from_numpy(codes), support))
    return chains


def draw_length(random: np.random.Generator) -> int:
    """How many tokens a chain has: 300 to 900."""
    return int(random.triangular(300, 420, 900))


def make_grid(chains: Sequence[Chain], n_labels: int) -> Grid:
    """The first labels of the chains, each with a column per lag; a tenth of the chains validates."""
    labels = [f"label{i}" for i in range(n_labels)]
    columns = make_columns(labels, ["token"], LAGS)
    chains = [replace(c, codes=c.codes[:, :n_labels].contiguous()) for c in chains]
    held_out = max(1, len(chains) // 10)
    training, validation = chains[held_out:], chains[:held_out]
    n_train, valid, positive = count_tokens(training, columns, labels)
    n_validation = count_tokens(validation, columns, labels).tokens
    return Grid(labels, columns, training, validation, n_train, n_validation, (valid - positive) / positive)


def count(chains: Sequence[Chain]) -> int:
    """Tokens in the chains."""
    return sum(len(c.ids) for c in chains)


def make_config(shape: Shape, blocks: int) -> Any:
    """The transformers config of a Llama of this shape, with so many blocks."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=blocks,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
    )


def make_model(shape: Shape, blocks: int, device: torch.device) -> nn.Module:
    """The first blocks of a Llama with random weights, frozen."""
    from transformers import AutoModel

    torch.manual_seed(SEED)
    with device:
        model = AutoModel.from_config(make_config(shape, blocks), dtype=getattr(torch, shape.dtype))
    return model.eval().requires_grad_(False)


class Workbench:
    """The truncated model, the synthetic chains, and the grids of 70, 700 and 7,000 probes."""

    def __init__(self, shape: Shape, n_chains: int, max_batch_tokens: int, device: torch.device):
        shape = shape._replace(dtype=str(pick_dtype(shape.dtype)).removeprefix("torch."))
        self.shape, self.layers, self.max_batch_tokens, self.device = shape, shape.layers, max_batch_tokens, device
        chains = make_chains(n_chains, 100, shape.vocabulary)
        self.grids = {n: make_grid(chains, n) for n in (1, 10, 100)}
        self.model = make_model(shape, max(shape.layers) + 1, device)

    def shards(self, chains: Sequence[Chain]) -> list[Shard]:
        """The chains as a run deals them."""
        return deal([len(chain.ids) for chain in chains], SHARDS, self.max_batch_tokens)

    def trip(self, grid: Grid, chains: Sequence[Chain]) -> Trip:
        """One trip over the chains, as in a run."""

        def read(batches: Sequence[Sequence[int]]) -> Iterator[TokenBatch]:
            options: dict[str, Any] = {"labels": grid.labels, "max_batch_tokens": self.max_batch_tokens}
            return stream(chains, self.model, self.layers, grid.columns, batches=batches, **options)

        return Trip(self.shards(chains), read)

    def forward(self, chains: Sequence[Chain]) -> None:
        """The very batches of this rank's part of `trip` through the model, and nothing else."""
        for number, shard in enumerate(self.shards(chains)):
            for batch in shard if is_own(number) else ():
                forward(self.model, [chains[i].ids for i in batch])

    def solver(self, name: str, grid: Grid, batch_size: int = BATCH) -> Solver:
        """A fresh solver; Newton's columns share one matrix per layer where there are more than 70 probes."""
        about = (layer_sites(self.layers), grid.columns, self.shape.hidden, grid.positive_weight)
        if name == "adam":
            return AdamSolver(*about, l2=L2, batch_size=batch_size, device=self.device)
        return NewtonSolver(*about, n_tokens=grid.n_train, l2=L2, shared=len(grid.labels) > 1, device=self.device)

    def memories(self, grid: Grid) -> tuple[ActivationMemory, ActivationMemory]:
        """Room for all training and all validation tokens.  Raises InputError where there is none."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # what earlier measurements left
        dtype: torch.dtype = getattr(torch, self.shape.dtype)
        sizes = Sizes(len(self.layers), self.shape.hidden, len(grid.columns), 0, dtype)
        matrices = 1 if len(grid.labels) > 1 else len(grid.columns)
        taken = curvature_bytes(len(self.layers), matrices, self.shape.hidden)
        size = (grid.n_train + grid.n_validation) * sizes.token_bytes()
        need = {self.device: size + taken, torch.device("cpu"): size + taken * (self.device.type == "cpu")}
        home = next((home for home, n in need.items() if n <= memory_room(None, home)), None)
        if home is None:
            raise InputError(f"{size / 1e9:.1f} GB of activations", "room for them in memory", "lower --chains")
        training, validation = (
            ActivationMemory(n, True, sizes, self.device, home=home, n_shards=SHARDS)
            for n in (grid.n_train, grid.n_validation)
        )
        return training, validation

    def train_pass(self, grid: Grid, solvers: Sequence[Solver], memory: ActivationMemory) -> None:
        """One pass of all solvers, through the model or, where the memory is filled, from there."""
        order = partial(memory.shuffled, multiple=BATCH, seed=SEED)
        parts = (order if any(s.shuffles for s in solvers) else memory.in_order)(partial(self.trip, grid, grid.train))
        jobs = [Job(solver, BestProbes(solver.bank(), None), self.everything(grid)) for solver in solvers]
        train_pass(jobs, parts, Tracker([], []), 0)

    def everything(self, grid: Grid) -> Feed:
        """All layers and columns."""
        every = torch.arange(len(grid.columns))
        return Feed("layers", layer_sites(self.layers), self.shape.hidden, lambda batch: batch.acts, every)
