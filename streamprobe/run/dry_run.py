"""What a run would need, printed before anything is trained."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from streamprobe.activations.batch import TokenBatch
from streamprobe.activations.shards import Shard
from streamprobe.config.load import RunConfig
from streamprobe.data.tokenize import Chain
from streamprobe.model.sizes import loaded_bytes, weight_bytes
from streamprobe.probes.kinds import trained_in_epochs
from streamprobe.probes.sites import Site
from streamprobe.run.cost import Cost
from streamprobe.run.inputs import make_inputs, read_texts
from streamprobe.run.jobs import make_feeds
from streamprobe.run.memory_plan import Kept, plan_run
from streamprobe.run.reader import embed_controls, load_model, make_reader, skip_bad_chains
from streamprobe.system.console import say
from streamprobe.system.distributed import local_main_first


class Timed(NamedTuple):
    """How long the model takes for a batch."""

    seconds: float
    tokens: int  # with padding


def describe_weights(sizes: Mapping[str, int], deepest: int) -> str:
    """Bytes of the cut-off model in each number format, as a line for the terminal."""
    listed = ", ".join(f"{size / 1e9:,.3f} GB in {name}" for name, size in sizes.items())
    return f"weights   blocks 0 to {deepest} are {listed} (estimated from the config)"


def describe_needs(
    splits: Mapping[str, Sequence[Chain]],
    kept: Kept,
    *,
    max_passes: int,
    padded: int,
    loaded: int,
    timed: Timed,
    nested: bool,
) -> str:
    """What a run would ask of the model, as text for the terminal.

    `splits` has those that it reads, of `padded` tokens with padding; `loaded` is the model's size in bytes, `timed` a
    full batch; `nested`: whether nested probes are trained.
    """
    tokens = {name: sum(len(c.ids) for c in chains) for name, chains in splits.items()}
    every = f"in each of at most {max_passes} passes" + " and as many of nested probes" * nested
    rate = timed.tokens / timed.seconds
    return "\n".join(
        [
            f"pass      {tokens['train']:,} training and {tokens['validation']:,} validation tokens to stream",
            f"model     reads training tokens {'once' if kept.train else every}, validation tokens "
            f"{'once' if kept.validation else every + ' and once more'}, test tokens "
            + ("once" if "test" in splits else "never: they are the same, in memory"),
            f"loaded    {loaded / 1e9:,.3f} GB of weights",
            f"time      {padded / rate:,.1f} s for the model to read {', '.join(splits)} chains once: "
            f"{sum(tokens.values()):,} tokens, {1 - sum(tokens.values()) / padded:.1%} padding, at "
            f"{rate:,.0f} tokens/s as timed over {timed.tokens:,}",
        ]
    )


def describe_probes(sites: Sequence[Site], n_columns: int, kinds: Sequence[str]) -> str:
    """What a run would train and where, and of which kinds the time is not told, as text for the terminal."""
    names, later = ", ".join(site.name for site in sites), trained_in_epochs(kinds)
    lines = [f"probes    {n_columns} (label, target, lag) at {names}: each {', '.join(kinds)}"]
    if later:
        lines.append(f"          {', '.join(later)}: trained on a sample, behind the passes, which takes a while, too")
    return "\n".join(lines)


def time_batch(
    chains: Sequence[Chain], shards: Sequence[Shard], read: Callable[[list[Chain]], Iterable[TokenBatch]]
) -> Timed:
    """Seconds that the largest batch takes once the model is warm, and its tokens with padding."""
    largest = max((batch for shard in shards for batch in shard), key=lambda batch: padded_size(chains, batch))
    for _ in ("warm up", "timed"):
        start = time.perf_counter()
        for batch in read([chains[i] for i in largest]):
            batch.acts[:1].cpu()  # waits for the device
    return Timed(time.perf_counter() - start, padded_size(chains, largest))


def padded_size(chains: Sequence[Chain], batch: Sequence[int]) -> int:
    """Tokens that the model reads for a batch of chains, padding included."""
    return len(batch) * max(len(chains[i].ids) for i in batch)


def describe_run(config: RunConfig) -> None:
    """Reads the data, loads the model, times one batch, and prints what the run would need; trains nothing."""
    cost, model = Cost(), config.model
    with local_main_first():
        texts, config = read_texts(config)
    inputs = make_inputs(config, texts)
    layers = sorted({place.layer for place in texts.places})
    sizes = weight_bytes(texts.model_config, layers, **model.code)
    say(f"{inputs.preflight}\n\n{describe_weights(sizes, max(layers))}")
    backbone = load_model(config, texts, inputs)
    if config.data.bad_chains == "skip":
        inputs = skip_bad_chains(config, texts, inputs, backbone, cost=cost)
    del texts  # as in a run, which plans with the memory that is free then
    embedded = embed_controls(inputs, backbone)
    reader = make_reader(config, inputs, backbone, cost, embedded=embedded)
    kinds = config.probes.kinds
    feeds = make_feeds(inputs, backbone, embedded.width if embedded else None, kinds=kinds)
    plan = plan_run(config, inputs, backbone, feeds, shards=reader.shards, before=None)
    splits = dict(inputs.dataset.splits)
    if inputs.dataset.folds > 1 and plan.kept.train and plan.kept.validation:
        del splits["test"]
    say(describe_probes(backbone.sites, inputs.n_real, kinds))
    timed = time_batch(splits["train"], reader.shards["train"], reader.stream)
    batches = [(chains, batch) for name, chains in splits.items() for shard in reader.shards[name] for batch in shard]
    say(
        describe_needs(
            splits,
            plan.kept,
            max_passes=config.training.max_passes,
            padded=sum(padded_size(chains, batch) for chains, batch in batches),
            loaded=loaded_bytes(backbone.model),
            timed=timed,
            nested=plan.matrices is not None and plan.matrices.nested.columns > 0,
        )
    )
