"""Where the activations of a run lie, and how large Newton's matrices may be: device memory, host RAM, or a pool."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from streamprobe.activations.feed import Feed
from streamprobe.activations.shards import Shard
from streamprobe.activations.store import CHUNK_TOKENS, LEAST_TOKENS, MIXING_TOKENS, ActivationMemory, Sizes
from streamprobe.config.load import RunConfig
from streamprobe.data.census import count_tokens
from streamprobe.data.tokenize import Chain
from streamprobe.errors import InputError
from streamprobe.model.backbone import pick_dtype
from streamprobe.model.blocks import text_config
from streamprobe.probes.kinds import half_lives_of, looks_back
from streamprobe.probes.linear import LINEAR
from streamprobe.run.inputs import Inputs
from streamprobe.run.kind_sizes import sample_bytes
from streamprobe.run.reader import Backbone
from streamprobe.run.solver_sizes import Matrices, NestedSize
from streamprobe.solvers.curvature import HELD, HELD_BYTES
from streamprobe.solvers.table import with_matrices
from streamprobe.system.console import say
from streamprobe.system.distributed import is_own, least, world
from streamprobe.system.hardware import free_bytes


class Kept(NamedTuple):
    """What a run keeps in memory, which decides the order of its tokens: a resumed run keeps the same."""

    rows: int  # tokens that the pool of training tokens holds
    train: bool  # the whole training split fits: the model reads it once
    validation: bool
    shared: bool = False  # Newton's columns share one matrix per layer


class Plan(NamedTuple):
    """Where the tokens of the train and validation splits lie."""

    kept: Kept
    home: torch.device  # where the kept tokens or the pool lie


class Reserve(NamedTuple):
    """Bytes that a run fills for a while, beside the activations that it keeps and what its solvers hold."""

    device: int = 0  # in a pass: a batch in the model, and a chunk for the solvers; after it: scores of all probes
    host: int = 0  # after a pass: a checkpoint that is being written

    def on(self, home: torch.device, device: torch.device) -> int:
        """Those of them that lie on `home`, in a run on `device`."""
        return max(self.device * (home == device), self.host * (home.type == "cpu"))


def estimate_reserve(
    sizes: Sizes,
    *,
    tokens: int,
    longest: int,
    intermediate: int,
    n_scores: int,
    asked: int,
    widest: int,
    nested: NestedSize,
) -> Reserve:
    """What must stay free, estimated for blocks like Llama's with fused attention.

    `tokens`: of the largest forward pass, with padding; `longest`: of its longest chain; `intermediate`: width of the
    model's MLPs; `n_scores`: tokens of the split whose evaluation takes most, times the probes of all solvers;
    `asked`, `widest`: columns and features of the groups of probes that have most, which may be made of the token on
    the way; `nested`: those of nested probes.
    """
    item = sizes.dtype.itemsize
    forward = item * tokens * (12 * sizes.hidden + 4 * intermediate + sizes.layers * sizes.hidden + longest)
    handed_on = 3 * item * tokens * sizes.layers * sizes.hidden  # rows, paired rows, and the batch
    chunk = max(CHUNK_TOKENS, tokens)
    features = max(2 * sizes.layers * (sizes.hidden + 1), 4 * widest)  # parts, what is made of them, and a copy
    trained_on = 4 * chunk * (features + (8 + 3 * sizes.layers) * asked)  # float32
    held = min(HELD, HELD_BYTES // sizes.token_bytes()) + chunk
    waiting = max(sizes.token_bytes(), 4 * widest) + 4 * sizes.layers * asked
    drawn = held * (2 * waiting + 2 * 4 * (max(sizes.hidden, widest) + 1))  # joined, and twice as features of a layer
    of_nested = nested.chunk_bytes(chunk) + nested.drawn_bytes(held, sizes.token_bytes())
    scored = 3 * 4 * n_scores  # float32, put together and sorted
    return Reserve(max(forward + handed_on + max(trained_on + drawn, of_nested), scored))


def memory_room(memory_gb: float | None, device: torch.device, reserve: int = 0) -> int:
    """Bytes that a run may fill on `device`: nine tenths of what is free less `reserve`, at most `memory_gb` 10^9."""
    free = free_bytes(device) // (world().local_size if device.type == "cpu" else 1)
    room = max(0, int(0.9 * free) - reserve)
    return room if memory_gb is None else int(min(memory_gb * 1e9, room))


class Tokens(NamedTuple):
    """How many tokens there are room for to find, on the rank that has most of them."""

    train: int
    validation: int
    bytes_each: int
    train_of_all: int  # of all ranks
    every: bool = False  # also those that no column asks

    @classmethod
    def of(
        cls, inputs: Inputs, shards: Mapping[str, Sequence[Shard]], bytes_each: int, *, every: bool = False
    ) -> "Tokens":
        """Those of a run whose splits lie in these shards; with `every` also those that no column asks."""

        def count(chains: Sequence[Chain]) -> int:
            if every:
                return sum(int(chain.support.sum()) for chain in chains)
            return count_tokens(chains, inputs.columns, inputs.dataset.labels).tokens

        splits = inputs.dataset.splits
        of_all = count(splits["train"]) if every else inputs.census["train"].tokens
        if world().size == 1:
            held_out = count(splits["validation"]) if every else inputs.census["validation"].tokens
            return cls(of_all, held_out, bytes_each, of_all, every)
        most: list[int] = []
        for split in ("train", "validation"):
            own = [i for number, shard in enumerate(shards[split]) if is_own(number) for batch in shard for i in batch]
            most.append(-least(-count([splits[split][i] for i in own])))
        train, validation = most
        return cls(train, validation, bytes_each, of_all, every)


def plan_memory(
    tokens: Tokens,
    rooms: Mapping[torch.device, int],
    *,
    batch_size: int,
    taken: int = 0,
    before: Kept | None = None,
) -> Plan:
    """The first of `rooms` (bytes) in which both splits fit; else a mixing pool, in the first that has room for one.

    `taken` bytes of the first are spoken for.  `before`: what a run that is resumed kept.  Raises InputError if there
    is no room for that, or not even for a pool of LEAST_TOKENS, or of one mini-batch of `batch_size` if that is more.
    """
    first = next(iter(rooms))
    rooms = {**rooms, first: max(0, rooms[first] - taken)}
    if before:
        return _plan_as_before(tokens, rooms, before)
    for home, space in rooms.items():
        if (tokens.train + tokens.validation) * tokens.bytes_each <= space:
            return Plan(Kept(tokens.train_of_all, True, True), home)
    least = max(LEAST_TOKENS, batch_size)
    for home, space in rooms.items():
        for keep_validation in (tokens.validation * tokens.bytes_each <= space / 2, False):
            rows = space // tokens.bytes_each - tokens.validation * keep_validation
            if rows >= least:
                pool = min(rows, max(MIXING_TOKENS, batch_size), tokens.train_of_all)
                return Plan(Kept(pool, False, keep_validation), home)
    raise InputError(
        f"{max(rooms.values()) / 1e6:,.2f} MB for activations"
        + (f" beside {taken / 1e6:,.2f} MB for Newton's matrices" if taken else ""),
        f"at least {least * tokens.bytes_each / 1e6:,.2f} MB, to mix {least:,} tokens in",
        "raise --memory_gb, free memory, or probe fewer layers",
    )


def _plan_as_before(tokens: Tokens, rooms: Mapping[torch.device, int], before: Kept) -> Plan:
    """The plan of the run that is resumed, in whichever memory has room for it."""
    rows = tokens.train if before.train else before.rows
    needed = (rows + tokens.validation * before.validation) * tokens.bytes_each
    home = next((home for home, space in rooms.items() if needed <= space), None)
    if home is None:
        raise InputError(
            f"{max(rooms.values()) / 1e6:,.2f} MB for activations",
            f"{needed / 1e6:,.2f} MB for {rows:,} training tokens, as when the run began",
            "raise --memory_gb, free memory, or start a new run",
        )
    return Plan(before, home)


def make_plan(
    tokens: Tokens,
    matrices: Matrices | None,
    *,
    device: torch.device,
    memory_gb: float | None,
    reserve: Reserve,
    batch_size: int,
    before: Kept | None,
) -> Plan:
    """Where the tokens will lie, and whether Newton (None: it is not asked for) shares its matrices; prints both.

    Device memory comes first, then host RAM.  `memory_gb` as in `memory_room`; `reserve` stays free.
    """
    homes = dict.fromkeys((device, torch.device("cpu")))
    rooms = {home: least(memory_room(memory_gb, home, reserve.on(home, device))) for home in homes}
    shared, taken = False, 0
    if matrices:
        activations = (tokens.train + tokens.validation) * tokens.bytes_each
        pool = max(LEAST_TOKENS, batch_size) * tokens.bytes_each
        shared = before.shared if before else matrices.must_share(rooms[device], activations, pool)
        taken = matrices.taken(shared)
        whole = matrices.taken(False) - matrices.vectors
        kind = f"one per layer: {whole / 1e9:.2f} GB would be too much" if shared else "one per layer and column"
        say(f"curvature {taken / 1e9:.2f} GB on {device}, {kind}")
    plan = plan_memory(tokens, rooms, batch_size=batch_size, taken=taken, before=before)
    kept = plan.kept._replace(shared=shared)
    rows = (tokens.train if kept.train else kept.rows) + tokens.validation * kept.validation
    what = (
        f"all {rows:,} training and validation tokens: the model reads them once"
        if kept.train
        else f"a pool of {kept.rows:,} of {tokens.train_of_all:,} training tokens: the model reads them in every pass"
    )
    most = f", on the rank that has most of {world().size}" if world().size > 1 else ""
    say(f"memory    {rows * tokens.bytes_each / 1e9:.2f} GB on {plan.home} for {what}{most}")
    return plan._replace(kept=kept)


class RunPlan(NamedTuple):
    """Where everything lies while a run trains."""

    kept: Kept
    home: torch.device  # of the activations
    device: torch.device  # of the model and the solvers
    tokens: Tokens
    sizes: Sizes
    matrices: Matrices | None  # Newton's, if it is asked for


def plan_run(
    config: RunConfig,
    inputs: Inputs,
    backbone: Backbone,
    feeds: Sequence[Feed],
    *,
    shards: Mapping[str, Sequence[Shard]],
    before: Kept | None,
) -> RunPlan:
    """Plans and prints where activations and Newton's matrices will lie; `before` is what a resumed run kept.

    On several ranks all plan alike, by the least room that one of them has.

    Raises InputError where there is no room, and for Newton on a device without float64.
    """
    training, newton = config.training, with_matrices(config.training.solvers)
    if newton and backbone.device.type == "mps":
        raise InputError("solver newton on mps", "a device with float64", "give --device_map cpu or --solvers adam")
    kinds, probed = config.probes.kinds, len(backbone.widths)
    n_layers = probed * (1 + len(half_lives_of(kinds))) + len(inputs.controls.embedded)
    dtype = pick_dtype(config.model.dtype)
    sizes = Sizes(n_layers, backbone.hidden_size, len(inputs.columns), inputs.controls.width, dtype)
    tokens = Tokens.of(inputs, shards, sizes.token_bytes(), every=any(map(looks_back, kinds)))
    matrices = Matrices.of(feeds) if newton else None
    plan = make_plan(
        tokens,
        matrices,
        device=backbone.device,
        memory_gb=training.memory_cap,
        reserve=_reserve(config, inputs, backbone, feeds, sizes=sizes),
        batch_size=training.batch_size,
        before=before,
    )
    return RunPlan(plan.kept, plan.home, backbone.device, tokens, sizes, matrices)


def _reserve(config: RunConfig, inputs: Inputs, backbone: Backbone, feeds: Sequence[Feed], *, sizes: Sizes) -> Reserve:
    """What the forward passes, a chunk of tokens, the evaluation and a checkpoint will take for a while."""
    most, lengths = config.model.max_batch_tokens, inputs.dataset.lengths()
    width = getattr(text_config(backbone.model.config), "intermediate_size", None) or 4 * backbone.hidden_size
    splits, folds = inputs.dataset.splits, inputs.dataset.folds
    validation, test = (sum(int(c.support.sum()) for c in splits[name]) for name in ("validation", "test"))
    nested = NestedSize.of(feeds) if with_matrices(config.training.solvers) else NestedSize()
    n_probes = sum(len(feed.sites) * len(feed.columns) for feed in feeds) * len(config.training.solvers)
    n_probes += (nested.layers + 1) * nested.columns
    others, real = [kind for kind in config.probes.kinds if kind != LINEAR], inputs.n_real * folds
    n_probes += len(others) * (len(backbone.sites) * real + (nested.layers + 1) * nested.columns)
    reserve = estimate_reserve(
        sizes,
        tokens=min(most, sum(lengths)),
        longest=min(most, max(lengths)),
        intermediate=max(width) if isinstance(width, list) else width,  # some models have one a block
        n_scores=max(validation, test // folds) * n_probes,
        asked=max(len(feed.columns) for feed in feeds),
        widest=max(feed.n_features for feed in feeds),
        nested=nested,
    )
    vectors = Matrices.of(feeds).vectors if with_matrices(config.training.solvers) else 0
    n_sites, tokens = len(backbone.sites), inputs.census["train"].tokens
    sampled = sample_bytes(others, sizes, n_sites=n_sites, tokens=tokens, columns=real)
    host = max(reserve.host, 2 * vectors)  # twice while a checkpoint is written
    return Reserve(max(reserve.device, sampled), host)


def make_memories(plan: RunPlan, n_shards: int) -> tuple[ActivationMemory, ActivationMemory]:
    """Room for this rank's training and validation tokens, as planned."""
    kept, tokens = plan.kept, plan.tokens
    where: dict[str, Any] = {"home": plan.home, "n_shards": n_shards, "every": tokens.every}
    rows = tokens.train if kept.train else kept.rows
    train = ActivationMemory(rows, kept.train, plan.sizes, plan.device, tokens=tokens.train_of_all, **where)
    n_validation = tokens.validation * kept.validation
    return train, ActivationMemory(n_validation, kept.validation, plan.sizes, plan.device, **where)
