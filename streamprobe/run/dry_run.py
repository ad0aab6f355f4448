"""What a run would need, told before anything is trained."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence

from streamprobe.activations.batch import TokenBatch
from streamprobe.activations.stream import make_batches
from streamprobe.config.load import RunConfig
from streamprobe.data.tokenize import Chain
from streamprobe.model.sizes import loaded_bytes, weight_bytes
from streamprobe.run.lab import Lab
from streamprobe.run.memory_plan import Plan
from streamprobe.system.console import say


def describe_weights(sizes: Mapping[str, int], deepest: int) -> str:
    """Bytes of the cut-off model in each number format, as a line for the terminal."""
    listed = ", ".join(f"{size / 1e9:,.3f} GB in {name}" for name, size in sizes.items())
    return f"weights   blocks 0 to {deepest} are {listed} (estimated from the config)"


def describe_needs(
    splits: Mapping[str, Sequence[Chain]],
    plan: Plan,
    max_passes: int,
    max_batch_tokens: int,
    loaded: int,
    timed: tuple[float, int],
) -> str:
    """What a run would ask of the model, as text for the terminal.

    `loaded` is the model's size in bytes, `timed` the seconds and the padded tokens of one full batch.
    """
    tokens = {name: sum(len(c.ids) for c in chains) for name, chains in splits.items()}
    padded = sum(padded_tokens([len(c.ids) for c in chains], max_batch_tokens) for chains in splits.values())
    every = f"in each of at most {max_passes} passes"
    seconds, batch_tokens = timed
    return "\n".join(
        [
            f"pass      {tokens['train']:,} training and {tokens['validation']:,} validation tokens to stream",
            f"model     reads training tokens {'once' if plan.keep_train else every}, validation tokens "
            f"{'once' if plan.keep_validation else every + ' and once more'}, test tokens once",
            f"loaded    {loaded / 1e9:,.3f} GB of weights",
            f"time      {seconds * padded / batch_tokens:,.1f} s for the model to read training, validation and test "
            f"chains once: {sum(tokens.values()):,} tokens, {1 - sum(tokens.values()) / padded:.1%} padding, at "
            f"{batch_tokens / seconds:,.0f} tokens/s as timed over {batch_tokens:,}",
        ]
    )


def time_batch(
    chains: Sequence[Chain], read: Callable[[list[Chain]], Iterable[TokenBatch]], max_batch_tokens: int, seed: int
) -> tuple[float, int]:
    """Seconds that the first full batch of a pass takes once the model is warm, and its tokens with padding."""
    lengths = [len(c.ids) for c in chains]
    batches = make_batches(lengths, max_batch_tokens, seed)
    padded = [len(batch) * max(lengths[i] for i in batch) for batch in batches]
    full = padded.index(max(padded))
    for _ in ("warm up", "timed"):
        start = time.perf_counter()
        for batch in read([chains[i] for i in batches[full]]):
            batch.acts[:1].cpu()  # waits for the device
    return time.perf_counter() - start, padded[full]


def padded_tokens(lengths: Sequence[int], max_tokens: int) -> int:
    """Tokens that the model reads for chains of these lengths, padding included."""
    return sum(len(batch) * max(lengths[i] for i in batch) for batch in make_batches(lengths, max_tokens, None))


def _dry_run(config: RunConfig) -> None:
    lab = Lab(config)
    model, training, layers = config.model, config.training, config.probes.layers
    where = {"trust_remote_code": model.trust_remote_code, "revision": model.revision}
    sizes = weight_bytes(lab.model_config, layers, **where)
    say(f"{lab.preflight}\n\n{describe_weights(sizes, max(layers))}")
    lab.load_model()
    plan, *_ = lab.plan(None)
    loaded = loaded_bytes(lab.model)
    timed = time_batch(lab.splits["train"], lab.stream, model.max_batch_tokens, training.seed + 1)
    needs = describe_needs(lab.splits, plan, training.max_passes, model.max_batch_tokens, loaded, timed)
    say(needs)
